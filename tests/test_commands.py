# SPDX-License-Identifier: MIT
"""The command line, in this process: exit codes, one-line errors, files."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint, commands, paper
from dsv2_ref.__main__ import COMMANDS, main
from dsv2_ref.commands import common, jobs
from dsv2_ref.commands import run as main_job
from dsv2_ref.commands import train as train_module
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training import setup as library
from dsv2_ref.training.ladder import LADDER
from dsv2_ref.training.pretrain import Trainer, TrainingDiverged


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"def f{i}_{j}(x):\n    return x + {j}\n\n\n" for j in range(40)]
        (folder / f"m{i}.py").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "out"
    code = main(["train", "--preset", "tiny", "--corpus", texts, "--out", str(out), "--steps", "6",
                 "--sequence", "32", "--batch", "2", "--save-every", "4", "--quiet"])
    assert code == 0
    return out


def test_train_writes_everything(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {"state-000000004.safetensors", "state-000000006.safetensors", "log.jsonl",
                     "config.json",
                     "tokenizer.json", "model"}
    model = checkpoint.load(trained / "model")
    assert str(model.embedding.weight.dtype) == "torch.bfloat16"
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    assert model.config.vocab == tokenizer.vocab < 512          # too little text for more merges
    assert (model.config.bos, model.config.eos) == (tokenizer.bos, tokenizer.eos)
    assert len((trained / "log.jsonl").read_text().splitlines()) == 6


def test_transformers_takes_what_train_writes(trained):
    """With the folder's name alone; tests/test_export.py has more of it."""
    library, folder = pytest.importorskip("transformers"), trained / "model"
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, own = checkpoint.load(folder, torch.float32), load_tokenizer(folder / "tokenizer.json")
    ids = tokenizer("def f1(x):\n", return_tensors="pt").input_ids
    assert ids.tolist() == [[own.bos, *own.encode("def f1(x):\n")]]
    with torch.no_grad():
        mine, found = ours(ids), theirs(ids).logits
    assert (mine - found).abs().max() < 1e-5 * mine.abs().max()
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (own.eos, 32)


def test_a_preset_of_the_ladder_comes_with_its_recipe(texts, tmp_path, capsys):
    code, _, err = call(capsys, "train", "--preset", "10m", "--corpus", texts, "--steps", 1,
                        "--sequence", 16, "--batch", 1, "--no-save", "--quiet", "--out", tmp_path)
    assert code == 0, err
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert entry["lr"] == pytest.approx(LADDER["10m"].lr * 0.316**2)    # at the end of the decay
    assert [len(layer) for layer in entry["expert_load"]] == [32] * 6


@pytest.mark.parametrize(("args", "steps"), [
    ((), LADDER["50m"].steps), (("--recipe", "minutes"), 300), (("--recipe", "10m"), 3255),
    (("--recipe", "lite"), 300), (("--steps", "7"), 7), (("--tokens", "1e6"), 9),
])
def test_the_length_of_a_run_on_the_ladder(args, steps, capsys, monkeypatch, tmp_path):
    seen = []

    def stop(config, recipe, *_, **__):
        seen.append(recipe.steps)
        raise ValueError("enough")

    monkeypatch.setattr(jobs, "set_up", stop)
    monkeypatch.setattr(train_module, "open_corpus", lambda name: None)
    assert call(capsys, "train", "--preset", "50m", "--out", tmp_path, *args)[0] == 2
    assert seen == [steps]


def test_in_little_memory_and_without_saving(texts, tmp_path, capsys, monkeypatch):
    real, read = library.encode, []
    monkeypatch.setattr(library, "encode", lambda documents, tokenizer: read.append(
        len(documents)) or real(documents, tokenizer))
    code, out, err = call(capsys, "train", "--preset", "tiny", "--corpus", texts, "--tokens", 500,
                          "--sequence", 32, "--batch", 4, "--micro-batch", 2, "--recompute", 1,
                          "--text-bytes", 1e3, "--optimizer", "adamw8", "--weights", "bf16",
                          "--lr", 1e-3, "--no-save", "--quiet", "--out", tmp_path / "out")
    assert code == 0 and json.loads(out)["steps"] == 4 and "memory planned: weights" in err
    assert read == [1]                                              # of ten files to train on
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "log.jsonl", "tokenizer.json", "config.json"}


def test_train_refuses_to_overwrite_and_resumes(trained, texts, capsys):
    same = ["train", "--preset", "tiny", "--corpus", texts, "--out", trained, "--sequence", "32",
            "--batch", "2", "--quiet"]
    code, out, err = call(capsys, *same, "--steps", 6)
    assert code == 2 and "expected --resume" in err and err.count("\n") == 1 and out == ""
    code, out, err = call(capsys, *same, "--steps", 8, "--resume", "--seed", 1)
    assert code == 2 and "recipe.seed was 0, expected 1" in err
    thesis = trained / "model" / "net.py"
    thesis.write_text("thesis")
    code, out, err = call(capsys, *same, "--steps", 8, "--resume")
    assert code == 2 and "net.py: not written here" in err and thesis.read_text() == "thesis"
    thesis.unlink()
    code, out, err = call(capsys, *same, "--steps", 7, "--resume")
    assert code == 0 and json.loads(out)["steps"] == 7
    code, out, err = call(capsys, *same, "--steps", 8, "--resume", "--lr", "3e-3")
    assert code == 0 and "peak rate: 3.00e-03 from here on, 6.00e-03 before" in err
    entry = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 8 and entry["lr"] == entry["adamw_lr"] == pytest.approx(6e-5)
    code, out, err = call(capsys, *same, "--steps", 8, "--resume")
    assert code == 2 and "recipe.lr was 0.003, expected 0.006" in err
    same += ["--lr", "3e-3"]
    code, out, err = call(capsys, *same, "--steps", 8, "--resume")
    assert code == 2 and "is at its end" in err
    first = (trained / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(trained / "model")
    code, out, err = call(capsys, *same, "--steps", 8, "--resume")
    assert code == 0 and json.loads(out)["loss"] == entry["language"]
    assert (trained / "model" / "model.safetensors").read_bytes() == first


def test_generate_is_reproducible_json(trained, capsys):
    args = ["generate", "--model", trained / "model", "--prompt", "def ", "--max-new-tokens", 8]
    code, out, err = call(capsys, *args)
    text = json.loads(out)["text"]
    assert code == 0 and text.startswith("def ") and err.rstrip("\n").startswith("def ")
    assert json.loads(call(capsys, *args)[1])["text"] == text


def test_generate_reads_from_the_six_bit_cache(trained, capsys, monkeypatch):
    real, made = DeepSeekV2.new_cache, []

    def new_cache(model, batch, max_tokens, kind="latent"):
        made.append((batch, max_tokens, kind))
        return real(model, batch, max_tokens, kind)

    monkeypatch.setattr(DeepSeekV2, "new_cache", new_cache)
    args = ["generate", "--model", trained / "model", "--prompt", "def ", "--max-new-tokens", 8]
    code, out, err = call(capsys, *args, "--cache", "six_bit")
    prompt = load_tokenizer(trained / "tokenizer.json").encode("def ")
    assert made == [(1, 1 + len(prompt) + 7, "six_bit")]        # the last new token is not read
    assert code == 0 and json.loads(out)["text"].startswith("def ")
    assert err == json.loads(out)["text"] + "\n"
    code, out, err = call(capsys, *args, "--cache", "eight_bit")
    assert code == 2 and out == "" and "invalid choice: 'eight_bit'" in err
    code, out, err = call(capsys, *args[:-1], -5, "--cache", "six_bit")
    assert code == 2 and out == "" and err.startswith("dsv2_ref: max_new_tokens: -5, expected")


def test_what_is_streamed_is_what_is_returned(trained, monkeypatch):
    """Also where max_new_tokens cuts a character in two."""
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    half, written = tokenizer.encode("知")[:-1], []

    def generate(*_, stream, **__):
        for i in half:
            stream([i])
        return [half]

    monkeypatch.setattr(common, "generate", generate)
    model = checkpoint.load(trained / "model")
    text = common.write_sample(model, tokenizer, "def", len(half), 0.0, 1.0, written.append)
    assert text == "def\ufffd" and "".join(written) == text + "\n"


def test_nothing_is_lost_where_stdout_is_not_utf8(trained, monkeypatch):
    kinds = (("cp1252", "strict"), ("cp1252", "backslashreplace"), ("ascii", "strict"))
    streams = [io.TextIOWrapper(io.BytesIO(), *kind, newline="\n") for kind in kinds]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])              # as Python opens it
    assert main(["generate", "--model", str(trained / "model"), "--prompt", "中",
                 "--max-new-tokens", "3"]) == 0
    assert json.loads(streams[0].buffer.getvalue())["text"].startswith("中")
    streams[1].flush()
    assert streams[1].buffer.getvalue().startswith(b"\\u4e2d")
    monkeypatch.setattr(sys, "stdout", streams[2])
    monkeypatch.setattr(paper, "as_table", lambda rows: "3 × 4")
    assert main(["paper"]) == 0
    assert streams[2].buffer.getvalue() == b"3 ? 4\n"


def shut_pipe():
    """The end to write to of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("argv", "stream", "sink", "code", "other"), [
    ("copy --list", "stdout", shut_pipe, 141, ""),
    ("copy --help", "stdout", shut_pipe, 141, ""),
    ("paper --json", "stdout", shut_pipe, 141, ""),                     # longer than the buffer
    ("copy --list", "stdout", "/dev/full", 2, "stdout: cannot be written (No space left"),
    ("copy rope", "stderr", shut_pipe, 2, ""),
    ("train --bad", "stderr", shut_pipe, 2, ""),
], ids=lambda x: x.__name__ if callable(x) else str(x)[:20])
def test_output_that_cannot_be_written(argv, stream, sink, code, other, unbuffered):
    if not callable(sink) and not Path(sink).exists():
        pytest.skip(f"no {sink} on this system")
    end = sink() if callable(sink) else os.open(sink, os.O_WRONLY)
    kept = {"stdout": "stderr", "stderr": "stdout"}[stream]
    try:
        done = subprocess.run([sys.executable, "-m", "dsv2_ref", *argv.split()], text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
                              **{stream: end, kept: subprocess.PIPE}, timeout=120, check=False)
    finally:
        os.close(end)
    said = getattr(done, kept)
    assert done.returncode == code and other in said and said.count("\n") == bool(other)


def test_a_message_that_nobody_reads_ends_the_command(trained):
    end = shut_pipe()
    done = subprocess.run([sys.executable, "-m", "dsv2_ref", "generate", "--model",
                           trained / "model"], stdout=end, stderr=end, timeout=120, check=False)
    os.close(end)
    assert done.returncode == 141


def test_every_command_has_a_file_and_light_ones_do_without_torch():
    folder = Path(commands.__file__).parent
    files = {f.stem for f in folder.glob("*.py") if "def add_options" in f.read_text("utf-8")}
    assert files == set(COMMANDS)
    code = ("import sys; from dsv2_ref.__main__ import main; main(['copy', '--list']); "
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0 and b'"rope"' in done.stdout


def test_copies_that_changed_are_exit_code_1(tmp_path, capsys):
    assert call(capsys, "copy", "rope", tmp_path)[0] == 0
    assert call(capsys, "copy", "--check", tmp_path)[0] == 0
    (tmp_path / "rope.py").write_text("mine")
    code, out, err = call(capsys, "copy", "--check", tmp_path)
    assert code == 1 and json.loads(out)["rope.py"] != "same" and err == ""


def test_train_says_what_the_corpus_is(texts, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for file in Path(texts).iterdir():
        (folder / file.name).write_text(file.read_text())
    (folder / "._m0.py").write_bytes(b"\0\5\x16\7")
    code, _, err = call(capsys, "train", "--preset", "tiny", "--corpus", folder, "--steps", 1,
                        "--sequence", 16, "--batch", 1, "--no-save", "--quiet", "--out",
                        tmp_path / "out")
    assert code == 0 and "local: texts (left out: 1 hidden)\n" in err


@pytest.mark.parametrize("args", [
    "train --corpus", "train --out", "train --preset", "run --corpus", "run --out",
    "generate --model", "figures", "copy rope", "copy --check", "bench ablations --only",
    "needle", "needle data/needle --corpus", "needle data/needle --out",
])
def test_an_empty_argument_is_not_the_current_folder(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    code, out, err = call(capsys, *args.split(), "")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert ": '', expected a name or a path" in err and f"dsv2_ref {args.split()[0]}: " in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_sampling_writes_nothing_first(trained, capsys):
    code, out, err = call(capsys, "generate", "--model", trained / "model", "--temperature", -1)
    assert code == 2 and out == "" and err.startswith("dsv2_ref: temperature: -1.0")


def test_the_papers_recipe_scaled_down(texts, tmp_path, capsys):
    code, out, _ = call(capsys, "train", "--preset", "tiny", "--corpus", texts, "--quiet",
                        "--recipe", "v2", "--steps", 100, "--batch", 4, "--sequence", 16,
                        "--out", tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert code == 0 and [entry["batch"] for entry in log[:6]] == [1, 2, 3, 4, 4, 4]
    assert [log[i]["lr"] for i in (1, 58)] == [2.4e-4, 2.4e-4]
    assert [log[i]["lr"] for i in (60, 95)] == pytest.approx([2.4e-4 * 0.316, 2.4e-4 * 0.316**2])


def test_paper(capsys):
    code, out, _ = call(capsys, "paper", "--json")
    rows = json.loads(out)
    assert code == 0 and all(row["holds"] for row in rows) and len(rows) >= 20
    code, out, _ = call(capsys, "paper")
    assert code == 0 and "235,741,434,880" in out


def test_the_papers_cluster_on_paper(capsys):
    code, out, _ = call(capsys, "paper", "--plan", "--json")
    planned = json.loads(out)
    assert code == 0 and len(planned["memory"]) == 16 and len(planned["assumed"]) == 13
    assert planned["step"]["hours"] == planned["growth"]["batch kept"][2]["hours"]
    code, text, _ = call(capsys, "paper", "--plan")
    assert code == 0 and max(map(len, text.splitlines())) <= 100
    for row in planned["assumed"]:                       # every assumption, with its source
        assert f"\n{row['name']} " in text and row["source"].split()[0] in text
    for size in planned["fullest"].values():
        assert f"{size / 1e9:.1f}  " in text
    assert "the paper says 172.8K" in text and "65,536" in text


@pytest.mark.parametrize(("args", "message"), [
    (["nonsense"], "invalid choice: 'nonsense'"),
    (["train", "--preset", "huge"], "preset: 'huge', expected one of"),
    (["train", "--steps", "0"], "steps: 0, expected a number > 0"),
    (["train", "--steps", "3", "--seconds", "3"], "not allowed with"),
    (["train", "--corpus", "/no/such/place", "--steps", "1"], "'/no/such/place'"),
    (["train", "--corpus", 5000 * "x", "--steps", "1"], "File name too long"),
    (["train", "--lr", "-1e-3", "--steps", "1"], "lr: -0.001, expected"),
    (["train", "--resume"], "expected a saved state to resume from"),
    (["train", "--preset", "v2", "--steps", "1"], "training state takes 3,5"),
    (["train", "--text-bytes", "-1", "--corpus", "stories"], "text_bytes: -1.0, expected"),
    (["train", "--seed", "-1", "--steps", "1"], "seed: -1, expected 0 to"),
    (["train", "--lr", "-1e-3", "--steps", "1"], "lr: -0.001, expected a number > 0"),
    (["train", "--save-every", "-1", "--steps", "1"], "save_every: -1, evaluate_every: 0,"),
    (["train", "--recipe", "ours"], "invalid choice: 'ours'"),
    (["train", "--ep", "2"], "--ep: 2 on one process, expected torchrun"),
    (["train", "--schedule", "zbv"], "--schedule: zbv on one process, expected torchrun"),
    (["train", "--zero1"], "--zero1: True on one process, expected torchrun"),
    (["run", "--seconds", "-5"], "seconds: -5.0, expected a number > 0"),
    (["generate", "--model", "/no/such/model"], "'/no/such/model' is no folder"),
    (["generate", "--model", "data/model", "--prompt", "\udcff"], "prompt: '\\udcff', expected"),
    (["bench", "nothing"], "invalid choice: 'nothing'"),
], ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_code_2(args, message, capsys, tmp_path):
    if args[0] in ("train", "run"):
        args = [*args, "--out", tmp_path / "out"]
    code, out, err = call(capsys, *args)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("args, message", [
    (["--ep", "3"], "ep x pp: 3 x 1, expected a divisor of the 4 ranks"),
    (["--pp", "4"], "layers: 3, expected at least 4"),
    (["--batch", "8", "--micro-batch", "6"], "micro_batch: 6 sequences, expected a multiple of"),
    (["--schedule", "zbv"], "--schedule: zbv without stages, expected --pp 2"),
    (["--preset", "needle"], "needle: on 4 processes, expected a preset on text"),
    (["--preset", "none"], "preset: 'none', expected one of"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_ranks_cannot_do_is_said_once(args, message, capsys, monkeypatch, tmp_path):
    """Before any process group is made: there is nobody to make one with here."""
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, out, err = call(capsys, "train", "--preset", "tiny", "--steps", "1", *args,
                              "--out", tmp_path / "out")
        assert code == 2 and out == ""
        assert (message in err and err.count("\n") == 1) if rank == "0" else err == ""
    assert not (tmp_path / "out").exists()


def test_unwritable_output(tmp_path, texts, capsys):
    (tmp_path / "file").write_text("mine")
    for command in (["run", "--seconds", 5, "--corpus", texts], ["train", "--corpus", texts]):
        code, out, err = call(capsys, *command, "--out", tmp_path / "file" / "x")
        assert code == 2 and "cannot be written" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_corpus(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    code, _, err = call(capsys, "train", "--corpus", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "empty" in err and err.count("\n") == 1


def test_the_main_job_in_small(tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setattr(main_job, "MODEL", TINY)
    code, out, err = call(capsys, "run", "--seconds", 6, "--corpus", texts, "--out", tmp_path)
    assert code == 0
    result = json.loads(out)
    assert result == json.loads((tmp_path / "run.json").read_text())
    for key in ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "seconds",
                "tokens_per_second"):
        assert result[key] > 0
    assert list(result["cache_bytes_per_token"]) == ["MHA", "GQA", "MQA", "MLA"]
    for name in ("loss.png", "cache.png", "expert_load.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.load(tmp_path / "model").config.n_layers == 3
    assert "def " in err and "xz -9e" in err and "93.3%" in err
    first = (tmp_path / "model" / "model.safetensors").read_bytes()
    code, _, _ = call(capsys, "run", "--seconds", 6, "--corpus", texts, "--out", tmp_path)
    assert code == 0 and (tmp_path / "model" / "model.safetensors").read_bytes() != first


def test_divergence_is_one_line(tmp_path, texts, capsys, monkeypatch):
    def diverge(self, with_load=False):
        raise TrainingDiverged("step 3: loss nan")

    monkeypatch.setattr(Trainer, "step", diverge)
    code, out, err = call(capsys, "train", "--preset", "tiny", "--corpus", texts, "--quiet",
                          "--out", tmp_path / "out")
    assert code == 1 and out == "" and err.splitlines()[-1] == "dsv2_ref: step 3: loss nan"


def small(texts, out, *more):
    return ["train", "--preset", "tiny", "--corpus", texts, "--sequence", 32, "--batch", 2,
            "--precision", "fp32", "--quiet", "--out", out, *more]


def test_files_of_others_are_refused_before_anything_is_touched(texts, tmp_path, capsys):
    for name in ("model/net.py", "config.json", "tokenizer.json", "log.jsonl"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        for file in (name, ".tmpABC", ".writable", "notes.txt"):
            (out / file).write_text("thesis")
        code, stdout, err = call(capsys, *small(texts, out, "--steps", 1))
        assert code == 2 and stdout == "" and err.count("\n") == 1, name
        assert name.split("/")[0] in err and ("expected another --out" in err
                                              or "not written here" in err)
        files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        assert files == {name, ".tmpABC", ".writable", "notes.txt"}
        assert {(out / file).read_text() for file in files} == {"thesis"}


@pytest.mark.parametrize("name", ["model/net.py", "run.json", "loss.png", "training/log.jsonl"])
def test_the_main_job_takes_no_place_of_others(name, texts, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for file in (name, ".writable"):
        (tmp_path / file).write_text("thesis")
    code, out, err = call(capsys, "run", "--corpus", texts, "--seconds", 5, "--out", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and name.split("/")[0] in err
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {name, ".writable"}
    assert (tmp_path / name).read_text() == "thesis"


def test_a_run_that_left_no_state_can_be_started_again(texts, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for steps in (2, 1):
        assert call(capsys, *small(texts, tmp_path, "--steps", steps, "--no-save"))[0] == 0
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == steps
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_divergence_at_the_end_is_no_success(steps, texts, tmp_path, capsys):
    code, out, err = call(capsys, *small(texts, tmp_path, "--steps", steps, "--lr", "1e30"))
    assert code == 1 and out == "" and "try a lower lr" in err.splitlines()[-1]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"log.jsonl", "config.json", "tokenizer.json", "state-000000000.safetensors"}
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    code, out, err = call(capsys, *small(texts, tmp_path, "--steps", steps, "--lr", "1e-3"),
                          "--resume")
    assert code == 0 and 0 < json.loads(out)["loss"] < 7
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == steps


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_command_with_its_code(name, texts, tmp_path, capsys, monkeypatch):
    step, number = Trainer.step, getattr(signal, name)

    def signalled(self, with_load=False):
        if self.steps == 1:
            os.kill(os.getpid(), number)
        return step(self, with_load)

    monkeypatch.setattr(Trainer, "step", signalled)
    code, out, err = call(capsys, *small(texts, tmp_path, "--steps", 9))
    assert code == 128 + number and out == "" and "what was saved is whole" in err
    assert (tmp_path / "state-000000002.safetensors").exists()


def test_what_does_not_fit_is_one_line_before_the_first_step(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "memory", lambda device: (2**20, 2**34))
    code, out, err = call(capsys, *small(texts, tmp_path, "--steps", 1))
    assert code == 2 and out == "" and "GiB planned, expected at most 0.00" in err.splitlines()[-1]
    assert (tmp_path / "log.jsonl").exists() is False


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
])
def test_running_out_of_memory_is_one_line(error, texts, tmp_path, capsys, monkeypatch):
    def step(self, with_load=False):
        raise error

    monkeypatch.setattr(Trainer, "step", step)
    code, out, err = call(capsys, *small(texts, tmp_path, "--steps", 1))
    assert code == 2 and out == "" and "dsv2_ref: memory: used up" in err.splitlines()[-1]
    monkeypatch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        main([str(a) for a in small(texts, tmp_path / "2", "--steps", 1)])


def test_the_rate_moves_every_group(texts, tmp_path, capsys):
    losses = []
    for i, rate in enumerate(("1e-12", "6e-3")):
        assert call(capsys, *small(texts, tmp_path / str(i), "--steps", 8, "--lr", rate,
                                   "--no-save"))[0] == 0
        log = [json.loads(line) for line in (tmp_path / str(i) / "log.jsonl").read_text()
               .splitlines()]
        assert all(entry["lr"] == entry["adamw_lr"] for entry in log)
        losses.append(log[0]["language"] - log[-1]["language"])
    assert abs(losses[0]) < 0.05 < 0.3 < losses[1]

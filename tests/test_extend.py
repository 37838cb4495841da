# SPDX-License-Identifier: MIT
"""`train --from FOLDER --extend S` and `train --preset needle`: what they save and refuse, and that
their runs are kept and gone on with as any other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.commands import jobs
from dsv2_ref.commands import train as train_module
from dsv2_ref.config import Config
from dsv2_ref.stretch import stretched_config, trained_positions
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.long_context import PRESETS

MODEL = Path(__file__).parents[1] / "data" / "model"
CONFIG = Config.from_hf(MODEL)
TRAINED = trained_positions(CONFIG)
FEW = ("--steps", "2", "--batch", "1", "--sequence", "64", "--quiet")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"m{i}.txt").write_text(f"Lily had {i} red kites and one old drum. " * 40)
    return str(folder)


def entries(folder):
    """The log, without what the clock says."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_a_saved_model_is_stretched_tuned_saved_and_gone_on_with(texts, tmp_path, capsys):
    same = ["train", "--from", MODEL, "--extend", 4, "--corpus", texts, *FEW, "--out"]
    code, out, err = call(capsys, *same, tmp_path / "whole")
    result = json.loads(out)
    assert code == 0 and f"trained at {TRAINED} tokens, stretched by 4: " in err
    assert (result["steps"], result["tokens"]) == (2, 128) and result["bits_per_byte"] > 0
    before, after = checkpoint.load(MODEL), checkpoint.load(tmp_path / "whole" / "model")
    assert after.config == stretched_config(CONFIG, 4)
    assert after.config.max_positions == 4 * TRAINED == CONFIG.max_positions
    for (name, W), old in zip(after.named_parameters(), before.parameters(), strict=True):
        assert W.ndim == 1 or not torch.equal(W, old), name      # some gains stay, in bf16
    tokenizer = (tmp_path / "whole" / "tokenizer.json").read_text()
    assert tokenizer == (MODEL / "tokenizer.json").read_text()
    code, _, err = call(capsys, *same, tmp_path / "whole")
    assert code == 2 and "expected --resume" in err
    code, out, _ = call(capsys, *same, tmp_path / "whole", "--resume", "--steps", 3)
    assert code == 0 and json.loads(out)["steps"] == 3
    call(capsys, *same, tmp_path / "once", "--steps", 3)
    last = [entries(tmp_path / name)[0] for name in ("whole", "once")]
    assert last[0]["language"] == last[1]["language"]     # the first step reads the same model
    code, _, err = call(capsys, *same[:4], 8, *same[5:], tmp_path / "whole", "--resume",
                        "--steps", 4)
    assert code == 2 and "config.max_position_embeddings was" in err


def test_the_tuning_lasts_50_steps_at_a_quarter_of_the_stretched_length_where_nothing_is_said(
    texts, tmp_path, capsys, monkeypatch
):
    seen = []

    def stop(config, recipe, *_):
        seen.append(recipe)
        raise ValueError("enough")

    monkeypatch.setattr(jobs, "set_up", stop)
    code, _, _ = call(capsys, "train", "--from", MODEL, "--extend", 8, "--corpus", texts,
                      "--lr", 2e-4, "--out", tmp_path)
    assert code == 2
    assert (seen[0].steps, seen[0].sequence) == (50, 2 * TRAINED)
    assert seen[0].lr == seen[0].adamw_lr == 2e-4


@pytest.mark.parametrize("options, said", [
    (["--extend", "4"], "--from: None, --extend: 4.0, expected both"),
    (["--from", MODEL], "--extend: None, expected both"),
    (["--from", "nowhere", "--extend", "4"], "--from: 'nowhere' is no folder"),
    (["--from", "", "--extend", "4"], "--from: '', expected a name or a path"),
    (["--from", MODEL, "--extend", "0.5"], "factor: 0.5, expected a number >= 1"),
    (["--from", MODEL, "--extend", "nan"], "factor: nan, expected a number >= 1"),
    (["--from", MODEL, "--extend", "2", "--sequence", 2 * CONFIG.max_positions + 1],
     f"sequence: {2 * CONFIG.max_positions + 1}, expected at most the model's max_positions = "),
    (["--from", MODEL, "--extend", "2", "--preset", "small"], "preset: 'small', expected none"),
    (["--from", MODEL, "--extend", "2", "--preset", "needle"], "preset: 'needle', expected none"),
    (["--from", MODEL, "--extend", "2", "--recipe", "v2"], "recipe: 'v2', expected none"),
    (["--preset", "needle", "--recipe", "minutes"], "recipe: 'minutes', expected none with --pres"),
    (["--preset", "needle", "--extend", "2"], "--from: None, --extend: 2.0, expected both"),
    (["--preset", "needle", "--steps", "0"], "steps: 0, expected a number > 0"),
])
def test_what_cannot_be_is_one_line_and_exit_code_2(tmp_path, capsys, options, said):
    code, out, err = call(capsys, "train", *options, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def needle(texts, out, *more):
    return ["train", "--preset", "needle", "--corpus", texts, "--sequence", "192", "--batch", "2",
            "--seed", "3", "--quiet", "--out", str(out), *more]


def test_a_needle_preset_is_saved_with_its_tokenizer_and_yarn(texts, tmp_path, capsys):
    code, out, err = call(capsys, *needle(texts, tmp_path, "--steps", 2, "--evaluate-every", 1))
    result, log = json.loads(out), entries(tmp_path)
    assert code == 0 and err.splitlines()[1].startswith("needle: ")
    assert (result["steps"], result["tokens"]) == (2, 2 * 2 * 192)
    assert result["answer_loss"] == log[-1]["answer"] and result["loss"] == log[-1]["loss"]
    assert result["bits_per_byte"] == log[-1]["bits_per_byte"] > 0
    trained, saved = Config.from_hf(tmp_path), Config.from_hf(tmp_path / "model")
    assert (trained.yarn_factor, trained.max_positions) == (None, 192)
    assert saved == stretched_config(trained, PRESETS["cpu"].factor)
    assert saved.yarn_original_positions == 192
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = (tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8")
    assert text == tokenizer.to_json_for_others() != tokenizer.to_json()
    assert checkpoint.load(tmp_path / "model").config == saved
    code, out, err = call(capsys, *needle(texts, tmp_path, "--steps", 2))
    assert (code, out) == (2, "") and "expected --resume" in err and err.count("\n") == 1
    code, _, _ = call(capsys, "figures", tmp_path)
    assert code == 0 and (tmp_path / "figures" / "loss.png").exists()


def test_a_needle_preset_reads_stories_and_comes_with_its_recipe(tmp_path, capsys, monkeypatch):
    def stop(name):
        raise ValueError(f"of {name}")

    monkeypatch.setattr(train_module, "open_corpus", stop)
    code, _, err = call(capsys, "train", "--preset", "needle", "--out", tmp_path)
    assert code == 2 and "of stories" in err
    assert jobs.job_of("needle", None, None, None, None, {}).recipe == PRESETS["cpu"].recipe
    assert jobs.job_of("needle-gpu", None, None, None, None, {}).recipe == PRESETS["gpu"].recipe


def test_a_needle_run_that_is_killed_goes_on_bit_for_bit(texts, tmp_path):
    """Processes of their own, with one thread each; one is killed without warning."""
    def begin(out, *more):
        command = [sys.executable, "-m", "dsv2_ref",
                   *needle(texts, tmp_path / out, "--steps", "16", "--save-every", "3", *more)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(process):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return json.loads(out)

    killed, log = begin("killed"), tmp_path / "killed" / "log.jsonl"
    until = time.monotonic() + 600
    while killed.poll() is None and time.monotonic() < until:
        if log.exists() and log.read_text().count("\n") >= 5:
            killed.kill()
            break
        time.sleep(0.002)
    killed.communicate()
    assert killed.returncode == -9, "the run was over before it was killed"
    results = [end(begin("whole")), end(begin("killed", "--resume"))]
    for key in ("steps", "tokens", "loss", "answer_loss", "bits_per_byte"):
        assert results[0][key] == results[1][key], key
    folders = [tmp_path / name for name in ("whole", "killed")]
    logs = [entries(folder) for folder in folders]
    assert len(logs[0]) == 16 and logs[0] == logs[1]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]

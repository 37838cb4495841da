# SPDX-License-Identifier: MIT
"""`reward` as it is typed: JSON, files, going on, and bad input."""

import json
import shutil

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import CONFIG_FILE, TEMPLATE
from dsv2_ref.alignment.reward_training import load_reward_model
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.instructions import examples
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.run_folder import load_state

ASKED = examples(40, kinds=("count", "upper"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that knows nothing, and a file of preferences."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([e.prompt[-1]["content"] for e in examples(200)], 300)
    torch.manual_seed(0)
    config = TINY.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    checkpoint.save(DeepSeekV2(config).bfloat16(), folder / "model",
                    {"tokenizer.json": tokenizer.to_json()})
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"messages": list(e.prompt), "chosen": e.answer, "rejected": f"no {i}"}) + "\n"
        for i, e in enumerate(ASKED)))
    return folder


def reward(capsys, base, out, *more, data="pairs.jsonl"):
    return call(capsys, "reward", "--from", base / "model", "--data",
                data if data == "builtin" else base / data, "--out", out, "--quiet", "--batch", "4",
                "--precision", "fp32", *more)


def test_it_writes_a_reward_model_and_goes_on_bit_for_bit(base, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, err = reward(capsys, base, whole, "--save-every", "5")
    assert code == 0, err
    result = json.loads(out)
    assert set(result) == {"steps", "loss", "rows", "held_out_pairs", "before", "after",
                           "last_loss", "out"}
    assert result["rows"] + result["held_out_pairs"] == 40 and result["loss"] == "pair"
    assert result["steps"] == -(-result["rows"] // 4)                    # one epoch
    assert result["before"] == {"pair_accuracy": 0.5, "calibration_error": 0.0,
                                "calibration": [[0.5, 0.5, 2 * result["held_out_pairs"]]]}
    after = result["after"]
    assert after["pair_accuracy"] > 0.8 and 0 < after["calibration_error"] < 0.5
    assert sum(count for *_, count in after["calibration"]) == 2 * result["held_out_pairs"]
    states = [f"state-{n:09}.safetensors" for n in (5, result["steps"])]
    assert {p.name for p in whole.iterdir()} == {
        "log.jsonl", "config.json", "tokenizer.json", "model", "calibration.png", *states}
    saved = load_reward_model(whole / "model")
    assert saved.like.dtype == torch.bfloat16 and saved.head.weight.abs().max() > 0
    assert json.loads((whole / "model" / CONFIG_FILE).read_text())["chat_template"] == TEMPLATE

    shutil.copytree(whole, halves)               # as if it had been killed after its fifth step
    (halves / states[1]).unlink()
    shutil.rmtree(halves / "model")
    code, out, err = reward(capsys, base, halves, "--save-every", "5", "--resume")
    assert code == 0 and json.loads(out) == result | {"out": str(halves)}
    assert "resumed after step 5" in err
    a, b = (load_state(run / states[1])[0] for run in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for name in ("model/model.safetensors", "model/reward_head.json"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes()

    for more, said in (((), "exists, expected --resume"), (("--resume",), "is at its end"),
                       (("--resume", "--loss", "point"), "cannot resume: tokens"),
                       (("--resume", "--batch", "3"), "recipe.batch was 4")):
        code, out, err = reward(capsys, base, whole, *more)
        assert (code, out) == (2, "") and said in err, err


def test_the_generated_set_is_answered_and_judged(base, tmp_path, capsys, monkeypatch):
    """Five questions to train on, six held out, and a judge that remembers what it was asked."""
    from dsv2_ref.commands import reward as command
    told = []

    def judge(asked, answers):
        told.extend(asked)
        return [float(len(answer) % 2) for answer in answers]

    monkeypatch.setattr(command, "_judge", lambda: judge)
    monkeypatch.setattr(command, "HELD_OUT", 6)
    monkeypatch.setattr(command, "GROUP", 3)
    code, out, err = reward(capsys, base, tmp_path / "out", "--steps", "2", "--questions", "5",
                            "--loss", "point", data="builtin")
    result = json.loads(out)
    assert code == 0 and (result["steps"], result["rows"], len(told)) == (2, 5 * 3, 11 * 3)
    assert "3 answers to each of 5 questions, and of 6 held-out ones" in err
    assert sum(count for *_, count in result["after"]["calibration"]) == 6 * 3
    assert {e.key for e in told[:15]}.isdisjoint(e.key for e in told[15:])


def test_without_a_sandbox_code_is_not_run(monkeypatch, capsys):
    from dsv2_ref.alignment.judged import by_compiler, by_truth
    from dsv2_ref.alignment.sandbox import Uncontained
    from dsv2_ref.commands import reward as command

    def none(_):
        raise Uncontained("sandbox: not here")

    monkeypatch.setattr(command, "run_program", none)
    assert command._judge() is by_truth
    assert "sandbox: not here: code is compared" in capsys.readouterr().err
    monkeypatch.setattr(command, "run_program", lambda _: None)
    assert command._judge() is by_compiler and not capsys.readouterr().err


@pytest.mark.parametrize("args, said", [
    (("--from", "nowhere"), "--from: 'nowhere' is no folder, expected a saved model"),
    (("--data", "no.jsonl"), "no.jsonl: cannot be read"),
    (("--data", "bad.jsonl"), "bad.jsonl:1: no field 'messages'"),
    (("--data", "one.jsonl"), "expected some of both; one question of five is held out"),
    (("--questions", "3"), "--questions: 3, expected none with a file"),
    (("--questions", "0", "--data", "builtin"), "n: 0 of 16 kinds, expected at least one"),
    (("--loss", "both"), "invalid choice: 'both'"),
    (("--epochs", "0"), "epochs: 0.0 of"),
    (("--save-every", "-1"), "save_every: -1, expected a number of steps"),
    (("--sequence", "12"), "answers[0]: "),
    (("--resume",), "no state-*, expected a saved state to resume from"),
    (("--out", "taken"), "taken/calibration.png: exists, expected another --out"),
])
def test_bad_input_is_one_line_and_code_2(args, said, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "one.jsonl").write_text((base / "pairs.jsonl").read_text().splitlines()[0] + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "calibration.png").write_text("mine")
    code, out, err = reward(capsys, base, tmp_path / "out", *args)
    assert (code, out) == (2, "") and said in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out" / "model").exists()
    assert (tmp_path / "taken" / "calibration.png").read_text() == "mine"

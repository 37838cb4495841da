# SPDX-License-Identifier: MIT
"""`sft` as it is typed: JSON, files, going on, and bad input."""

import json
import shutil

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import CONFIG_FILE, TEMPLATE
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import conversation_lines
from dsv2_ref.text.instructions import TRAINED_KINDS, examples
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.run_folder import load_state

TALKS = examples(9, kinds=("count", "upper"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that knows nothing, and a file of conversations."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([e.prompt[-1]["content"] for e in examples(200)], 300)
    torch.manual_seed(0)
    config = TINY.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    checkpoint.save(DeepSeekV2(config).bfloat16(), folder / "model",
                    {"tokenizer.json": tokenizer.to_json()})
    (folder / "talks.jsonl").write_text(conversation_lines(e.row() for e in TALKS),
                                        encoding="utf-8")
    return folder


def sft(capsys, base, out, *more, data="talks.jsonl"):
    return call(capsys, "sft", "--from", base / "model", "--data",
                data if data == "builtin" else base / data, "--out", out, "--quiet", "--batch", "4",
                "--precision", "fp32", *more)


def test_it_writes_a_chat_model_and_goes_on_bit_for_bit(base, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, err = sft(capsys, base, whole, "--save-every", "3")
    result = json.loads(out)
    assert code == 0 and (result["steps"], result["conversations"]) == (5, 9)    # two epochs
    assert set(result) == {"steps", "conversations", "answer_loss", "out"} and "9 conversa" in err
    assert {p.name for p in whole.iterdir()} == {
        "log.jsonl", "config.json", "tokenizer.json", "model", "state-000000003.safetensors",
        "state-000000005.safetensors"}
    assert json.loads((whole / "model" / CONFIG_FILE).read_text())["chat_template"] == TEMPLATE
    assert checkpoint.load(whole / "model").like.dtype == torch.bfloat16
    last = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert last["answer"] == result["answer_loss"] and last["expert"] > 0

    shutil.copytree(whole, halves)               # as if it had been killed in its fourth step
    (halves / "state-000000005.safetensors").unlink()
    shutil.rmtree(halves / "model")
    code, out, err = sft(capsys, base, halves, "--save-every", "3", "--resume")
    assert code == 0 and json.loads(out) == result | {"out": str(halves)}
    assert "resumed after step 3" in err
    for name in ("state-000000005.safetensors", "model/model.safetensors"):
        if name.startswith("state"):
            a, b = (load_state(run / name)[0] for run in (whole, halves))
            assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
        else:
            assert (whole / name).read_bytes() == (halves / name).read_bytes()

    for more, said in (((), "exists, expected --resume"), (("--resume",), "is at its end"),
                       (("--resume", "--batch", "3"), "recipe.batch was 4, expected 3")):
        code, out, err = sft(capsys, base, whole, *more)
        assert (code, out) == (2, "") and said in err
    (base / "other.jsonl").write_text(conversation_lines(e.row() for e in TALKS[::-1]))
    code, _, err = sft(capsys, base, halves, "--resume", data="other.jsonl")
    assert code == 2 and "cannot resume" in err


def test_the_generated_set_is_asked_before_and_after(base, tmp_path, capsys):
    code, out, _ = sft(capsys, base, tmp_path / "out", "--steps", "1", "--examples", "20",
                       data="builtin")
    result = json.loads(out)
    assert code == 0 and result["conversations"] == 20
    for when in ("before", "after"):
        assert set(result[when]) == set(TRAINED_KINDS)
        assert all(0 <= share <= 1 for share in result[when].values())


@pytest.mark.parametrize("args, said", [
    (("--from", "nowhere"), "--from: 'nowhere' is no folder, expected a saved model"),
    (("--data", "no.jsonl"), "no.jsonl: cannot be read"),
    (("--data", "bad.jsonl"), "bad.jsonl:1: no field 'messages'"),
    (("--examples", "3"), "--examples: 3, expected none with a file"),
    (("--examples", "0", "--data", "builtin"), "n: 0 of 16 kinds, expected at least one"),
    (("--epochs", "0"), "epochs: 0.0 of 9 conversations, expected more than 0"),
    (("--batch", "0"), "batch: 0, expected a number > 0"),
    (("--save-every", "-1"), "save_every: -1, expected a number of steps"),
    (("--sequence", "12"), "conversations[0]: "),
    (("--resume",), "no state-*, expected a saved state to resume from"),
    (("--epochs", "1", "--steps", "3"), "not allowed with argument"),
])
def test_bad_input_is_one_line_and_code_2(args, said, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    code, out, err = sft(capsys, base, tmp_path / "out", *args)
    assert (code, out) == (2, "") and said in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out" / "model").exists()

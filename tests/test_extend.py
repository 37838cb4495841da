# SPDX-License-Identifier: MIT
"""`train --from FOLDER --extend S`: what it makes of a saved model, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref.__main__ import main
from dsv2_ref.config import Config

MODEL, NEEDLE = (Path(__file__).parents[1] / "data" / name for name in ("model", "needle"))
FEW = ("--steps", "2", "--batch", "1", "--sequence", "64", "--quiet")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"m{i}.txt").write_text(f"Lily had {i} red kites and one old drum. " * 40)
    return str(folder)


def call(capsys, *args):
    """(exit code, stdout, stderr) of a command."""
    capsys.readouterr()
    try:
        code = main(["train", *(str(a) for a in args)])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


def test_a_saved_model_is_stretched_tuned_and_saved(texts, tmp_path, capsys):
    code, out, err = call(capsys, "--from", MODEL, "--extend", 4, "--corpus", texts, "--out",
                          tmp_path, *FEW)
    result = json.loads(out)
    assert code == 0 and "stretched by 4" in err
    assert (result["steps"], result["tokens"], result["factor"]) == (2, 128, 4)
    assert result["bits_per_byte"] != result["bits_per_byte_before"]
    before, after = checkpoint.load(MODEL), checkpoint.load(tmp_path / "model")
    assert (after.config.yarn_factor, after.config.yarn_original_positions) == (4, 1024)
    assert after.config.yarn_mscale == after.config.yarn_mscale_all_dim == 0.707
    assert after.config.max_positions == 4096
    for (name, W), old in zip(after.named_parameters(), before.parameters(), strict=True):
        assert W.ndim == 1 or not torch.equal(W, old), name      # some gains stay, in bf16
    assert (tmp_path / "tokenizer.json").read_text() == (MODEL / "tokenizer.json").read_text()
    code, _, err = call(capsys, "--from", MODEL, "--extend", 4, "--corpus", texts, "--out",
                        tmp_path, *FEW)
    assert code == 2 and "expected --resume" in err


@pytest.mark.parametrize("options, said", [
    (["--extend", "4"], "--from: None, --extend: 4.0, expected both"),
    (["--from", MODEL], "--extend: None, expected both"),
    (["--from", "nowhere", "--extend", "4"], "--from: 'nowhere' is no folder"),
    (["--from", MODEL, "--extend", "0.5"], "factor: 0.5, expected a number >= 1"),
    (["--from", MODEL, "--extend", "nan"], "factor: nan, expected a number >= 1"),
    (["--from", MODEL, "--extend", "2", "--sequence", "2049"],
     "sequence: 2049, expected at most 2048, what --extend 2 gives"),
])
def test_what_cannot_be_is_one_line_and_exit_code_2(tmp_path, capsys, options, said):
    code, out, err = call(capsys, *options, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_needle_preset_is_saved_with_its_tokenizer_and_yarn(tmp_path, capsys):
    code, out, _ = call(capsys, "--preset", "needle", "--steps", 1, "--seed", 3, "--out", tmp_path)
    result = json.loads(out)
    assert code == 0 and result["steps"] == 1 and result["out"] == str(tmp_path / "model")
    made, committed = (Config.from_hf(folder) for folder in (tmp_path / "model", NEEDLE))
    assert made == committed
    tokenizer = (tmp_path / "model" / "tokenizer.json").read_text()
    assert tokenizer == (NEEDLE / "tokenizer.json").read_text()
    code, out, err = call(capsys, "--preset", "needle", "--steps", 1, "--out", tmp_path)
    assert (code, out) == (2, "") and "model" in err and len(err.strip().splitlines()) == 1

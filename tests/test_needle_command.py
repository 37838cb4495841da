# SPDX-License-Identifier: MIT
"""`needle` on the command line: its table, its JSON, its folder, one clear line for bad input."""

import json
import subprocess
import sys
import time

import calling
import pytest
import torch
from test_needles import TEXTS, TOKENIZER

from dsv2_ref import checkpoint
from dsv2_ref.commands.needle import as_table, numbers
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, trained at 64 tokens as its config says, s = 4."""
    torch.manual_seed(0)
    config = TINY.with_(vocab=TOKENIZER.vocab, n_layers=2, max_positions=256, yarn_factor=4.0,
                        yarn_original_positions=64, yarn_mscale=0.707, yarn_mscale_all_dim=0.707)
    path = tmp_path_factory.mktemp("needle") / "model"
    checkpoint.save(DeepSeekV2(config), path,
                    {"tokenizer.json": TOKENIZER.to_json()})
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A haystack that is read faster than 20,000 stories are made."""
    path = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (path / f"{i}.txt").write_text(TEXTS[i] * 4, encoding="utf-8")
    return str(path)


def call(capsys, *args):
    return calling.call(capsys, "needle", *args, "--quiet")


def test_defaults_are_the_longest_column_at_six_depths(folder, tmp_path, capsys):
    code, out, err = call(capsys, folder, "--samples", 1, "--out", tmp_path, "--json")
    result = json.loads(out)
    assert code == 0 and "trained at 64 tokens, YaRN s = 4" in err
    assert result["lengths"] == [256] and result["depths"] == [0, 20, 40, 60, 80, 100]
    assert [len(row) for row in result["grid"]] == [6] and result["mean"] == 0
    assert (result["factor"], result["trained"], result["cache"]) == (4, 64, "latent")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_factor_one_is_plain_rope_in_the_same_column(folder, texts, tmp_path, capsys):
    code, out, err = call(capsys, folder, "--corpus", texts, "--samples", 1, "--factor", 1,
                          "--depths", 0, "--out", tmp_path, "--json")
    result = json.loads(out)
    assert code == 0 and "plain RoPE" in err
    assert (result["lengths"], result["factor"]) == ([256], 1)


def test_a_larger_factor_has_room_for_more(folder, texts, tmp_path, capsys):
    code, out, _ = call(capsys, folder, "--corpus", texts, "--samples", 1, "--factor", 16,
                        "--depths", 50, "--cache", "six_bit", "--kind", "chain", "--out", tmp_path,
                        "--json")
    result = json.loads(out)
    assert code == 0 and result["lengths"] == [1024]
    assert (result["cache"], result["kind"]) == ("six_bit", "chain")


def test_the_table_has_a_line_a_depth_and_a_column_a_length(folder, texts, tmp_path, capsys):
    code, out, _ = call(capsys, folder, "--corpus", texts, "--samples", 1, "--lengths", "128,256",
                        "--depths", "0", "50", "--out", tmp_path)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[:3] == [["depth", "%", "128", "256"], ["0", "0.00", "0.00"],
                         ["50", "0.00", "0.00"]]
    told = as_table({"lengths": [8, 16], "depths": [0, 50], "grid": [[1, 0.5], [0, 0.25]],
                     "mean": 0.4375, "green": 1, "cells": 4, "figure": "x.png"}).splitlines()
    assert [line.split() for line in told[1:3]] == [["0", "1.00", "0.00"], ["50", "0.50", "0.25"]]
    assert told[3] == "mean 0.438, 1 of 4 cells at 0.95 or above; x.png"


@pytest.mark.parametrize("words, right", [
    (["512"], (512,)), (["512", "1K"], (512, 1024)), (["512,128K"], (512, 131072)),
    (["1,2", "3"], (1, 2, 3)), (None, (7,)), (["0.5K"], (512,))])
def test_lengths_as_they_are_written(words, right):
    assert numbers("lengths", words, (7,)) == right


@pytest.mark.parametrize("options, said", [
    (["--lengths", "512"], "lengths: 512, expected at most max_positions = 256"),
    (["--lengths", "12"], "lengths: 12, expected above"),
    (["--lengths", "many"], "lengths: 'many', expected numbers, as 512 or 128K"),
    (["--lengths", "100.5"], "lengths: [100.5], expected whole numbers of tokens"),
    (["--lengths", "128,,256"], "lengths: '', expected numbers"),
    (["--lengths", "-128"], "lengths: -128, expected at least 1"),
    (["--lengths", "inf"], "lengths: 'inf', expected numbers"),
    (["--depths", "nan"], "depths: 'nan', expected numbers"),
    (["--depths", "101"], "depths: 101, expected per cents from 0 to 100"),
    (["--depths", "deep"], "depths: 'deep', expected numbers"),
    (["--depths", "5", "5"], "depths: [5, 5], expected different numbers"),
    (["--samples", "0"], "samples: 0, expected at least 1"),
    (["--factor", "0.5"], "factor: 0.5, expected a number >= 1"),
    (["--factor", "nan"], "factor: nan, expected a number >= 1"),
    (["--factor", "inf"], "factor: inf, expected a number >= 1"),
    (["--corpus", "/nowhere"], "/nowhere"),
    (["--cache", "per_head"], "invalid choice: 'per_head'"),
    (["--kind", "two"], "invalid choice: 'two'"),
])
def test_wrong_options_are_one_line_and_exit_code_2(folder, tmp_path, capsys, options, said):
    code, out, err = call(capsys, folder, "--out", tmp_path / "out", *options)
    assert (code, out) == (2, "") and said in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_that_is_no_model_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for args, said in (
        (["nowhere"], "model: 'nowhere' is no folder, expected a saved model, as data/needle"),
        ([tmp_path / "empty"], "config.json: no such file"),
        ([folder, "--out", tmp_path / "file"], "cannot be written"),
    ):
        code, out, err = call(capsys, *args)
        assert (code, out) == (2, "") and said in err
        assert len(err.strip().splitlines()) == 1


def test_what_others_wrote_is_not_replaced(folder, texts, tmp_path, capsys):
    same = [folder, "--corpus", texts, "--samples", 1, "--depths", 0, "--out", tmp_path]
    (tmp_path / "grid.png").write_text("thesis")
    (tmp_path / "cells-00000000.jsonl").write_text('{"mine": 1}\n')
    code, out, err = call(capsys, *same)
    assert (code, out) == (2, "") and "grid.png: exists and was not drawn by this" in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells-00000000.jsonl", "grid.png"]
    assert (tmp_path / "grid.png").read_text() == "thesis"
    (tmp_path / "grid.png").unlink()
    for seed in (0, 1):                              # the second grid is drawn over the first
        code, out, _ = call(capsys, *same, "--seed", seed)
        assert code == 0 and out.splitlines()[-1].endswith(f"; {tmp_path / 'grid.png'}")
    assert (tmp_path / "cells-00000000.jsonl").read_text() == '{"mine": 1}\n'


def test_a_run_that_is_killed_goes_on_with_the_same_result(folder, texts, tmp_path, capsys):
    """A process of its own, killed in the middle of the grid."""
    options = [str(folder), "--corpus", texts, "--lengths", "256", "--depths",
               *map(str, range(0, 100, 4)), "--samples", "2", "--json", "--out"]
    _, expected, _ = call(capsys, *options, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-m", "dsv2_ref", "needle", *options,
                                str(tmp_path / "killed"), "--quiet"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    cells = tmp_path / "killed"
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        found = list(cells.glob("*.jsonl"))
        if found and found[0].read_text().count("\n") >= 4:
            process.kill()
            break
        time.sleep(0.005)
    process.communicate()
    (found,) = cells.glob("*.jsonl")
    assert 4 <= found.read_text().count("\n") < 26, "the run was over before it was killed"
    code, out, _ = call(capsys, *options, cells)
    results = [json.loads(text) for text in (expected, out)]
    for result in results:
        result.pop("figure")
    assert code == 0 and results[0] == results[1]

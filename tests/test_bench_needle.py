# SPDX-License-Identifier: MIT
"""The records of long contexts: they are made, and say what they were made with."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_needle import TEXT
from test_needles import TOKENIZER
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.attention.mla import visible_keys
from dsv2_ref.bench import long_context, needle
from dsv2_ref.config import LITE, TINY, Config
from dsv2_ref.inference.needle import Grid, plans, run
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import experts_loop
from dsv2_ref.stretch import trained_positions
from dsv2_ref.training.long_context import PRESETS

FOLDER = Path(__file__).parents[1] / "data" / "needle"


@pytest.fixture(scope="module")
def record():
    return needle.run(quick=True)


@pytest.fixture(scope="module")
def costs():
    return long_context.run(quick=True)


def test_the_needle_record_is_complete(record):
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "needle" and record["quick"] is True and record["torch"]
    (run,) = record["runs"]
    assert set(run["grids"]) == {"plain", "yarn", "tuned", "yarn 16", "six_bit", "several", "chain",
                                 "python"}
    trained = PRESETS["cpu"].recipe.sequence
    assert record["trained_at"] == trained
    assert all(grid["lengths"] == [trained, 2 * trained] for grid in run["grids"].values())
    assert set(needle.LENGTHS) == set(run["grids"])
    assert run["grids"]["chain"]["kind"] == "chain"
    assert run["grids"]["six_bit"]["cache"] == "six_bit"
    assert run["grids"]["several"]["kind"] == "several" and run["tuning_tokens"] == 2 * trained
    assert {name: set(at) for name, at in run["by_factor"].items()} == {
        s: {"yarn", *needle.MISTAKES} for s in ("1.001", "2")}
    assert run["training_cpu_seconds"] > 0 and run["steps"] == 4 and run["tuning_steps"] == 1


def test_the_summary_is_students_interval():
    def run(low, high):
        return {"grids": {"yarn": {"lengths": [128, 256], "grid": [[low, high], [1.0, 1.0]]}}}

    found = needle.summary([run(0.8, 1.0), run(0.6, 0.8), run(0.7, 0.9)])["yarn"]
    assert found["128"]["mean"] == pytest.approx(0.8)          # of 0.9, 0.7, 0.8
    assert (found["128"]["least"], found["128"]["most"]) == pytest.approx((0.7, 0.9))
    assert found["128"]["interval"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert found["256"] == {"mean": 1, "least": 1, "most": 1, "interval": 0}


def test_a_column_is_the_mean_over_its_depths():
    grid = {"lengths": (128, 256), "grid": [[0.0, 1.0], [0.25, 0.75]]}
    assert needle.column(grid, 128) == needle.column(grid, 256) == 0.5


def test_the_record_of_lengths_is_complete(costs):
    assert json.loads(json.dumps(costs)) == costs
    points = costs["points"]
    assert [p["tokens"] for p in points] == [256, 512, 1024, 2048]
    c = Config.from_hf(FOLDER)
    assert costs["trained_at"] == trained_positions(c)
    assert costs["cache_bytes_per_token"] == c.n_layers * (c.d_c + c.d_r) * 4        # fp32
    assert costs["read_bytes_per_token"] == c.n_layers * (2 * c.d_c + c.d_r) * 4     # W_UK, W_UV
    assert costs["slope_gb_per_s"] * costs["decode_slope_ns"] == pytest.approx(1920)
    for p in points:                                                 # memory is linear
        assert p["cache_bytes"] == p["tokens"] * costs["cache_bytes_per_token"]
        assert p["decode_ms"] > 0 and p["peak_bytes"] > p["cache_bytes"]
    assert [p["seconds"] for p in points] == sorted(p["seconds"] for p in points)
    assert [c["depth"] for c in costs["needles"]] == [0, 50, 100]
    assert all(c["exact"] in (0, 1) and c["minutes"] > 0 for c in costs["needles"])
    assert costs["yarn_factor"] * costs["trained_at"] >= 2048


@pytest.mark.parametrize("config", [TINY, TINY.with_(d_cq=None, n_dense=0, n_layers=2), LITE.with_(
    vocab=64, bos=0, eos=1, d=64, n_layers=3, n_h=4, d_h=12, d_r=6, d_v=10, d_c=20, dense_width=40,
    expert_width=16, n_routed=8, top_k=3, max_positions=64)])
@pytest.mark.parametrize("length, piece", [(24, 24), (24, 7), (23, 8)])
def test_multiplications_are_those_of_the_products_of_the_passes(config, length, piece):
    """torch counts the FLOPs of every product: two for a multiply-add."""
    torch.manual_seed(0)
    model = DeepSeekV2(config.with_(yarn_factor=None)).eval()
    cache = model.new_cache(1, length)
    tokens = torch.randint(0, config.vocab, (1, length))

    def expanded(q_c, q_r, c_kv, k_r, W_UK, W_UV, scale, positions=None):
        k_c, v = (torch.einsum("bsc,hdc->bshd", c_kv, W) for W in (W_UK, W_UV))
        scores = torch.einsum("bthd,bshd->bhts", q_c, k_c) + torch.einsum(
            "bthd,bsd->bhts", q_r, k_r)
        mask = visible_keys(q_c.shape[1], k_r.shape[1], positions, k_r.device)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhts,bshd->bthd", (scale * scores).softmax(-1), v)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for begin in range(0, length, piece):
            part = tokens[:, begin : begin + piece]
            run = model.start(part.shape, cache)
            forms = replace(run.forms, attend=expanded, experts=experts_loop)
            model.through(model.embed(part), replace(run, forms=forms))
            cache.advance()
    assert counter.get_total_flops() == 2 * long_context.counted(config, length, piece)


def test_the_slope_is_the_line_through_the_points():
    points = [{"tokens": n, "decode_ms": 3.0 + 2e-3 * n} for n in (100, 500, 4000)]
    assert long_context.slope(points) == pytest.approx(2000)         # nanoseconds per token


def test_cells_on_the_way_are_those_of_the_grid():
    torch.manual_seed(0)
    model = DeepSeekV2(TINY.with_(vocab=TOKENIZER.vocab, max_positions=513)).eval()
    grid = Grid((512,), (0, 40, 100), samples=1)
    _, cells = long_context.read_through(model, TEXT, plans(grid, TOKENIZER, 512), 1)
    expected = run(model, TOKENIZER, TEXT, grid)
    assert [[cell["exact"] for cell in cells]] == expected["grid"]
    assert [[cell["rank"] for cell in cells]] == expected["ranks"]

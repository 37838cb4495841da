# SPDX-License-Identifier: MIT
"""The figures of attention at equal parameters: points, means, the floor, computed titles."""

import json
from pathlib import Path

import numpy as np
import pytest
from drawn import is_whole

from dsv2_ref import figures
from dsv2_ref.bench.harness.power import (
    pooled_deviation,
    seeds_needed,
    smallest_difference,
    threshold,
)

RESULTS = Path(__file__).parents[1] / "data" / "results"
RUNS = [{"setting": kind, "seed": seed, "bits_per_byte": bits + 0.01 * seed, "cached": cached,
         "parameters": parameters}
        for kind, bits, cached, parameters in (("MHA", 0.202, 256, 1000), ("MLA", 0.23, 72, 1010))
        for seed in (0, 1)]


def record():
    return json.loads((RESULTS / "ablations-attention-2026-11-24.json").read_text())


def test_a_point_for_each_seed_a_bar_for_the_mean_and_the_floor():
    ax = figures.attention_study(RUNS, 0.1).axes[0]
    assert np.allclose([line.get_ydata() for line in ax.lines[:4]],
                       [[0.202, 0.212], [0.207] * 2, [0.23, 0.24], [0.235] * 2])
    assert [ax.lines[i].get_color() for i in (0, 2)] == [figures.COLORS["MHA"],
                                                         figures.COLORS["MLA"]]
    assert list(ax.lines[4].get_ydata()) == [0.1, 0.1] and ax.get_ylim()[0] < 0.1
    assert [t.get_text() for t in ax.get_xticklabels()] == ["MHA\n256 cached", "MLA\n72 cached"]
    assert ax.get_title(loc="left") == (
        "0.00M parameters each (±0.50 %): 2.1 to 2.4 times the floor")


def test_the_curve_and_what_was_found():
    ax = figures.seeds_and_differences([2, 3, 10], [0.3, 0.2, 0.05], {"MLA": -0.1}, 3).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), [0.3, 0.2, 0.05])
    assert list(ax.lines[1].get_xydata()[0]) == [3, 0.1] and "-0.1" in ax.lines[1].get_label()
    assert ax.get_title(loc="left") == "3 seeds see 0.200 bits per byte, 10 seeds 0.0500"


def test_what_the_text_says_of_the_committed_record():
    study, floor = record()["studies"]["attention"], record()["floor"]
    runs = study["runs"]
    size = [run["parameters"] for run in runs]
    assert max(size) / min(size) < 1.001
    bits = {row["setting"]: [r["bits_per_byte"] for r in runs if r["setting"] == row["setting"]]
            for row in study["summary"]}
    sigma, freedom = pooled_deviation(bits.values())
    assert round(sigma, 4) == 0.0057 and freedom == 8
    by_chance = sigma * (2 / 3) ** 0.5
    found = {row["setting"]: row["difference"] for row in study["summary"][1:]}
    real = {kind: abs(d) > threshold(freedom) * by_chance for kind, d in found.items()}
    assert real == {"GQA": True, "MQA": False, "MLA": False}
    assert [round(d, 4) for d in found.values()] == [0.0149, 0.0098, 0.0016]
    assert round(threshold(freedom) * by_chance, 4) == 0.0107
    assert round(smallest_difference(sigma, 3, settings=4), 3) == 0.015
    mha = np.mean(bits["MHA"])
    assert [seeds_needed(d, sigma, settings=4) for d in (found["MLA"], 0.01 * mha)] == [202, 96]
    assert 2.1 < min(map(np.mean, bits.values())) / floor < 2.2
    long = json.loads((RESULTS / "stories_floor-2026-11-24.json").read_text())
    assert long["tokens"][-1] == 20 * record()["training"]["tokens"]
    assert round(long["bits_per_byte"][-1] - floor, 3) == 0.012


@pytest.mark.parametrize("draw", [
    lambda: figures.attention_study(RUNS, 0.1),
    lambda: figures.attention_study(record()["studies"]["attention"]["runs"], record()["floor"]),
    lambda: figures.seeds_and_differences([2, 3, 200], [0.02, 0.015, 0.0016],
                                          {"GQA": 0.0149, "MQA": 0.0098, "MLA": 0.0016}, 3),
])
def test_nothing_is_clipped(draw, tmp_path):
    figure = draw()
    assert figures.save(figure, tmp_path / "study.png").stat().st_size > 5000
    assert is_whole(figure)


@pytest.mark.parametrize("call, told", [
    (lambda: figures.attention_study(RUNS[:-1], 0.1), r"runs: \[2, 1\] of each kind"),
    (lambda: figures.attention_study([RUNS[0], RUNS[0]], 0.1), "each seed once"),
    (lambda: figures.seeds_and_differences([2, 3], [0.1], {}, 3), "with 1 differences"),
    (lambda: figures.seeds_and_differences([2, 3], [0.2, 0.1], {}, 4), "and 4 among"),
])
def test_bad_input_is_refused_in_one_line(call, told):
    with pytest.raises(ValueError, match=told):
        call()

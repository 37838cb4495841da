# SPDX-License-Identifier: MIT
"""The figure of the studies: changes seed by seed, their bars, and a title that counts them."""

import json
from pathlib import Path

import numpy as np
import pytest
from drawn import is_whole

from dsv2_ref import figures

RESULTS = Path(__file__).parents[1] / "data" / "results"


def runs(**changes):
    """Settings and their change against "base" in per cent, one number a seed."""
    table = {"base": [0.0] * 3} | changes
    seeds = np.array([0.2, 0.3, 0.25])        # each seed has a level of its own
    return [{"setting": kind, "seed": seed, "bits_per_byte": seeds[seed] * (1 + change / 100)}
            for kind, values in table.items() for seed, change in enumerate(values)]


STUDIES = {"attention": runs(GQA=[3.0, 4.0, 5.0], MLA=[1.0, -1.0, 0.5]),
           "experts": runs(finer=[-2.0, -2.5, -3.0]), "balance": runs(none=[1.0, 4.0, 1.5])}


def test_each_seed_is_compared_with_itself_and_bars_are_one_deviation():
    ax = figures.study_changes(STUDIES).axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert np.allclose(dots[0].get_ydata(), [3, 4, 5])
    assert np.allclose(dots[1].get_ydata(), [1, -1, 0.5])
    assert [d.get_color() for d in dots] == [figures.COLORS["GQA"], figures.COLORS["MLA"]]
    bars = [c.get_segments()[0][:, 1] for c in ax.collections]
    for values, bar in zip(([3, 4, 5], [1, -1, 0.5]), bars, strict=True):
        assert np.allclose(bar, np.mean(values) + np.std(values, ddof=1) * np.array([-1, 1]))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["GQA", "MLA"]
    assert ax.get_xlabel() == "attention" and ax.get_ylabel() == "bits per byte against\nbase (%)"


def test_the_title_counts_what_stands_out_from_the_seeds():
    def title(studies):
        return figures.study_changes(studies).axes[0].get_title(loc="left")

    assert title(STUDIES).startswith("2 of 4 changes exceed two deviations")
    assert title({"balance": STUDIES["balance"]}).startswith("0 of 1")
    assert title({"experts": STUDIES["experts"]}).startswith("1 of 1 changes exceeds two")
    one_seed = {"one": [run for run in STUDIES["experts"] if run["seed"] == 0]}
    assert title(one_seed).startswith("0 of 1")                  # nothing to tell chance by


def test_the_committed_records_are_one_figure():
    names = ("attention", "experts", "balance", "dropping")
    records = [json.loads((RESULTS / f"ablations-{n}-2026-11-24.json").read_text()) for n in names]
    assert len({json.dumps(r["training"]) for r in records}) == 1         # all trained alike
    studies = {n: r["studies"][n]["runs"] for n, r in zip(names, records, strict=True)}
    assert all(len({run["seed"] for run in runs}) == 3 for runs in studies.values())
    axes = figures.study_changes(studies).axes
    assert [ax.get_xlabel() for ax in axes] == list(names)
    assert " of 9 changes " in axes[0].get_title(loc="left")


BALANCE = [{"setting": kind, "seed": seed, "dead": dead, "fullest": fullest, "bits_per_byte": bits}
           for kind, seed, dead, fullest, bits in (
               ("all three", 0, 0.0, 1.5, 0.20), ("none", 0, 0.25, 4.0, 0.21),
               ("all three", 1, 0.0, 1.75, 0.30), ("none", 1, 0.125, 3.5, 0.294))]


def test_balance_is_shown_run_by_run_from_none_to_all(tmp_path):
    figure = figures.balance_cost(BALANCE)
    dead, fullest, bits = figure.axes
    assert np.allclose([line.get_ydata() for line in dead.lines], [[25, 0], [12.5, 0]])
    assert np.allclose([line.get_ydata() for line in fullest.lines], [[4, 1.5], [3.5, 1.75]])
    assert np.allclose([line.get_ydata() for line in bits.lines], [[0.21, 0.2], [0.294, 0.3]])
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "Dead: up to 25 % → 0 %", "Fullest: up to 4.0 → 1.8", "Cost: -4.8 to +2.0 % bits"]
    assert all([t.get_text() for t in ax.get_xticklabels()] == ["none", "all three"]
               and ax.get_xlabel() == "balance losses in training" for ax in figure.axes)
    assert figures.save(figure, tmp_path / "balance.png").stat().st_size > 5000
    assert is_whole(figure)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_nothing_is_clipped_and_no_empty_axes_are_left(n, tmp_path):
    chosen = dict(list((STUDIES | {"dropping": STUDIES["experts"]}).items())[:n])
    figure = figures.study_changes(chosen)
    assert len(figure.axes) == n
    assert figures.save(figure, tmp_path / "studies.png").stat().st_size > 5000
    assert is_whole(figure)


@pytest.mark.parametrize(("studies", "message"), [
    ({}, "studies: empty"),
    ({"a": runs()}, "a: 3 runs of 1 settings and 3 seeds, expected two settings"),
    ({"a": STUDIES["experts"][:-1]}, "a: 5 runs of 2 settings and 3 seeds, expected"),
])
def test_bad_input_is_refused_in_one_line(studies, message):
    with pytest.raises(ValueError, match=message):
        figures.study_changes(studies)


def test_each_seed_needs_each_balance():
    with pytest.raises(ValueError, match="balance: 3 runs of 2 settings and 2 seeds"):
        figures.balance_cost(BALANCE[1:])

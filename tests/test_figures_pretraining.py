# SPDX-License-Identifier: MIT
"""Figures of how pretraining works: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures

LOG = [{"step": i + 1, "language": 5 - i / 10} for i in range(20)]
LOG[0] |= {"expert_load": [[9, 9, 9], [1, 1, 1]]}
LOG[10] |= {"expert_load": [[9, 9, 9], [6, 2, 1]]}
SIZES = np.logspace(-6, 0, 50)
PARTS = {"plain": {"weights": 60e9, "gradients": 60e9, "moments": 120e9},
         "small": {"weights": 30e9, "gradients": 30e9, "moments": 30e9}}
DRAW = {
    "schedule_curves": lambda: figures.schedule_curves(
        [0, 0.5, 1], {"V2": [0, 1, 0.1], "ours": torch.tensor([0, 1, 0.02])}),
    "live_picture": lambda: figures.live_picture(LOG, 40),
    "live_picture, one entry": lambda: figures.live_picture(LOG[:1], 40),
    "rounding_paths": lambda: figures.rounding_paths(
        {"exact": [1.0, 1.1, 1.2], "nearest": [1.0, 1.0, 1.0]}),
    "rounding_paths, three long ones": lambda: figures.rounding_paths(
        {"fp32": [1, 1.2] * 999, "nearest": [1, 1.0], "stochastic": [1, 1.25] * 999}),
    "code_steps": lambda: figures.code_steps(
        SIZES, {"linear": np.where(SIZES < 1e-3, 0, SIZES), "logarithmic": SIZES}),
    "memory_bars": lambda: figures.memory_bars(PARTS, 141e9),
    "memory_bars, none fits": lambda: figures.memory_bars(PARTS, 80e9),
    "memory_bars, no limit": lambda: figures.memory_bars({"a": {"kept": 3e6}}, unit="MB"),
}
TITLES = {
    "schedule_curves": ["Rates end at: V2 10 %, ours 2 %"],
    "live_picture": ["Step 20 of 40: 3.10 nats per token", "Fullest expert: 2.0 times its share"],
    "rounding_paths": ["2 updates: exact +0.200, nearest +0.000"],
    "code_steps": ["Become 0: linear 50 %, logarithmic 0 % of these sizes"],
    "memory_bars": ["In 141 GB fits: small"],
    "memory_bars, none fits": ["In 80 GB fit 0 of these 2"],
    "memory_bars, no limit": ["From 3 to 3 MB"],
}
LABELS = {
    "schedule_curves": [("done (% of the run)", "rate (peak = 1)")],
    "live_picture": [("step", "training loss (nats per token)"),
                     ("routed expert of the last layer", "load (fair share = 1)")],
    "rounding_paths": [("update", "weight")],
    "code_steps": [("size (largest of the block = 1)", "size after coding")],
    "memory_bars": [("memory (GB)", "")],
    "memory_bars, no limit": [("memory (MB)", "")],
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    figures.save(figure, tmp_path / "figure.png")
    assert is_whole(figure)


@pytest.mark.parametrize("name", TITLES)
def test_titles_are_computed(name):
    assert [ax.get_title(loc="left") for ax in DRAW[name]().axes] == TITLES[name]


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_in_which_unit(name):
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in DRAW[name]().axes] == LABELS[name]


def test_lines_are_what_was_given():
    lines = DRAW["schedule_curves"]().axes[0].lines
    assert list(lines[0].get_xdata()) == [0, 50, 100]
    assert list(lines[1].get_ydata()) == pytest.approx([0, 1, 0.02])
    lines = DRAW["rounding_paths"]().axes[0].lines
    assert list(lines[0].get_ydata()) == [1.0, 1.1, 1.2] and list(lines[1].get_ydata()) == [1] * 3
    linear, log = DRAW["code_steps"]().axes[0].lines[:2]
    assert np.array_equal(log.get_ydata(), SIZES)
    assert linear.get_ydata()[0] == pytest.approx(1e-6 / 3) and linear.get_ydata()[-1] == 1


def test_the_live_picture_shows_the_last_load_of_the_last_layer():
    left, right = DRAW["live_picture"]().axes
    assert [bar.get_height() for bar in right.patches] == pytest.approx([2, 2 / 3, 1 / 3])
    assert len(left.lines[0].get_xdata()) == 20 and left.get_xlim() == (0, 40)


def test_bars_stack_to_their_totals_beside_the_limit():
    ax = DRAW["memory_bars"]().axes[0]
    assert [(b.get_x(), b.get_width()) for b in ax.patches] == [
        (0, 60), (0, 30), (60, 60), (30, 30), (120, 120), (60, 30)]
    assert [t.get_text() for t in ax.texts] == ["240", "90"]
    assert ax.lines[0].get_xdata()[0] == 141
    assert not DRAW["memory_bars, no limit"]().axes[0].lines


def test_bad_input_is_refused_in_one_line():
    refused(lambda: figures.schedule_curves([0, 1], {"a": [1]}), "shares: [1] values", "2 each")
    refused(lambda: figures.live_picture([{"step": 1}], 3), "no entry has 'expert_load'")
    refused(lambda: figures.rounding_paths({"a": [1.0]}), "two values")
    refused(lambda: figures.code_steps([0.0], {"a": [1.0]}), "positive sizes")
    refused(lambda: figures.memory_bars({}), "one at least")
    refused(lambda: figures.memory_bars({"a": {"x": 1}, "b": {"y": 1}}), "the same parts")
    refused(lambda: figures.memory_bars(PARTS, unit="GiB"), "unit: 'GiB'")

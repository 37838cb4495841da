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
STEP = {"slow": {"bytes": 1.0, "products": 2.0}, "fast": {"bytes": 0.5, "products": 1.5}}
ROW = [0, 5, 6, 7, 1, 0, 8, 1, 0, 9, 1]               # three documents
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
    "packed_windows": lambda: figures.packed_windows(ROW, [6, 2], 4, begin=0),
    "optimizer_paths": lambda: figures.optimizer_paths(
        torch.tensor([1.0, -300]), [1, 0.5], [1, 2], [1.25, -0.5]),
    "memory_bars, counted": lambda: figures.memory_bars(PARTS, counted={"plain": 230e9,
                                                                        "small": 91e9}),
    "step_seconds": lambda: figures.step_seconds(STEP, 6000),
    "step_seconds, measured": lambda: figures.step_seconds(STEP, 6000, {"a run": 4.0}),
    "memory_over_step": lambda: figures.memory_over_step([1e6, 3e6, 2e6], 2.5e6, 1e6),
}
TITLES = {
    "schedule_curves": ["Rates end at: V2 10 %, ours 2 %"],
    "live_picture": ["Step 20 of 40: 3.10 nats per token", "Fullest expert: 2.0 times its share"],
    "rounding_paths": ["2 updates: exact +0.200, nearest +0.000"],
    "code_steps": ["Become 0: linear 50 %, logarithmic 0 % of these sizes"],
    "memory_bars": ["In 141 GB fits: small"],
    "memory_bars, none fits": ["In 80 GB fit 0 of these 2"],
    "memory_bars, no limit": ["From 3 to 3 MB"],
    "packed_windows": ["3 documents, 2 windows, 2 with more than one document", ""],
    "optimizer_paths": ["Gradients of up to 300", "Steps of up to 1.2 rates"],
    "step_seconds": ["Expected: 2.0K to 3.0K tokens/s; nothing was measured yet"],
    "step_seconds, measured": ["Expected: 2.0K to 3.0K tokens/s"],
    "memory_over_step": ["Peak: 3 MB measured, 2.5 MB planned"],
}
LABELS = {
    "schedule_curves": [("done (% of the run)", "rate (peak = 1)")],
    "live_picture": [("step", "training loss (nats per token)"),
                     ("routed expert of the last layer", "load (fair share = 1)")],
    "rounding_paths": [("update", "weight")],
    "code_steps": [("size (largest of the block = 1)", "size after coding")],
    "memory_bars": [("memory (GB)", "")],
    "memory_bars, no limit": [("memory (MB)", "")],
    "optimizer_paths": [("step", "size"), ("step", "step (rate = 1)")],
    "step_seconds": [("a step of 6,000 tokens (seconds)", "")],
    "memory_over_step": [("allocations of the step, in order", "memory in use (MB)")],
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
    assert list(DRAW["memory_bars, counted"]().axes[0].lines[0].get_xdata()) == [230, 91]


def test_a_measured_step_stands_below_those_that_are_expected():
    ax = DRAW["step_seconds, measured"]().axes[0]
    assert [(b.get_x(), b.get_width()) for b in ax.patches] == [
        (0, 1), (0, 0.5), (1, 2), (0.5, 1.5), (0, 4)]
    assert [t.get_text() for t in ax.texts] == ["3", "2", "4"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["slow", "fast", "a run"]


def test_windows_have_the_colours_of_their_documents():
    above, below = DRAW["packed_windows"]().axes
    colors = [bar.get_facecolor() for bar in above.patches]
    assert len(set(colors)) == 3 and [colors.index(color) for color in colors] == [
        0, 0, 0, 0, 0, 5, 5, 5, 8, 8, 8]
    assert [bar.get_facecolor() for bar in below.patches] == colors[6:10] + colors[2:6]
    assert [line.get_xdata()[0] for line in above.lines] == [2, 6, 10]
    assert [text.get_text() for text in below.get_yticklabels()] == ["window 1", "window 2"]


def test_paths_are_sizes_and_memory_is_in_megabytes():
    left, right = DRAW["optimizer_paths"]().axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1, 300], [1, 0.5], [1, 2]]
    assert list(right.lines[0].get_ydata()) == [1.25, 0.5]
    ax = DRAW["memory_over_step"]().axes[0]
    assert [line.get_ydata()[0] for line in ax.lines] == [2.5, 1]
    assert ax.collections[0].get_datalim(ax.transData).y1 == 3


def test_bad_input_is_refused_in_one_line():
    refused(lambda: figures.schedule_curves([0, 1], {"a": [1]}), "shares: [1] values", "2 each")
    refused(lambda: figures.live_picture([{"step": 1}], 3), "no entry has 'expert_load'")
    refused(lambda: figures.rounding_paths({"a": [1.0]}), "two values")
    refused(lambda: figures.code_steps([0.0], {"a": [1.0]}), "positive sizes")
    refused(lambda: figures.memory_bars({}), "one at least")
    refused(lambda: figures.memory_bars({"a": {"x": 1}, "b": {"y": 1}}), "the same parts")
    refused(lambda: figures.memory_bars(PARTS, unit="GiB"), "unit: 'GiB'")
    refused(lambda: figures.packed_windows([0, 1], [1], 2, 0), "windows of 2 within 2 tokens")
    refused(lambda: figures.optimizer_paths([1], [1], [], [1]), "root_v: 0", "as many of each")
    refused(lambda: figures.memory_over_step([], 1, 1), "in_use: 0 values")
    refused(lambda: figures.step_seconds({"a": {"x": 1}, "b": {"y": 1}}, 1), "the same parts")

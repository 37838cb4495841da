# SPDX-License-Identifier: MIT
"""Figures of balance, collapse and dropping: labelled, not clipped, titles computed from data."""

import io

import numpy as np
import pytest
import torch
from drawn import is_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dsv2_ref import figures

RANDOM = np.random.default_rng(0)
EVEN = RANDOM.integers(40, 60, (40, 2, 8))
DEAD = EVEN.copy()
DEAD[20:, 0, 4:] = 0                      # four experts of one layer
DEAD[30:, 1, :2] = 1, 8                   # and of the other one nearly, one not quite
LOADS = {"Losses off": DEAD, "Losses on": EVEN}
P = np.array([0.3, 0.2, 0.25, 0.25])
AFTER = {"expert": [0.25, 0.25, 0.24, 0.26], "device": P, "communication": [0.2, 0.1, 0.3, 0.4]}
COUNTS = {"expert": [1.5, 0.5, 1.25, 0.75], "device": [1, 1], "communication": [1.5, 0.5]}
INDICES = torch.tensor([[0, 1], [0, 2], [0, 1]])
AFFINITY = torch.tensor([[0.6, 0.3], [0.5, 0.2], [0.4, 0.1]])
KEEP = torch.tensor([[True, False], [True, True], [True, False]])
CAPACITY = [0.5, 1.0, 1.5]
BITS = [0.42, 0.2, 0.16, 0.15]
DRAW = {
    "loss_arrows": lambda: figures.loss_arrows(P, AFTER, COUNTS, 2),
    "load_over_training": lambda: figures.load_over_training(LOADS, 4, 1),
    "load_over_training, one": lambda: figures.load_over_training({"run": EVEN[:1, :1]}),
    "slots_by_device": lambda: figures.slots_by_device(INDICES, AFFINITY, KEEP, 4, 2, 3),
    "slots_by_device, protected": lambda: figures.slots_by_device(
        INDICES, AFFINITY, KEEP, 4, 2, 3, torch.tensor([False, False, True])),
    "dropped_against_capacity": lambda: figures.dropped_against_capacity(
        CAPACITY, {"even": [0.5, 0.02, 0.0], "skewed": [0.6, 0.31, 0.12]}),
    "dropped_over_training": lambda: figures.dropped_over_training(
        {"off": np.linspace(0.1, 0.4, 20), "on": np.linspace(0.3, 0.02, 20)}),
    "loss_floor": lambda: figures.loss_floor([1e6, 2e6, 3e6, 4e6], BITS, 0.105),
}
LABELS = {
    "loss_arrows": [("routed expert", "mean affinity (numbers on top: f)"),
                    ("routed expert", ""), ("routed expert", "")],
    "load_over_training": [("", "expert, layer 1"), ("", ""), ("training step", "expert, layer 2"),
                           ("training step", ""), ("", "load (fair share = 1)")],
    "slots_by_device": [("slot, by rank", "affinity of the slot"), ("slot, by rank", "")],
    "dropped_against_capacity": [("capacity factor (1 = average load)", "slots dropped (%)")],
    "dropped_over_training": [("training step", "slots dropped (%)")],
    "loss_floor": [("tokens read (millions)", "held-out stories (bits per byte)"),
                   ("tokens read (millions)", "above the floor (bits per byte)")],
}
TITLES = {
    "loss_arrows": ["Expert loss lowers 0, 2", "Device loss lowers none",
                    "Communication loss lowers 0, 1"],
    "load_over_training": ["Losses off: 5 of 16 experts end idle",
                           "Losses on: 0 of 16 experts end idle", "", "", ""],
    "slots_by_device": ["Device 0 drops 2 of 5 slots", "Device 1 drops none of 1 slots"],
    "dropped_against_capacity": ["Dropped at capacity 1: even 2 %, skewed 31 %"],
    "dropped_over_training": ["Dropped at the end: off 39 %, on 3 %"],
    "loss_floor": ["0.150 bits per byte, the floor is 0.105",
                   "The gap: 0.045 bits, 43 % of the floor"],
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure)


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_titles_are_computed(name):
    axes = DRAW[name]().axes
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == LABELS[name]
    assert [ax.get_title(loc="left") for ax in axes] == TITLES[name]


@pytest.mark.parametrize("name", ["loss_arrows", "slots_by_device", "dropped_over_training"])
def test_titles_do_not_run_into_each_other(name):
    figure = DRAW[name]()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [ax._left_title.get_window_extent(renderer) for ax in figure.axes]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    assert boxes[-1].x1 < figure.bbox.x1


def test_arrows_lead_from_before_to_after():
    axes = DRAW["loss_arrows"]().axes
    arrows = [[(a.xyann, a.xy) for a in ax.texts if hasattr(a, "xyann")] for ax in axes]
    assert [len(a) for a in arrows] == [4, 0, 4]
    assert arrows[0] == [((i, P[i]), (i, pytest.approx(AFTER["expert"][i]))) for i in range(4)]
    numbers = [[t.get_text() for t in ax.texts if t.get_text()] for ax in axes]
    assert numbers == [["1.5", "0.5", "1.25", "0.75"], ["1", "1"], ["1.5", "0.5"]]
    assert [line.get_xdata()[0] for line in axes[0].lines] == [1.5]         # device border


def test_heat_map_shows_shares_over_steps():
    axes = DRAW["load_over_training"]().axes
    shown = axes[0].images[0].get_array()
    assert shown.shape == (8, 40)                                           # experts × steps
    assert np.allclose(shown, (DEAD / DEAD.mean(-1, keepdims=True))[:, 0].T)
    second = (DEAD / DEAD.mean(-1, keepdims=True))[:, 1].T
    assert np.allclose(axes[2].images[0].get_array(), second)
    assert [line.get_ydata()[0] for line in axes[0].lines] == [1.5, 3.5, 5.5]
    assert tuple(axes[0].images[0].get_extent()) == (0.5, 40.5, 7.5, -0.5)


def test_the_colour_bar_reaches_the_fullest_expert():
    axes = figures.load_over_training({"run": DEAD}, 4).axes
    fullest = (DEAD / DEAD.mean(-1, keepdims=True)).max()
    norm = axes[0].images[0].norm
    assert fullest > 2 and norm.vmax == axes[1].images[0].norm.vmax == pytest.approx(fullest)
    assert (norm.vmin, norm.vcenter) == (0, 1) and axes[-1].get_ylim() == (0, norm.vmax)
    even = figures.load_over_training({"run": EVEN}, 4).axes[-1]
    assert even.get_ylim() == (0, 2)
    one_full = figures.expert_load([[0, 0, 0, 8]], 2).axes
    assert one_full[0].images[0].norm.vmax == 4


def test_idle_counts_the_last_tenth_of_the_steps():
    recovered = DEAD.copy()
    recovered[-4:] = 50
    told = figures.load_over_training({"run": recovered}, 4).axes[0].get_title(loc="left")
    assert told == "run: 0 of 16 experts end idle"


def test_animation_is_a_small_gif_whose_bars_move():
    data = figures.load_animation(LOADS, 4, 1, frames=10)
    film = Image.open(io.BytesIO(data))
    assert film.format == "GIF" and film.n_frames == 10 and len(data) < 150_000
    first = np.asarray(film.convert("RGB"), int)
    film.seek(9)
    last = np.asarray(film.convert("RGB"), int)
    assert film.info["duration"] == 2000
    moved = np.abs(first - last).sum(-1) > 60
    half = moved.shape[1] // 2
    assert moved[20:, :half].sum() > 3 * moved[20:, half:].sum() > 0      # below the titles
    assert figures.load_animation(LOADS, 4, 1, frames=10) == data


def test_slots_stand_by_rank_and_dropped_ones_are_hollow():
    first, second = DRAW["slots_by_device"]().axes
    assert [bar.get_height() for bar in first.patches] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.1])
    assert [bar.get_fill() for bar in first.patches] == [True] * 3 + [False] * 2
    assert [t.get_text() for t in first.texts] == ["t0", "t1", "t2", "t0", "t2", "budget: 3 slots"]
    assert [t.get_text() for t in first.get_xticklabels()] == ["e0", "e0", "e0", "e1", "e1"]
    assert [t.get_text() for t in second.texts] == ["t1", "budget: 3 slots"]
    protected = DRAW["slots_by_device, protected"]().axes[0]
    assert [t.get_text() for t in protected.texts][:5] == ["t2", "t2", "t0", "t1", "t0"]
    assert len({bar.get_edgecolor() for bar in protected.patches[:2]}) == 1
    assert protected.patches[0].get_edgecolor() != protected.patches[2].get_edgecolor()


def test_floor_is_drawn_and_the_gap_is_what_lies_above_it():
    left, right = DRAW["loss_floor"]().axes
    assert list(left.lines[1].get_ydata()) == [0.105, 0.105]
    assert right.get_yscale() == right.get_xscale() == "log"
    assert np.allclose(right.lines[0].get_ydata(), np.array(BITS) - 0.105)


@pytest.mark.parametrize("call, message", [
    (lambda: figures.loss_arrows(P, AFTER, COUNTS, 3), r"before: shape \(4,\) on 3 devices"),
    (lambda: figures.loss_arrows(P, AFTER, {"expert": [1] * 4}, 2), "counts: of expert, expected"),
    (lambda: figures.load_over_training(LOADS, 3), "'Losses off' has shape .* on 3 devices"),
    (lambda: figures.load_over_training({"a": EVEN, "b": EVEN[:5]}), "runs of different sizes"),
    (lambda: figures.load_animation({}), "expected at least one"),
    (lambda: figures.slots_by_device(INDICES, AFFINITY, KEEP[:2], 4, 2, 3), "keep: shapes"),
    (lambda: figures.dropped_against_capacity([0.5, 2.0], {"a": [1, 2]}), "1.0 among them"),
    (lambda: figures.dropped_against_capacity([0.5, 1.0], {"a": [1]}), "a value a capacity"),
    (lambda: figures.dropped_over_training({"a": []}), "expected at least one"),
    (lambda: figures.loss_floor([1e6], [0.1], 0.105), "all above a positive floor"),
    (lambda: figures.loss_floor([1e6], [0.1, 0.2], 0.05), "2 values for 1"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()

# SPDX-License-Identifier: MIT
"""Figures of scores: nothing clipped, titles, bars and dots from the data."""

import numpy as np
import pytest
from drawn import is_whole
from matplotlib.colors import to_hex
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.figures.evaluation import PICKED, RIGHT

CHOICES = [" red", " yellow", " blue"]
WAYS = {"log p": [-3.0, -4.0, -2.0], "log p per byte": [-0.75, -0.57, -0.4]}
DRAW = {
    "choice_bars": lambda: figures.choice_bars(CHOICES, WAYS, 0),
    "tokens_and_bytes": lambda: figures.tokens_and_bytes(["a", "b"], [0.5, 2.0], [0.1, 0.1]),
    "tokens_and_bytes, apart": lambda: figures.tokens_and_bytes(["a", "b"], [1, 2], [0.3, 0.1]),
    "pass_curves": lambda: figures.pass_curves(
        [1, 2, 3], [0.3, 0.51, 0.66], {"unbiased": [0.3, 0.51, 0.66], "plug-in": [0.3, 0.45, 0.6]}),
    "seen_and_unseen": lambda: figures.seen_and_unseen(
        [-2.0, -2.5, -3.0], [-0.1, -0.4, -3.2], [True, True, False]),
}


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure) and figure.axes[0].get_title(loc="left")


def test_each_way_fills_its_choice_and_frames_the_right_one():
    axes = DRAW["choice_bars"]().axes
    assert [ax.get_title(loc="left") for ax in axes] == ["→ blue", "→ blue"]
    for ax, row in zip(axes, WAYS.values(), strict=True):
        assert [bar.get_width() for bar in ax.patches] == row
        filled = [to_hex(bar.get_facecolor()).upper() == PICKED for bar in ax.patches]
        assert filled == [False, False, True]
        framed = [to_hex(bar.get_edgecolor()).upper() == RIGHT for bar in ax.patches]
        assert framed == [True, False, False]


def test_the_legend_says_what_is_filled_and_what_is_framed():
    (legend,) = DRAW["choice_bars"]().legends
    filled, framed = legend.get_patches()
    assert [text.get_text() for text in legend.get_texts()] == ["chosen: the largest score",
                                                                "right"]
    assert to_hex(filled.get_facecolor()).upper() == PICKED
    assert to_hex(framed.get_edgecolor()).upper() == RIGHT and framed.get_facecolor()[3] == 0


def test_titles_follow_from_the_numbers():
    def titles(name):
        return [ax.get_title(loc="left") for ax in DRAW[name]().axes]

    assert titles("tokens_and_bytes") == ["Per token: 4.0 times apart",
                                          "Per byte: the same for all"]
    assert titles("tokens_and_bytes, apart") == ["Per token: 2.0 times apart",
                                                 "Per byte: 3.0 times apart"]
    assert titles("pass_curves") == ["plug-in: off by up to 6 points"]
    assert titles("seen_and_unseen") == ["Seen: +2.0 nat, unseen: -0.2 nat"]


def test_curves_and_dots_are_the_data():
    bars = DRAW["tokens_and_bytes"]().axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.5, 2.0]
    lines = DRAW["pass_curves"]().axes[0].lines
    assert [line.get_label() for line in lines] == ["true", "unbiased", "plug-in"]
    assert lines[2].get_ydata().tolist() == [0.3, 0.45, 0.6]
    dots = {line.get_label(): line.get_data() for line in DRAW["seen_and_unseen"]().axes[0].lines}
    assert np.allclose(dots["was in the training text"], [[-2.0, -2.5], [-0.1, -0.4]])
    assert np.allclose(dots["was not"], [[-3.0], [-3.2]])
    assert np.array_equal(*dots["no change"]) and np.ptp(dots["no change"][0]) > 0
    (legend,) = DRAW["seen_and_unseen"]().legends
    assert {text.get_text() for text in legend.get_texts()} == dots.keys()


def test_refusals():
    refused(lambda: figures.choice_bars(CHOICES, {"log p": [1.0]}, 0), "scores: [1] of 3 choices")
    refused(lambda: figures.choice_bars(CHOICES, {}, 0), "scores: []")
    refused(lambda: figures.choice_bars(CHOICES, WAYS, 3), "right: 3, expected 0 to 2")
    refused(lambda: figures.tokens_and_bytes(["a"], [1], [1]), "names: 1")
    refused(lambda: figures.pass_curves([1, 2], [0.1], {}), "ks: 2")
    refused(lambda: figures.seen_and_unseen([-1], [-1], [True]), "seen: [True] of 1")

# SPDX-License-Identifier: MIT
"""Figures about few bits: nothing clipped, titles from the data."""

import numpy as np
import pytest
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures

WAYS = {"six bits": {"latent codes": 5.333, "RoPE codes": 0.667, "scales": 0.056},
        "FP8": {"latent codes": 7.111, "RoPE codes": 0.889, "scales": 0.111}}
WORDS = {"A": [("v1", 6), ("v2: bits 3-0", 4), ("v0", 6)],
         "B": [("v3", 6), ("v2: bits 5-4", 2), ("idle", 2), ("v4", 6)]}
NAMES = ("one way to do it", "another, with a longer name", "a third")
CURVES = {name: [10.0 ** -(i + j) for j in range(4)] for i, name in enumerate(NAMES)}
X = np.geomspace(2.0**-12, 448, 50)
DRAW = {
    "bit_budget": lambda: figures.bit_budget(WAYS),
    "word_layout": lambda: figures.word_layout(WORDS),
    "error_by_bits": lambda: figures.error_by_bits({5: 6.0, 6: 3.0, 7: 1.45}),
    "harm_bars": lambda: figures.harm_bars({"one": 1.5, "two": 0.25}, "KL (nats)", "Two are less"),
    "curves_by_position": lambda: figures.curves_by_position(
        {"left": CURVES, "right": CURVES}, [64, 192, 320, 448], ["loss", "KL"], 256),
    "curves_by_position, one": lambda: figures.curves_by_position(
        {"alone": CURVES}, [64, 192, 320, 448], ["KL"], bands=[1e-5] * 12),
    "rotated_row": lambda: figures.rotated_row([9.0, 0, 0, 0], [4.5, 4.5, -4.5, 4.5], (0.3, 0.15)),
    "format_error": lambda: figures.format_error(
        X, X / 1e4, 1 / 16, {"zero": 2.0**-12, "subnormal": 2.0**-10, "normal": 2.0**-6}),
    "scale_map": lambda: figures.scale_map(np.full((30, 20), 0.25), 12),
    "outlier_errors": lambda: figures.outlier_errors(
        [10, 100, 1e3], {"one scale": [0.02, 0.02, 0.3], "blocks": [0.02, 0.02, 0.02]}),
}
TITLES = {
    "bit_budget": "Bits per number in all: 6.06, 8.11",
    "word_layout": "2 words of 16 bits hold 6 codes; 1 of these are cut",
    "error_by_bits": "Each bit more divides the error by 2.0 to 2.1",
    "format_error": "At most 1/16 off, where numbers are normal",
    "scale_map": "30×20 numbers: 6 blocks, 4 of them smaller",
    "outlier_errors": "Outliers that cost the others less than 5%\n"
                      "one scale: up to 100; blocks: all",
    "rotated_row": "as it is\nlargest 9.0, step 0.30",
}


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 4000
    assert is_whole(figure)
    assert all(ax.get_xlabel() or ax.get_label() == "<colorbar>" for ax in figure.axes)


@pytest.mark.parametrize("name", TITLES)
def test_titles_state_the_message_from_the_data(name):
    assert DRAW[name]().axes[0].get_title(loc="left") == TITLES[name]


def test_bars_add_up_and_each_part_is_named_once():
    figure = DRAW["bit_budget"]()
    ends = [patch.get_x() + patch.get_width() for patch in figure.axes[0].patches]
    assert max(ends) == pytest.approx(sum(WAYS["FP8"].values()))
    assert [t.get_text() for t in figure.legends[0].texts] == ["latent codes", "RoPE codes",
                                                               "scales"]


def test_every_panel_has_every_curve_and_the_trained_length():
    figure = DRAW["curves_by_position"]()
    assert [len(ax.lines) for ax in figure.axes] == [4, 4]
    assert all(ax.lines[-1].get_xdata()[0] == 256 for ax in figure.axes)
    assert len(DRAW["curves_by_position, one"]().axes[0].collections) == 3


def test_refusals():
    refused(lambda: figures.bit_budget({"a": {"x": -1}}), "ways", "none negative")
    refused(lambda: figures.word_layout({"A": [("x", 3)], "B": [("y", 4)]}), "words", "one width")
    refused(lambda: figures.error_by_bits({5: 1.0}), "percent", "two")
    refused(lambda: figures.harm_bars({}, "", ""), "values", "one at least")
    refused(lambda: figures.curves_by_position({"a": {"x": [1]}}, [1, 2], [""]), "panels", "2")
    refused(lambda: figures.rotated_row([1], [1, 2], (1, 1)), "before", "one length")
    refused(lambda: figures.format_error([1], [], 1, {}), "numbers", "as many")
    refused(lambda: figures.scale_map(np.zeros((2, 2)), 1), "scales", "positive")
    refused(lambda: figures.outlier_errors([1, 2], {"a": [1]}), "errors", "2 numbers")

# SPDX-License-Identifier: MIT
"""Figures of serving: nothing clipped, titles, boxes and curves from the data."""

import matplotlib
import numpy as np
import pytest
from drawn import is_whole
from matplotlib.patches import Rectangle
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.figures.serving import FREE, HOLDERS, SHARED, WORK

TABLES = {"A": [2, 0, 1], "B": [2, 4], "C": []}
STATIC = [["prompt", "token", "padding"], ["prompt", "token", "token"], [None] * 3 + ["prompt"]]
ONGOING = [["prompt", "token"], ["prompt", None, "read again", "token"], [None] * 2 + ["prompt"]]
BATCHES = np.array([1, 2, 4, 8])
CURVES = {"per-head": (BATCHES[:2], [10, 15]), "latent": (BATCHES, [10, 18, 30, 45])}
DRAW = {
    "page_pool": lambda: figures.page_pool([1, 1, 2, 0, 1, 0], TABLES),
    "serving_timeline": lambda: figures.serving_timeline({"static": STATIC, "ongoing": ONGOING}),
    "throughput_curves": lambda: figures.throughput_curves(
        CURVES, {"latent": ([1, 8], [9, 50])}),
    "throughput_curves, one": lambda: figures.throughput_curves({"small": (BATCHES, [9, 12, 20,
                                                                                    27])}),
}


def color(patch) -> str:
    return matplotlib.colors.to_hex(patch.get_facecolor()).upper()


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure)
    assert all(len(ax.get_title(loc="left")) > 10 for ax in figure.axes)


def test_a_page_has_the_colour_of_who_holds_it():
    ax = DRAW["page_pool"]().axes[0]
    boxes = [p for p in ax.patches if isinstance(p, Rectangle)]
    white = matplotlib.colors.to_hex(FREE).upper()
    pool = [HOLDERS[0], HOLDERS[0], SHARED, white, HOLDERS[1], white]
    tables = [SHARED, HOLDERS[0], HOLDERS[0], SHARED, HOLDERS[1]]
    assert [color(box) for box in boxes] == pool + tables
    assert ax.get_title(loc="left") == "5 entries in tables, 4 of 6 pages in use"
    shown = [t.get_text() for t in ax.texts]
    assert shown[:12:2] == list("012345") and shown[1:12:2] == list("112010")


def test_a_box_for_each_place_in_each_pass():
    static, ongoing = DRAW["serving_timeline"]().axes
    for ax, rows in ((static, STATIC), (ongoing, ONGOING)):
        boxes = {(p.get_x(), round(p.get_y() + 0.42)): color(p) for p in ax.patches}
        assert boxes == {(x, y): WORK[work].upper() for y, row in enumerate(rows)
                         for x, work in enumerate(row) if work}
    assert static.get_title(loc="left") == "static: 4 passes"
    assert ongoing.get_title(loc="left") == "ongoing: 4 passes"


def test_curves_end_where_memory_does_and_points_are_measured():
    ax = DRAW["throughput_curves"]().axes[0]
    lines = [line for line in ax.lines if line.get_ls() == "-"]
    assert [line.get_label() for line in lines] == list(CURVES)
    for line, (x, y) in zip(lines, CURVES.values(), strict=True):
        assert line.get_xdata().tolist() == list(x) and list(line.get_ydata()) == list(y)
    (points,) = [line for line in ax.lines if line.get_label() == "measured"]
    assert list(points.get_xdata()) == [1, 8] and list(points.get_ydata()) == [9, 50]
    assert [t.get_text() for t in ax.texts] == ["2", "8"]
    assert ax.get_title(loc="left") == "The largest batch brings 3 times the tokens of per-head"
    one = DRAW["throughput_curves, one"]().axes[0]
    assert one.get_title(loc="left") == "The largest batch brings 3 times the tokens"


def test_refusals():
    refused(lambda: figures.page_pool([1, 0], {"A": [1]}), "users: [1, 0]", "[0, 1]")
    refused(lambda: figures.serving_timeline({}), "ways: expected at least one")
    refused(lambda: figures.serving_timeline({"a": [["sleep"]]}), "'sleep' in 'a'")
    refused(lambda: figures.throughput_curves({}), "curves: expected at least one")
    refused(lambda: figures.throughput_curves({"a": ([1, 2], [3])}), "curves: expected")

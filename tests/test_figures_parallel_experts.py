# SPDX-License-Identifier: MIT
"""Figures of experts on several ranks: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from drawn import is_whole
from matplotlib.colors import to_hex

from dsv2_ref import figures
from dsv2_ref.figures.parallel_experts import LAYER, LINK, SHARED

PNG = b"\x89PNG\r\n\x1a\n"
INDICES, HOMES = [[0, 1], [2, 3], [1, 3], [0, 2]], [0, 0, 1, 1]
LIMITED = torch.tensor([[40, 10, 10], [0, 50, 10], [20, 0, 40]])
FREE = torch.tensor([[40, 30, 20], [30, 50, 10], [20, 30, 40]])
BEGUN = [("layer", 0.0, 0.05), ("counts", 0.0, 0.01), ("rows", 0.01, 0.02), ("shared", 0.01, 0.03),
         ("rows", 0.03, 0.04), ("shared, backward", 0.04, 0.05)]
AFTER = [("layer", 0.0, 0.08), *BEGUN[1:]]
TRACE = [("all_to_all", 0.0, 0.01), ("all_to_all", 0.011, 0.03), ("shared", 0.012, 0.02),
         ("shared, backward", 0.03, 0.04)]                       # begins where the link has ended
SCORES = torch.rand(24, 12, generator=torch.Generator().manual_seed(1))
DRAW = {
    "rows_by_hand": lambda: figures.rows_by_hand(INDICES, HOMES, 2),
    "rows_by_hand, three ranks": lambda: figures.rows_by_hand([[0, 5, 3], [1, 2, 0]], [0, 2], 2),
    "rank_traffic": lambda: figures.rank_traffic({"M = 2": LIMITED, "no limit": FREE}, 30),
    "rank_traffic, one": lambda: figures.rank_traffic({"M = 2": LIMITED}, 30),
    "overlap_spans": lambda: figures.overlap_spans({"after": AFTER, "begun": BEGUN}),
    "overlap_spans, one": lambda: figures.overlap_spans({"trace": TRACE}),
}
TITLES = {
    "rows_by_hand": "6 rows, one per rank; one per slot they would be 8",
    "rank_traffic": "Rows per token: 2.00 against 3.00",
    "overlap_spans": "30 of 80 ms are saved",
    "overlap_spans, one": "1 of 2 passes of the shared experts while rows are on their way",
}


def title(figure):
    return figure.get_suptitle() or figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").read_bytes().startswith(PNG)
    assert is_whole(figure)


@pytest.mark.parametrize("name", TITLES)
def test_titles_are_computed(name):
    assert title(DRAW[name]()) == TITLES[name]


def test_a_line_for_each_row_thick_where_it_stands_for_two_slots():
    lines = DRAW["rows_by_hand"]().axes[0].lines
    drawn = [line for line in lines if len(line.get_xdata())]
    assert [line.get_linewidth() for line in drawn] == [4.5, 4.5, 2.2, 2.2, 2.2, 2.2]
    away = [to_hex(line.get_color()).upper() == LINK for line in drawn]
    assert away == [False, True, True, False, True, False]
    first, second = (drawn[i].get_xdata()[1] for i in (0, 1))
    assert [line.get_xdata()[1] for line in drawn[2:]] == [first, second] * 2


def test_traffic_is_written_in_its_cells_and_what_stays_is_framed():
    left, right = DRAW["rank_traffic"]().axes
    for ax, table in ((left, LIMITED), (right, FREE)):
        assert np.array_equal(ax.images[0].get_array(), table)
        assert [text.get_text() for text in ax.texts] == [str(n) for n in table.flatten().tolist()]
        assert ax.images[0].get_clim() == (0, 50)
        assert [(p.get_x() + p.get_width() / 2, p.get_y() + p.get_height() / 2)
                for p in ax.patches] == [(i, pytest.approx(i)) for i in range(3)]
    assert [t.get_text() for t in left.get_yticklabels()] == ["0: 2.00", "1: 2.00", "2: 2.00"]
    assert (left.get_xlabel(), left.get_ylabel()) == ("to rank", "from rank: rows per token")
    assert left.get_title(loc="left") == "M = 2: 2.00 rows per token"


def test_spans_lie_where_and_when_they_were():
    after, begun = DRAW["overlap_spans"]().axes
    for ax, spans in ((after, AFTER), (begun, BEGUN)):
        drawn = [(to_hex(p.get_facecolor()).upper(), p.get_x(), p.get_x() + p.get_width())
                 for p in ax.patches]
        colors = {"layer": LAYER, "counts": LINK, "rows": LINK}
        assert drawn == [(colors.get(what, SHARED), pytest.approx(1e3 * a), pytest.approx(1e3 * b))
                         for what, a, b in spans]
        assert [p.get_y() > 0.5 for p in ax.patches] == [s[0] in ("counts", "rows") for s in spans]
    assert after.get_xlim() == begun.get_xlim() and begun.get_xlabel() == "time (ms)"


@pytest.mark.parametrize("call, message", [
    (lambda: figures.rows_by_hand(INDICES, HOMES[1:], 2), r"homes: \[0, 1, 1\] for indices of"),
    (lambda: figures.rows_by_hand(INDICES, HOMES[::-1], 2), "one for each token, ascending"),
    (lambda: figures.rank_traffic({"a": LIMITED[1:]}, 3), "a: shape .* as many rows as columns"),
    (lambda: figures.rank_traffic({"a": LIMITED * 0}, 3), "with 0 rows"),
    (lambda: figures.overlap_spans({"a": [("nap", 0, 1)]}), r"a: spans of \['nap'\]"),
    (lambda: figures.overlap_spans({"a": []}), r"a: spans of \[\]"),
    (lambda: figures.rank_traffic_slider(SCORES[1:], 3, 4), "scores: shape .* on 4 ranks"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_slider_redraws_when_it_is_moved():
    pytest.importorskip("ipywidgets")
    slider, image = figures.rank_traffic_slider(SCORES, 4, 4).children
    assert (slider.min, slider.max, slider.value) == (2, 4, 4)       # M = 1 has three experts
    free = image.value
    assert bytes(free).startswith(PNG)
    slider.value = 2
    assert image.value != free and bytes(image.value).startswith(PNG)
    slider.value = 4
    assert image.value == free

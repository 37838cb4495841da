# SPDX-License-Identifier: MIT
"""Figures of attention and of positions: what they show, computed from what they are given."""

import io
import math

import matplotlib
import numpy as np
import pytest
import torch
from drawn import is_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from dsv2_ref import figures
from dsv2_ref.attention.rope import rope_frequencies, yarn_frequencies, yarn_ramp

PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ["the", "cat", "sat"]
SCORES = torch.tensor([[0.5, -torch.inf, -torch.inf], [-1.25, 3.0, -torch.inf], [0.0, 1.0, -2.0]])
YARN = dict(theta=1e4, beta_fast=32.0, beta_slow=1.0, original_positions=4096)
FREQUENCIES = rope_frequencies(64)
CURVES = {"right": [0.5, 0.4, 0.3], "wrong": [0.5, 0.42, 2.0]}
TESTS = ("BBH", "MMLU")
SCORES_OF = {"dense": {"MHA": [37, 45], "GQA, 8 groups": [36, 46], "MQA": [33, 38]},
             "sparse": {"MHA": [38, 49], "MLA": [39, 50]}}
DRAW = {
    "matrices": lambda: figures.matrices(
        [("h", torch.ones(3, 2), NAMES), "×", ("W", np.eye(2)), "=", ("a long name", SCORES)],
        "A title"),
    "matrices, masked and empty": lambda: figures.matrices(
        [("scores", SCORES, NAMES, NAMES), "→", ("row", [1, math.nan, -3])],
        "A title that is far longer than the two small matrices below it are wide together"),
    "shared_heads": lambda: figures.shared_heads(),
    "grouped_heads": lambda: figures.grouped_heads(16, 4, 128, 576),
    "grouped_heads, all": lambda: figures.grouped_heads(16, 16, 128, 576),
    "kept_to_scale": lambda: figures.kept_to_scale(128, 8, 128, 512, 64),
    "kept_to_scale, other sizes": lambda: figures.kept_to_scale(16, 4, 64, 96, 32),
    "benchmark_scores": lambda: figures.benchmark_scores(TESTS, SCORES_OF),
    "groups_like_mla": lambda: figures.groups_like_mla(128, 128, 60, 576),
    "mla_flow": lambda: figures.mla_flow(5120, 128, 128, 64, 128, 512, 1536),
    "mla_flow, plain queries": lambda: figures.mla_flow(2048, 16, 128, 64, 128, 512),
    "turned_pair": lambda: figures.turned_pair((2, 1), math.pi / 6, range(5)),
    "pair_clocks": lambda: figures.pair_clocks(FREQUENCIES, [0, 1, 10, 1000], [0, 16, 31]),
    "losses_by_position": lambda: figures.losses_by_position([1, 4, 8, 256], CURVES),
    "angle_errors": lambda: figures.angle_errors(
        [15, 1023, 131_071], {"fp32": [1e-7, 1e-5, 1.7e-3], "bf16": [0.01, 1.0, 57.4]}),
    "errors_by_position": lambda: figures.errors_by_position(
        {"a": [0, 0.2, 0.3], "b": [0, 0.1, 0.15]}, "A factor"),
    "yarn_pairs": lambda: figures.yarn_pairs(
        FREQUENCIES, yarn_frequencies(64, factor=40.0, **YARN), yarn_ramp(64, **YARN), 4096),
}


def title(figure):
    return figure.axes[0].get_title(loc="left") or figure.get_suptitle()


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name):
    figure = DRAW[name]()
    assert figure._repr_png_().startswith(PNG)
    assert is_whole(figure)
    assert title(figure)


@pytest.mark.parametrize("name", ["matrices", "yarn_pairs"])
def test_256_colours_are_enough(name):
    drawn, shown = io.BytesIO(), Image.open(io.BytesIO(DRAW[name]()._repr_png_()))
    figures.styled(DRAW[name]().savefig)(drawn, format="png", dpi=150)
    before = np.asarray(Image.open(drawn).convert("RGB"), float)
    assert shown.mode == "P"
    assert np.abs(np.asarray(shown.convert("RGB"), float) - before).max() < 10


@pytest.mark.parametrize("name", [n for n in DRAW if "matrices" in n or "flow" in n])
def test_texts_stay_in_the_figure_and_in_their_boxes(name):
    figure = DRAW[name]()
    ax, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [p.get_window_extent(renderer) for p in ax.patches
             if isinstance(p, FancyBboxPatch | Rectangle)]
    for text in ax.texts:
        at = text.get_window_extent(renderer)
        assert 0 <= at.x0 and at.x1 <= figure.bbox.width, text.get_text()
        middle = ((at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2)
        for box in boxes:
            if box.contains(*middle):
                assert box.x0 <= at.x0 and at.x1 <= box.x1, text.get_text()


@pytest.mark.parametrize("name, labels", [
    ("groups_like_mla", ("keys and values in a layer (groups of heads)", "numbers per token")),
    ("benchmark_scores", ("dense", "score (%)")),
    ("turned_pair", ("first number of the pair", "second number of the pair")),
    ("pair_clocks", ("pair of numbers", "position")),
    ("losses_by_position", ("position in the text (tokens)", "mean loss (nats per token)")),
    ("angle_errors", ("position", "largest error of an angle (rad)")),
    ("errors_by_position", ("position (tokens)", "error relative to the output")),
    ("yarn_pairs", ("pair of numbers", "turns in 4,096 positions")),
])
def test_axes_say_what_and_in_which_unit(name, labels):
    ax = DRAW[name]().axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels


def test_titles_state_the_message_from_the_data():
    for name, words in {
        "shared_heads": "8 keys and values by MHA, 2 by GQA, 1 by MQA; by MLA one row",
        "grouped_heads": "GQA: 16 query heads on 4 keys and values, 1,024 numbers; MLA keeps 576",
        "grouped_heads, all": "MHA: 16 query heads on 16 keys and values, 4,096 numbers",
        "kept_to_scale": "drawn to scale: MLA 576 numbers, MHA 32,768",
        "kept_to_scale, other sizes": "MLA 128 numbers, MHA 2,048",
        "benchmark_scores": "GQA and MQA lie below MHA on 3 of 4 scores, MLA above it on 2 of 2",
        "groups_like_mla": "MLA keeps as much as GQA with 2.25 groups would",
        "mla_flow": "MLA keeps 576 numbers per token and layer (blue); its expanded keys and "
                    "values would be 40,960",
        "mla_flow, plain queries": "would be 5,120",
        "turned_pair": "turns the pair by 30°",
        "pair_clocks": "Pair 0 turns once in 6.28 positions, pair 31 in 47,117",
        "losses_by_position": "wrong: +0.02 nats at tokens 4–7, +1.70 at 8–255",
        "angle_errors": "bf16: off by 57 rad at position 131,071",
        "errors_by_position": "A factor: error 0 at position 0, at least 0.1 after it",
        "yarn_pairs": "YaRN keeps 11 of 32 pairs, divides 9, mixes the 12 between",
    }.items():
        assert words in title(DRAW[name]()), name
    assert title(DRAW["matrices"]()) == "A title"


def test_cells_show_their_numbers():
    drawn = texts(DRAW["matrices, masked and empty"]())
    assert drawn.count("−∞") == 3 and drawn.count("") == 1                  # masked, empty
    assert {"0.50", "−1.25", "3", "0", "1", "−2", "−3", "3×3", "1×3", "→"} <= set(drawn)
    assert all(drawn.count(name) == 2 for name in NAMES)                    # of rows, of columns
    rounded = texts(figures.matrices([("x", [[0.126, -0.0004, 1 - 1e-7]])], "t"))
    assert rounded[:3] == ["0.13", "0.00", "1"]
    assert texts(figures.matrices([("x", [[0.126]])], "t", digits=1))[0] == "0.1"


def test_signs_have_colours_and_size_has_strength():
    cells = figures.matrices([("x", [[4, 1, 0, -4]])], "t").axes[0].patches
    large, small, zero, negative = (np.array(c.get_facecolor()[:3]) for c in cells)
    assert zero.tolist() == [1, 1, 1]
    assert (1 - large).sum() > 3 * (1 - small).sum() > 0                     # stronger
    assert large.argmax() == 1 and negative.argmax() == 0                    # green, reddish


def test_matrices_do_not_overlap_and_keep_their_order():
    figure = figures.matrices([("a", np.ones((2, 3))), "=", ("b", np.ones((4, 2)), ["u"] * 4)], "t")
    boxes = [p.get_bbox() for p in figure.axes[0].patches]
    assert max(b.x1 for b in boxes[:6]) < min(b.x0 for b in boxes[6:]) - 0.5
    assert [b.y0 for b in boxes[:6:3]] == [boxes[0].y0, boxes[0].y0 + 1]     # rows downwards


def test_kinds_have_their_colours():
    for n_kv, kind in ((16, "MHA"), (4, "GQA"), (1, "MQA")):
        ax, bars = figures.grouped_heads(16, n_kv, 128, 576).axes
        widths = [bar.get_width() for bar in bars.patches]
        assert widths == [2 * n_kv * 128, 576]
        colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in bars.patches]
        assert colors == [figures.COLORS[kind], figures.COLORS["MLA"]]
        assert {line.get_color() for line in ax.lines} == {figures.COLORS[kind]}
        assert len(ax.lines) == 16 and texts(ax.figure).count("k\nv") == n_kv


def test_each_head_reads_its_group():
    lines = figures.grouped_heads(8, 2, 4, 3).axes[0].lines
    ends = [line.get_xdata()[1] for line in lines]
    assert len(set(ends[:4])) == len(set(ends[4:])) == 1 and ends[0] != ends[4]
    starts = [line.get_xdata()[0] for line in lines]
    assert np.isclose(ends[0], np.mean(starts[:4]))


@pytest.mark.parametrize("sizes", [(128, 8, 128, 512, 64), (16, 4, 64, 96, 32)])
def test_areas_are_what_is_kept_and_do_not_overlap(sizes):
    n_h, groups, d_h, d_c, d_r = sizes
    ax = figures.kept_to_scale(*sizes).axes[0]
    boxes = [p.get_bbox() for p in ax.patches]
    areas = [round(abs(b.width * b.height)) for b in boxes]
    assert [a + b for a, b in zip(areas[::2], areas[1::2])] == [
        2 * n_h * d_h, 2 * groups * d_h, 2 * d_h, d_c + d_r]
    assert ax.get_aspect() == 1 and areas[-2:] == [d_c, d_r]
    for i, one in enumerate(boxes):
        for other in boxes[i + 1:]:
            assert (one.x1 <= other.x0 or other.x1 <= one.x0
                    or one.y1 < other.y0 or other.y1 < one.y0)
    colors = [matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in ax.patches[::2]]
    assert colors == [figures.COLORS[kind] for kind in ("MHA", "GQA", "MQA", "MLA")]


def test_each_score_is_a_dot_of_its_kind():
    dense, sparse = DRAW["benchmark_scores"]().axes
    assert [line.get_ydata().tolist() for line in dense.lines] == [[37, 45], [36, 46], [33, 38]]
    assert [line.get_color() for line in sparse.lines] == [
        figures.COLORS["MHA"], figures.COLORS["MLA"]]


def test_only_the_cached_row_is_solid_in_the_flow():
    for name, latent in (("mla_flow", "1536"), ("mla_flow, plain queries", "2048")):
        ax = DRAW[name]().axes[0]
        boxes = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
        drawn = [t.get_text() for t in ax.texts][-len(boxes):]
        kept = [text for text, box in zip(drawn, boxes, strict=True)
                if box.get_linestyle() in ("-", "solid")]
        assert kept == ["$k^R$   64", "$c^{KV}$   512"]
        assert any("c^Q" in t and latent in t for t in drawn)
    equations = "".join(texts(DRAW["mla_flow"]()))
    assert r"q_{t,i}\cdot k_{j,i}" in equations and "v^C_{j,i}" in equations
    assert all(f"({n})" in equations for n in range(37, 48))
    assert "(37)" not in "".join(texts(DRAW["mla_flow, plain queries"]()))


def test_the_pair_is_turned_anticlockwise():
    ax = DRAW["turned_pair"]().axes[0]
    arrows = [t.xy for t in ax.texts if getattr(t, "arrow_patch", None) is not None]
    assert np.allclose(arrows[0], (2, 1)) and np.allclose(arrows[3], (-1, 2))


def test_clocks_show_position_times_frequency():
    hands = DRAW["pair_clocks"]().axes[0].lines[1::2]
    assert len(hands) == 4 * 3
    for i, position in enumerate((0, 1, 10, 1000)):
        for j, pair in enumerate((0, 16, 31)):
            (x0, x1), (y0, y1) = hands[3 * i + j].get_data()
            angle = math.atan2(y0 - y1, x1 - x0)                             # y is downwards
            off = (position * FREQUENCIES[pair].item() - angle) / (2 * math.pi)
            assert (x0, y0) == (j, i) and abs(off - round(off)) < 1e-9


def test_losses_stand_over_the_positions_they_are_the_mean_of():
    ax = DRAW["losses_by_position"]().axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1–3", "4–7", "8–255"]
    assert ax.get_xticks().tolist() == ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert [line.get_ydata().tolist() for line in ax.lines] == list(CURVES.values())
    assert ax.get_ylim()[0] == 0


def test_turns_under_yarn():
    before, after, _ = (line.get_ydata() for line in DRAW["yarn_pairs"]().axes[0].lines)
    assert np.isclose(before[0], 4096 / (2 * math.pi)) and (before[:11] == after[:11]).all()
    assert np.allclose(before[23:], 40 * after[23:])


@pytest.mark.parametrize("call, message", [
    (lambda: figures.matrices(["="], "t"), "parts: no matrix"),
    (lambda: figures.matrices([("x", np.ones((2, 2, 2)))], "t"), r"x: shape \(2, 2, 2\)"),
    (lambda: figures.matrices([("x", np.ones((2, 2)), ["a"])], "t"), "x: 1 names of rows"),
    (lambda: figures.matrices([("x", np.ones((2, 2)), [], ["a"])], "t"), "names of columns"),
    (lambda: figures.grouped_heads(16, 3, 128, 576), "n_kv: 3, expected a divisor of n_h = 16"),
    (lambda: figures.shared_heads(8, 8), "groups: 8, expected more than 1"),
    (lambda: figures.kept_to_scale(8, 1, 4, 3, 2), "groups: 1, expected more than 1"),
    (lambda: figures.benchmark_scores(["BBH"], SCORES_OF), "dense, MHA: 2 scores, expected 1"),
    (lambda: figures.turned_pair((0, 0), 1.0, [0]), r"pair: \(0, 0\)"),
    (lambda: figures.pair_clocks(FREQUENCIES, [0], [32]), r"pairs: \[32\], expected .* to 31"),
    (lambda: figures.losses_by_position([4, 8, 16], CURVES), r"curves: lengths \[3, 3\]"),
    (lambda: figures.losses_by_position([4, 8], CURVES), r"edges: \[4, 8\], expected at least"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make, start, moved", [
    (lambda: figures.group_slider(16, 128, 576), 16, 2),
    (lambda: figures.position_slider(FREQUENCIES, [0, 16, 31], 200), 0, 25),
])
def test_sliders_redraw_when_they_are_moved(make, start, moved):
    pytest.importorskip("ipywidgets")
    slider, image = make().children
    before = image.value
    assert slider.value == start and bytes(before).startswith(PNG)
    slider.value = moved
    assert image.value != before and bytes(image.value).startswith(PNG)
    slider.value = start
    assert image.value == before

# SPDX-License-Identifier: MIT
"""The model drawn by code: every size of the config is in the picture, and nothing overlaps."""

from dataclasses import asdict
from itertools import combinations

import pytest
from drawn import is_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.path import Path

from dsv2_ref import cost, figures
from dsv2_ref.config import LITE, MINI, SMALL, TINY, V2

CONFIGS = {
    "V2": V2, "V2-Lite": LITE, "small": SMALL, "mini": MINI,
    "two dense, three shared": TINY.with_(n_dense=2, n_shared=3),
    "no dense, one device": TINY.with_(n_dense=0, n_devices=1, max_devices=None, d_cq=None),
    "few experts": TINY.with_(n_routed=4, top_k=1),
}
TOTAL = asdict(cost.parameters(V2))
TOKEN = TOTAL | {"routed": TOTAL["routed"] // 160 * 6, "embedding": 0}
CONTEXT = [2**i for i in range(8, 18)]


def pairs():
    return {"expanded": cost.pair_flops_expanded(V2), "absorbed": cost.pair_flops_absorbed(V2)}


DRAW = {
    **{f"architecture, {n}": lambda c=c, n=n: figures.architecture(c, n)
       for n, c in CONFIGS.items()},
    "parameter_shares": lambda: figures.parameter_shares(TOTAL, TOKEN),
    "flops_against_context": lambda: figures.flops_against_context(
        CONTEXT, 2 * cost.activated_parameters(V2), pairs()),
    "flops_by_part": lambda: figures.flops_by_part(
        {part: 2 * n for part, n in TOKEN.items() if part != "embedding"}, pairs()["absorbed"],
        [1024, 4096, 131072], "absorbed"),
}


@pytest.mark.parametrize("name", DRAW)
def test_drawn_with_nothing_clipped(name):
    figure = DRAW[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert is_whole(figure)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_of_the_architecture_do_not_overlap_and_stay_inside_their_boxes(name):
    figure = figures.architecture(CONFIGS[name], name)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    ax = figure.axes[0]
    texts = [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]
    assert len(texts) > 30
    for (a, box_a), (b, box_b) in combinations(texts, 2):
        assert not box_a.overlaps(box_b), f"{a!r} over {b!r}"
    for patch in ax.patches:
        box = patch.get_window_extent(renderer)
        for text, inner in texts:
            crosses = box.overlaps(inner) and not (
                box.x0 <= inner.x0 and inner.x1 <= box.x1 and box.y0 <= inner.y0
                and inner.y1 <= box.y1)
            assert not crosses, f"{text!r} leaves its box"
    to_data = ax.transData.inverted()
    for arrow in (t for t in ax.texts if not t.get_text()):
        line = Path([arrow.xyann, arrow.xy])
        for text, inner in texts:
            assert not line.intersects_bbox(inner.transformed(to_data), filled=False), (
                f"an arrow crosses {text!r}")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sizes_of_the_config_are_written_in(name):
    c = CONFIGS[name]
    written = "\n".join(t.get_text() for t in figures.architecture(c, name).axes[0].texts)
    for part in (
        f"{c.n_layers} blocks", f"embedding\n{c.vocab:,} × {c.d:,}", f"c_kv: {c.d_c}",
        f"k_r: {c.d_r}", f"q_c\n{c.n_h} × {c.d_h}", f"q_r\n{c.n_h} × {c.d_r}",
        f"k_c\n{c.n_h} × {c.d_h}", f"v_c\n{c.n_h} × {c.d_v}", f"{c.n_shared} shared",
        f"{c.n_routed} routed\nof width {c.expert_width:,}", f"the {c.top_k} best",
        f"what attention adds: {c.d:,}",
    ):
        assert part in written
    assert (f"c_q: {c.d_cq:,}" if c.d_cq else "no query latent") in written
    assert ("W_DQ" in written) == (c.d_cq is not None)
    assert (f"width {c.dense_width:,})" in written) == (c.n_dense > 0)
    limited = f"on {c.max_devices} of {c.n_devices} devices"
    assert (limited in written) == (c.max_devices is not None)
    assert ("head = embedding" in written) == c.tie_embeddings


def test_titles_state_the_message_from_the_data():
    titles = {name: DRAW[name]().axes[0].get_title(loc="left") for name in DRAW}
    assert titles["architecture, V2"] == ("V2: 512 + 64 numbers cached per layer instead of "
                                          "32,768, and 6 of 160 routed experts per token")
    assert titles["parameter_shares"] == ("Routed experts are 94 % of all parameters, "
                                          "40 % of a token's")
    assert titles["flops_against_context"] == (
        "Pairs cost as much as all matrices at 8,500 (expanded) or 2,500 (absorbed) tokens")
    assert titles["flops_by_part"] == "Of a token's FLOPs pairs take 29 % at 1K, 98 % at 128K"


def test_shares_fill_each_bar_and_lines_are_straight():
    ax, parts = DRAW["parameter_shares"]().axes[0], (TOTAL, TOKEN)
    for row in (0, 1):
        bars = [p for p in ax.patches if abs(p.get_y() + p.get_height() / 2 - row) < 1e-9]
        assert len(bars) == 5 and sum(b.get_width() for b in bars) == pytest.approx(100)
        rest = sum(parts[row][p] for p in ("embedding", "head", "router", "norms"))
        assert bars[-1].get_width() == pytest.approx(100 * rest / sum(parts[row].values()))
    lines = DRAW["flops_against_context"]().axes[0].lines[1:]
    for line, each in zip(lines, pairs().values(), strict=True):
        assert list(line.get_ydata()) == [n * each / 1e9 for n in CONTEXT]


def test_flops_fill_each_bar_and_pairs_grow_with_the_context():
    figure = DRAW["flops_by_part"]()
    ax, matrices = figure.axes[0], 2 * cost.activated_parameters(V2)
    assert [label.get_text().split("\n")[1] for label in ax.get_yticklabels()] == [
        "59 GFLOP", "110 GFLOP", "2,232 GFLOP"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "routed", "attention", "shared", "dense", "head, router,\nnorms", "pairs, absorbed"]
    for row, n in enumerate((1024, 4096, 131072)):
        bars = [p for p in ax.patches if abs(p.get_y() + p.get_height() / 2 - row) < 1e-9]
        spent = n * pairs()["absorbed"]
        assert len(bars) == 6 and sum(b.get_width() for b in bars) == pytest.approx(100)
        assert bars[-1].get_width() == pytest.approx(100 * spent / (matrices + spent))
        assert bars[0].get_width() == pytest.approx(200 * TOKEN["routed"] / (matrices + spent))


@pytest.mark.parametrize("call, message", [
    (lambda: figures.flops_by_part({"heads": 1}, 1, [1], "absorbed"), r"parts, form: \['heads'\]"),
    (lambda: figures.flops_by_part(TOKEN, 1, [1], "merged"), "parts, form: .*'merged'"),
    (lambda: figures.flops_by_part(TOKEN, 1, [], "absorbed"), r"pair, context: 1, \[\]"),
    (lambda: figures.flops_by_part(TOKEN, 0, [1], "absorbed"), "pair, context: 0"),
    (lambda: figures.parameter_shares({"heads": 1}, TOKEN), r"total: parts \['heads'\]"),
    (lambda: figures.parameter_shares(TOTAL, {}), r"activated: parts \[\]"),
    (lambda: figures.flops_against_context(CONTEXT, 0, pairs()), "expected positive"),
    (lambda: figures.flops_against_context(CONTEXT, 1, {}), "expected positive"),
    (lambda: figures.flops_against_context(CONTEXT, 1, {"merged": 1}), "absorbed.*at least"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()

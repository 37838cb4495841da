# SPDX-License-Identifier: MIT
"""Attention on paper: small matrices with their numbers, who shares a key, how MLA's data flows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter

from dsv2_ref.figures.kinds import kind_of
from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import COLORS, MORE_COLORS, Picture, png, styled

CELL, GREY = 0.47, "#999999"      # inches per cell; whatever is not the point
POSITIVE, NEGATIVE = MORE_COLORS[1], MORE_COLORS[0]


def _canvas(width: float, height: float, inches: float, title: str) -> tuple[Picture, Axes]:
    """An empty drawing board with equal units, y downwards, as wide as the title at least."""
    bold = FontProperties(weight="bold", size=rcParams["axes.titlesize"])
    width = max(width, (TextPath((0, 0), title, prop=bold).get_extents().width / 72 + 0.3) / inches)
    figure = Picture(width * inches, height * inches + 0.45)
    ax = figure.subplots()
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal", title=title)
    ax.set_axis_off()
    return figure, ax


def _tint(color: str, share: float) -> tuple[float, ...]:
    """White for 0, most of the colour for 1."""
    return tuple(1 - 0.75 * share * (1 - c) for c in to_rgb(color))


def _matrix(name: str, values: Any, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> tuple:
    values = np.atleast_2d(np.asarray(values, float))
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: shape {values.shape}, expected a matrix or a vector")
    for what, names, n in (("rows", rows, values.shape[0]), ("columns", columns, values.shape[1])):
        if len(names) not in (0, n):
            raise ValueError(f"{name}: {len(names)} names of {what}, expected {n}")
    return name, values, list(rows), list(columns)


def _draw_matrix(ax: Axes, x: float, y: float, values: np.ndarray, digits: int) -> None:
    finite = values[np.isfinite(values)]
    largest = np.abs(finite).max() if finite.size and np.abs(finite).max() > 0 else 1.0
    for (i, j), value in np.ndenumerate(values):
        color = _tint(POSITIVE if value > 0 else NEGATIVE, min(abs(value) / largest, 1))
        style: dict[str, Any] = {"facecolor": color, "edgecolor": GREY}
        whole = np.isfinite(value) and abs(value - round(value)) < 1e-5
        text = f"{value:.{0 if whole else digits}f}".replace("-", "\u2212")
        text = text.removeprefix("\u2212") if not text.strip("\u22120.") else text
        if not np.isfinite(value):
            style = {"facecolor": "white", "edgecolor": GREY, "linestyle": ":"}
            text = ""
        if value == -np.inf:
            style, text = {"facecolor": "#E4E4E4", "edgecolor": GREY}, "\u2212\u221e"
        ax.add_patch(Rectangle((x + j, y + i), 1, 1, lw=0.7, **style))
        ax.text(x + j + 0.5, y + i + 0.52, text, ha="center", va="center",
                fontsize=10 if len(text) < 4 else 8.5)
    (n, m), shape = values.shape, "\u00d7".join(map(str, values.shape))
    ax.text(x + m / 2, y + n + 0.55, shape, ha="center", va="center", fontsize=8.5, color="#666666")


@styled
def matrices(parts: Sequence[str | tuple], title: str, digits: int = 2) -> Figure:
    """Small matrices side by side, their numbers in the cells, with signs between them.

    parts: a sign ("×", "=", "→"), or (name, values) with names of rows and of columns behind if
    wanted. A vector is one row. Whole numbers show no decimals, others `digits`; -inf is a masked
    cell, NaN an empty one.
    """
    drawn = [part if isinstance(part, str) else _matrix(*part) for part in parts]
    tables = [part for part in drawn if not isinstance(part, str)]
    if not tables:
        raise ValueError("parts: no matrix among them, expected at least one")
    tallest, named = max(t[1].shape[0] for t in tables), any(t[3] for t in tables)
    top, x, at = 1.6 if named else 1.0, 0.2, []
    for part in drawn:
        if isinstance(part, str):
            x += 0.3 * len(part) + 0.3
            at.append(x - 0.15 * len(part) - 0.15)
            continue
        _, values, rows, _ = part
        x += 0.26 * max(map(len, rows)) + 0.2 if rows else 0.0
        width = max(values.shape[1], 0.24 * len(part[0]))        # a long name needs its room
        at.append(x + (width - values.shape[1]) / 2)
        x += width + 0.25
    figure, ax = _canvas(x, top + tallest + 0.9, CELL, title)
    for part, left in zip(drawn, at, strict=True):
        if isinstance(part, str):
            ax.text(left, top + tallest / 2, part, ha="center", va="center", fontsize=14)
            continue
        name, values, rows, columns = part
        y = top + (tallest - values.shape[0]) / 2
        _draw_matrix(ax, left, y, values, digits)
        ax.text(left + values.shape[1] / 2, y - (1.05 if columns else 0.45), name, ha="center",
                va="center", fontsize=11, fontweight="bold")
        for i, row in enumerate(rows):
            ax.text(left - 0.15, y + i + 0.5, row, ha="right", va="center", fontsize=9)
        for j, column in enumerate(columns):
            ax.text(left + j + 0.5, y - 0.35, column, ha="center", va="center", fontsize=9)
    return figure


def _box(ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str,
         filled: bool = True, fontsize: float = 10) -> None:
    ax.add_patch(FancyBboxPatch(
        (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.08", edgecolor=color,
        facecolor=_tint(color, 0.55) if filled else "white", lw=1.8 if filled else 1.0,
        linestyle="-" if filled else "--"))
    ax.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def _heads(ax: Axes, left: float, y: float, kind: str, n_h: int, n_kv: int) -> None:
    """Query heads, the keys and values they read, and lines between; n_kv = 0 is MLA's row."""
    color, x = COLORS[kind], left + np.arange(n_h) * 0.55 + 0.3
    for i in range(n_h):
        _box(ax, x[i], y, 0.42, 0.42, "q", GREY, fontsize=9)
    if n_kv == 0:
        middle = (x[0] + x[-1]) / 2
        for i in range(n_h):
            _box(ax, x[i], y + 1.25, 0.42, 0.6, "k\nv", color, filled=False, fontsize=8)
            ax.plot([x[i], x[i]], [y + 0.21, y + 0.95], color=color, lw=1.2)
            ax.plot([x[i], middle + (i / (n_h - 1) - 0.5) * 1.2 if n_h > 1 else middle],
                    [y + 1.55, y + 2.1], color=color, lw=0.9, ls="--")
        _box(ax, middle, y + 2.38, 2.1, 0.5, "latent | RoPE key", color, fontsize=9)
        return
    group = n_h // n_kv
    for g in range(n_kv):
        centre = x[g * group : (g + 1) * group].mean()
        for i in range(g * group, (g + 1) * group):
            ax.plot([x[i], centre], [y + 0.21, y + 2.1], color=color, lw=1.2)
        _box(ax, centre, y + 2.38, 0.42, 0.6, "k\nv", color, fontsize=8)


@styled
def shared_heads(n_h: int = 8, groups: int = 2) -> Figure:
    """Side by side: what the n_h query heads of MHA, GQA (`groups` groups), MQA and MLA read."""
    counts = {kind_of(n_h, n): n for n in (n_h, groups, 1)} | {"MLA": 0}
    if len(counts) < 4:
        raise ValueError(f"groups: {groups}, expected more than 1 and fewer than n_h = {n_h}")
    wide = 0.55 * n_h + 0.7
    figure, ax = _canvas(4 * wide, 4.2, 0.55, f"Kept per token (solid): {n_h} keys and values by "
                         f"MHA, {groups} by GQA, 1 by MQA; by MLA one row that makes all {n_h}")
    for i, (kind, n_kv) in enumerate(counts.items()):
        left, kept = i * wide + 0.3, f"{n_kv} keys, {n_kv} values" if n_kv > 1 else "1 key, 1 value"
        _heads(ax, left, 0.95, kind, n_h, n_kv)
        middle = left + 0.275 * n_h
        ax.text(middle, 0.35, kind, ha="center", va="center", color=COLORS[kind], weight="bold")
        ax.text(middle, 3.95, f"keeps {kept if n_kv else 'one row'}", ha="center", va="center",
                fontsize=9.5)
    return figure


@styled
def grouped_heads(n_h: int, n_kv: int, d_h: int, latent_row: int) -> Figure:
    """n_h query heads on n_kv keys and values, and the numbers they keep beside MLA's row."""
    kind, numbers = kind_of(n_h, n_kv), 2 * n_kv * d_h
    figure = Picture(8.4, 4.3)
    ax, bars = figure.subplots(2, 1, height_ratios=[3, 1.5])
    ax.set(xlim=(-0.2, 0.55 * n_h + 0.3), ylim=(3.7, 0.7), title=(
        f"{kind}: {n_h} query heads on {n_kv} keys and values, {numbers:,} numbers; "
        f"MLA keeps {latent_row:,}"))
    ax.set_axis_off()
    _heads(ax, 0.0, 0.95, kind, n_h, n_kv)
    bars.barh([kind, "MLA"], [numbers, latent_row], color=[COLORS[kind], COLORS["MLA"]], height=0.7)
    bars.invert_yaxis()
    bars.grid(True, axis="x")
    bars.tick_params(axis="y", length=0)
    bars.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    bars.set(xlabel="numbers kept of one token in one layer", xlim=(0, 2 * n_h * d_h * 1.02))
    return figure


def group_slider(n_h: int, d_h: int, latent_row: int) -> Any:
    """A slider over the key-value heads that n_h allows, and below it `grouped_heads`."""
    options = [n for n in range(1, n_h + 1) if n_h % n == 0]

    def draw(n_kv: int) -> bytes:
        return png(grouped_heads(n_h, n_kv, d_h, latent_row))

    return slider("n_kv", options, n_h, draw, width=840)


# from, to, what happens on the way, how far right of the lower box's middle the arrow ends
_FLOW_ARROWS = (
    ("h", "c_q", r"$W^{DQ}$, norm (37)", 0), ("c_q", "q_c", r"$W^{UQ}$ (38)", 0),
    ("c_q", "q_r", r"$W^{QR}$, RoPE (39)", 0), ("h", "k_r", r"$W^{KR}$, RoPE (43)", 0),
    ("h", "c_kv", r"$W^{DKV}$, norm (41)", 0), ("c_kv", "k_c", r"$W^{UK}$ (42)", 0),
    ("c_kv", "v_c", r"$W^{UV}$ (45)", 0), ("q_c", "q", "(40)", -0.5), ("q_r", "q", "(40)", 0.5),
    ("k_c", "k", "(44)", 0.6), ("k_r", "k", "(44)", -0.6), ("q", "o", "(46)", -1.9),
    ("k", "o", "(46)", 0), ("v_c", "o", "(46)", 2.4), ("o", "u", r"$W^O$ (47)", 0),
)


@styled
def mla_flow(
    d: int, n_h: int, d_h: int, d_r: int, d_v: int, d_c: int, d_cq: int | None = None
) -> Figure:
    """What MLA makes of one token t, with sizes and equations; what it keeps is solid and blue.

    Only (46) looks at other tokens, j = 1 to t; in every other box t is left out.
    d_cq = None: queries are not compressed, c^Q is h itself.
    """
    expanded = n_h * (d_h + d_r + d_v)
    figure, ax = _canvas(14.2, 9.8, 0.66, f"MLA keeps {d_c + d_r:,} numbers per token and layer "
                         f"(blue); its expanded keys and values would be {expanded:,}")
    boxes = {      # text, x, y, width
        "h": (f"$h$   {d}", 6.8, 0.4, 1.7),
        "c_q": (f"$c^Q$   {d_cq}" if d_cq else f"$c^Q=h$   {d}", 2.8, 2.3, 1.9),
        "k_r": (f"$k^R$   {d_r}", 6.8, 2.3, 1.7),
        "c_kv": (f"$c^{{KV}}$   {d_c}", 11.1, 2.3, 1.7),
        "q_c": (f"$q^C_i$   {n_h}\u00d7{d_h}", 1.1, 4.2, 1.8),
        "q_r": (f"$q^R_i$   {n_h}\u00d7{d_r}", 4.5, 4.2, 1.8),
        "k_c": (f"$k^C_i$   {n_h}\u00d7{d_h}", 9.6, 4.2, 1.8),
        "v_c": (f"$v^C_i$   {n_h}\u00d7{d_v}", 12.6, 4.2, 1.8),
        "q": (f"$q_i=[q^C_i;\\,q^R_i]$   {n_h}\u00d7{d_h + d_r}", 2.8, 6.0, 3.0),
        "k": (f"$k_i=[k^C_i;\\,k^R]$   {n_h}\u00d7{d_h + d_r}", 8.2, 6.0, 3.0),
        "o": (r"$o_{t,i}=\sum_{j\leq t}\,\mathrm{softmax}_j\,(q_{t,i}\cdot k_{j,i}\,/"
              r"\sqrt{d_h+d_h^R})\ v^C_{j,i}$" f"   {n_h}\u00d7{d_v}", 6.8, 7.7, 7.4),
        "u": (f"$u$   {d}", 6.8, 9.35, 1.7),
    }
    for start, end, text, shift in _FLOW_ARROWS:
        (_, x0, y0, _), (_, x1, y1, _) = boxes[start], boxes[end]
        x1, y0, y1 = x1 + shift, y0 + 0.38, y1 - 0.38
        ax.annotate("", (x1, y1), (x0, y0), arrowprops={
            "arrowstyle": "-|>", "color": "#666666", "shrinkA": 0, "shrinkB": 0, "lw": 1.1})
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, "" if end == "c_q" and not d_cq else text,
                ha="center", va="center", fontsize=9.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    for name, (text, x, y, width) in boxes.items():
        kept = name in ("c_kv", "k_r")
        _box(ax, x, y, width, 0.76, text, COLORS["MLA"] if kept else GREY, kept, 10.5)
    return figure

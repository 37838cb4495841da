# SPDX-License-Identifier: MIT
"""The whole model: one block drawn with the sizes of a Config, where parameters sit, FLOPs."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter

from dsv2_ref.config import Config
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled, tokens_label

PLAIN, WEIGHT, CACHED = "#FFFFFF", "#E8EEF4", "#FFE2A8"
SHARED, CHOSEN, PAIRS = "#F2D5E4", "#BFE5D9", "#444444"
# what a parameter is for, by the names of `cost.Parameters`; the rest is one bar
PARTS = {
    "routed": MORE_COLORS[1], "attention": COLORS["MLA"], "shared": MORE_COLORS[0],
    "dense": MORE_COLORS[2],
}
REST = ("embedding", "head", "router", "norms")
# a form of attention: its colour, and what it is used for
FORMS = {"expanded": (MORE_COLORS[1], "prompt, training"), "absorbed": (COLORS["MLA"], "decoding")}


class _Drawing:
    """Boxes and arrows on axes whose unit is a tenth of an inch."""

    def __init__(self, ax: Axes) -> None:
        self.ax = ax

    def box(self, x: float, y: float, w: float, text: str, color: str = WEIGHT, h: float = 4.6,
            size: float = 10.0) -> None:
        """A box of width w and height h whose lower left corner is (x, y)."""
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=0.7",
                                         fc=color, ec=INK, lw=1.1))
        self.text(x + w / 2, y + h / 2, text, size)

    def frame(self, x: float, y: float, w: float, h: float, title: str = "") -> None:
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=1.2",
                                         fc="none", ec="#888888", lw=1.0, ls="--"))
        if title:
            self.ax.text(x + w / 2, y + h - 1, title, ha="center", va="top", fontweight="bold",
                         fontsize=11)

    def text(self, x: float, y: float, text: str, size: float = 10.0, ha: str = "center") -> None:
        self.ax.text(x, y, text, ha=ha, va="center", fontsize=size, linespacing=1.15)

    def arrow(self, *points: tuple[float, float], ls: str = "-") -> None:
        """A line through the points with a head at the last one."""
        (*_, before, last) = points
        if len(points) > 2:
            self.ax.plot(*zip(*points[:-1]), color=INK, lw=1.1, solid_capstyle="butt")
        self.ax.annotate("", last, before, arrowprops={
            "arrowstyle": "-|>", "color": INK, "lw": 1.1, "ls": ls, "shrinkA": 0, "shrinkB": 0})

    def plus(self, x: float, y: float) -> None:
        self.ax.plot(x, y, "o", ms=15, mfc=PLAIN, mec=INK, mew=1.1, zorder=3)
        self.ax.plot(x, y, "+", ms=9, color=INK, mew=1.3, zorder=4)


@styled
def architecture(config: Config, name: str) -> Figure:
    """The model `name` from token ids to logits, one block of it opened, sizes written in."""
    figure = Picture(10.8, 7.1)
    ax = figure.subplots()
    ax.set(xlim=(0, 108), ylim=(0, 66), aspect="equal")
    ax.axis("off")
    drawing, c = _Drawing(ax), config
    _stack(drawing, c)
    _attention(drawing, c)
    _mixture(drawing, c)
    kept = c.n_h * (c.d_h + c.d_v)
    ax.set_title(f"{name}: {c.d_c} + {c.d_r} numbers cached per layer instead of {kept:,}, and "
                 f"{c.top_k} of {c.n_routed} routed experts per token")
    return figure


def _stack(draw: _Drawing, c: Config) -> None:
    """The left column: from token ids to logits."""
    x, w = 1.0, 18.0
    middle = x + w / 2
    draw.text(middle, 1.0, "token ids")
    draw.arrow((middle, 2.2), (middle, 4.0))
    draw.box(x, 4.0, w, f"embedding\n{c.vocab:,} × {c.d:,}")
    draw.frame(x - 0.8, 10.6, w + 4.6, 37.4)
    draw.text(middle + 1.6, 46.2, f"{c.n_layers} blocks", 11, "left")
    draw.arrow((middle, 8.6), (middle, 13.0))
    draw.box(x, 13.0, w, "RMSNorm", PLAIN, 2.8)
    draw.arrow((middle, 15.8), (middle, 17.6))
    draw.box(x, 17.6, w, f"MLA\n{c.n_h} heads")
    draw.arrow((middle, 22.2), (middle, 25.6))
    draw.plus(middle, 25.6)
    draw.arrow((middle, 26.8), (middle, 30.0))
    draw.box(x, 30.0, w, "RMSNorm", PLAIN, 2.8)
    draw.arrow((middle, 32.8), (middle, 34.6))
    ffn = "DeepSeekMoE"
    if c.n_dense:
        first = "layer 0" if c.n_dense == 1 else f"layers 0 to {c.n_dense - 1}"
        ffn += f"\n({first}: dense FFN\nof width {c.dense_width:,})"
    draw.box(x, 34.6, w, ffn, h=6.2, size=9.5)
    draw.arrow((middle, 40.8), (middle, 43.6))
    draw.plus(middle, 43.6)
    side = x + w + 2.2
    for start, end in ((11.8, 25.6), (28.2, 43.6)):        # the stream passes by un-normed
        draw.arrow((middle, start), (side, start), (side, end), (middle + 1.1, end))
    draw.arrow((middle, 44.8), (middle, 50.4))
    draw.box(x, 50.4, w, "RMSNorm", PLAIN, 2.8)
    draw.arrow((middle, 53.2), (middle, 55.2))
    draw.box(x, 55.2, w, "head" + (" = embedding" if c.tie_embeddings else "")
             + f"\n{c.d:,} × {c.vocab:,}")
    draw.arrow((middle, 59.8), (middle, 62.6))
    draw.text(middle, 63.8, "logits of the next token")


def _attention(draw: _Drawing, c: Config) -> None:
    """The middle: multi-head latent attention."""
    x = 27.0
    draw.frame(x - 1, 3.0, 42, 62.0, "Multi-head latent attention (MLA)")
    draw.box(x + 9, 5.0, 22, f"normed stream, d = {c.d:,}", PLAIN, 3.0)
    draw.box(x + 1, 14.4, 14.5, f"c_q: {c.d_cq:,}" if c.d_cq else "no query latent", PLAIN, 3.2)
    draw.arrow((x + 12, 8.0), (x + 8.2, 14.4))
    if c.d_cq:
        draw.text(x + 3.9, 11.2, "W_DQ, norm", 9)
    for left, size, width, weight in ((0, c.d_h, 9, "W_UQ"), (10, c.d_r, 8, "W_QR, RoPE")):
        draw.box(x + left, 27.6, width, f"q_{'rc'[left == 0]}\n{c.n_h} × {size}", PLAIN)
        draw.arrow((x + 8.2, 17.6), (x + left + width / 2, 27.6))
        draw.text(x + (14.8 if left else 3.4), 20.2 if left else 22.0, weight, 9)
        draw.arrow((x + left + width / 2, 32.2), (x + left + width / 2, 40.0))
    draw.box(x + 19, 14.4, 12, f"c_kv: {c.d_c}", CACHED, 3.2)
    draw.box(x + 32.5, 14.4, 7, f"k_r: {c.d_r}", CACHED, 3.2)
    draw.arrow((x + 25, 8.0), (x + 25, 14.4))
    draw.text(x + 19.6, 11.2, "W_DKV, norm", 9)
    draw.arrow((x + 29, 8.0), (x + 36, 14.4))
    draw.text(x + 36.2, 10.4, "W_KR,\nRoPE", 9)
    for left, kind, size, weight in ((19, "k_c", c.d_h, "W_UK"), (29, "v_c", c.d_v, "W_UV")):
        draw.box(x + left, 27.6, 8.5, f"{kind}\n{c.n_h} × {size}", PLAIN)
        draw.arrow((x + 25, 17.6), (x + left + 4.2, 27.6))
        draw.text(x + (21.4 if left == 19 else 33.8), 22.6 if left == 19 else 24.6, weight, 9)
        draw.arrow((x + left + 4.2, 32.2), (x + left + 4.2, 40.0))
    draw.arrow((x + 39, 17.6), (x + 39, 40.0))
    draw.text(x + 34.6, 20.3, "one for\nall heads", 8.5)
    draw.box(x, 40.0, 40, f"{c.n_h} heads: softmax of (q_c·k_c + q_r·k_r) × scale,\n"
                          "over the tokens so far, times v_c", h=5.4)
    draw.arrow((x + 20, 45.4), (x + 20, 49.4))
    draw.box(x + 12, 49.4, 16, f"o: {c.n_h} × {c.d_v}", PLAIN, 3.2)
    draw.arrow((x + 20, 52.6), (x + 20, 57.0))
    draw.text(x + 23.2, 54.6, "W_O", 9)
    draw.box(x + 8, 57.0, 24, f"what attention adds: {c.d:,}", PLAIN, 3.2)
    draw.box(x + 30, 49.4, 9.8, "cached", CACHED, 3.2)


def _mixture(draw: _Drawing, c: Config) -> None:
    """The right: shared and routed experts."""
    x = 71.5
    draw.frame(x - 1, 3.0, 37, 62.0, "DeepSeekMoE")
    draw.box(x, 5.0, 35, f"normed stream, d = {c.d:,}", PLAIN, 3.0)
    where = f"the {c.top_k} best"
    if c.max_devices is not None:
        where += f",\non {c.max_devices} of {c.n_devices} devices"
    draw.box(x + 15.2, 11.6, 15.0, f"router: {c.n_routed}\naffinities,\n{where}", h=8.0)
    draw.arrow((x + 22.7, 8.0), (x + 22.7, 11.6))
    shared = [str(i + 1) for i in range(min(c.n_shared, 2))]
    names = [str(i + 1) for i in range(c.n_routed)]
    if len(names) > 5:
        names = [*names[:3], "…", names[-1]]
    chosen = {names[0], names[-1]} if c.top_k > 1 else {names[0]}
    for i, name in enumerate(shared):
        left = x + 4.4 * i
        draw.box(left, 29.0, 3.8, name, SHARED, 6.0)
        draw.arrow((left + 1.9, 8.0), (left + 1.9, 29.0))
        draw.arrow((left + 1.9, 35.0), (x + 17, 49.4))
    for i, name in enumerate(names):
        left = x + 11.0 + 19.2 * i / max(len(names) - 1, 1)
        if name == "…":
            draw.text(left + 1.9, 32.0, "…", 14)
            continue
        draw.box(left, 29.0, 4.2, name, CHOSEN if name in chosen else PLAIN, 6.0,
                 size=10 if len(name) < 3 else 8.5)
        if name in chosen:
            draw.arrow((left + 2.1, 8.0), (left + 2.1, 29.0))
            draw.arrow((x + 22.7, 19.6), (left + (3.4 if name == names[0] else 0.8), 29.0), ls="--")
            draw.arrow((left + 2.1, 35.0), (x + 17, 49.4))
    draw.text(x + 22.7, 26.6, "picks the\nchosen ones", 8.5)
    draw.text(x + 30.4, 44.8, f"{c.n_routed} routed\nof width {c.expert_width:,},\n"
                              "each × its gate", 9)
    draw.text(x + 4.0, 44.0, f"{c.n_shared} shared,\nalways", 9)
    draw.box(x + 9, 49.4, 16, "sum", PLAIN, 3.2)
    draw.arrow((x + 17, 52.6), (x + 17, 57.0))
    draw.text(x + 18.4, 54.8, "+ un-normed stream", 9, "left")
    draw.box(x + 9, 57.0, 16, f"h': {c.d:,}", PLAIN, 3.2)


@styled
def parameter_shares(total: Mapping[str, int], activated: Mapping[str, int]) -> Figure:
    """Two bars of 100 %: where all parameters sit, and where those that one token passes sit.

    total, activated: numbers of parameters by part, the names in PARTS and REST.
    """
    for name, parts in (("total", total), ("activated", activated)):
        if not set(parts) <= {*PARTS, *REST} or sum(parts.values()) <= 0:
            raise ValueError(f"{name}: parts {sorted(parts)}, expected some of "
                             f"{sorted((*PARTS, *REST))}")
    rows = {f"{label}\n{sum(parts.values()) / 1e9:.4g}B": _summed(parts)
            for label, parts in (("all", total), ("for a token", activated))}
    routed = [100 * parts["routed"] / sum(parts.values()) for parts in rows.values()]
    return _hundred_per_cent(rows, 3.0, "share of the parameters (%)",
                             f"Routed experts are {routed[0]:.0f} % of all parameters, "
                             f"{routed[1]:.0f} % of a token's")


def _summed(parts: Mapping[str, float]) -> dict[str, float]:
    """The named parts, and the small ones as one."""
    small = [part for part in REST if part in parts]
    return {part: parts.get(part, 0) for part in PARTS} | {
        fill(", ".join(small), 18): sum(parts[part] for part in small)}


def _hundred_per_cent(rows: Mapping[str, Mapping[str, float]], height: float, xlabel: str,
                      title: str) -> Picture:
    """A stacked bar for each row, its parts in per cent of their sum, the first row on top."""
    figure = Picture(8.8, height)
    ax = figure.subplots()
    for label, parts in rows.items():
        whole, left = sum(parts.values()), 0.0
        for part, n in parts.items():
            share = 100 * n / whole
            color = PAIRS if part.startswith("pairs") else PARTS.get(part, MORE_COLORS[3])
            ax.barh(label, share, left=left, color=color, height=0.6,
                    label=part if label == next(iter(rows)) else None)
            if share >= 4:
                ax.text(left + share / 2, label, f"{share:.0f}", ha="center", va="center",
                        color="white", fontweight="bold")
            left += share
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 100), xlabel=xlabel, title=title)
    figure.legend(loc="outside right center")
    return figure


@styled
def flops_by_part(
    parts: Mapping[str, float], pair: float, context: Sequence[int], form: str
) -> Figure:
    """A bar of 100 % for each context: what a token's FLOPs are spent on.

    parts: part -> FLOPs of its matrices, names as in `parameter_shares`; pair: FLOPs of a query on
    one token; context: tokens attended to, ascending; form: of attention.
    """
    if not set(parts) <= {*PARTS, *REST} or form not in FORMS:
        raise ValueError(f"parts, form: {sorted(parts)}, {form!r}, expected some of "
                         f"{sorted((*PARTS, *REST))} and one of {sorted(FORMS)}")
    if not context or min(pair, sum(parts.values()), *context) <= 0:
        raise ValueError(f"pair, context: {pair}, {list(context)}, expected positive numbers")
    whole = [sum(parts.values()) + n * pair for n in context]
    rows = {f"{tokens_label(n)} tokens\n{flops / 1e9:,.0f} GFLOP":
            _summed(parts) | {f"pairs, {form}": n * pair} for n, flops in zip(context, whole)}
    told = ", ".join(f"{100 * context[i] * pair / whole[i]:.0f} % at {tokens_label(context[i])}"
                     for i in (0, -1))
    return _hundred_per_cent(rows, 0.75 * len(context) + 1.3,
                             f"share of the FLOPs of one token, {FORMS[form][1]} (%)",
                             f"Of a token's FLOPs pairs take {told}")


@styled
def flops_against_context(
    context: Sequence[int], matrices: float, pairs: Mapping[str, float]
) -> Figure:
    """FLOPs of one token's forward pass against the tokens that it attends to.

    matrices: FLOPs of all its matrices; pairs: form of attention -> FLOPs of a pair of a query and
    a cached token.
    """
    if not pairs or not set(pairs) <= set(FORMS) or min(matrices, *pairs.values()) <= 0:
        raise ValueError(f"matrices, pairs: {matrices}, {dict(pairs)}, expected positive numbers, "
                         f"of one of {sorted(FORMS)} at least")
    x = np.asarray(context, float)
    figure = Picture(8.9, 4.2)
    ax = figure.subplots()
    ax.axhline(matrices / 1e9, color=INK, lw=1.6, ls="--")
    ax.annotate("all matrices", (x[0], matrices / 1e9), (4, 5), textcoords="offset points")
    for form, each in pairs.items():
        color, used_for = FORMS[form]
        ax.plot(x, x * each / 1e9, color=color, marker="o", ms=4,
                label=f"pairs, {form} ({used_for})")
    told = " or ".join(f"{float(f'{matrices / each:.2g}'):,.0f} ({form})"
                       for form, each in pairs.items())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: tokens_label(n)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.minorticks_off()
    ax.set(xlabel="context (tokens attended to)", ylabel="FLOPs of one token (GFLOP)",
           title=f"Pairs cost as much as all matrices at {told} tokens")
    ax.grid(True)
    ax.legend(loc="lower right")
    return figure

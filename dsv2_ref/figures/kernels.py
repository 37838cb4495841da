# SPDX-License-Identifier: MIT
"""What kernels do and what limits them: programs, tiles, a softmax in pieces, rooflines."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, color_of, styled

TILE_COLORS = {"whole": COLORS["MLA"], "masked": COLORS["MQA"], "skipped": "#EEEEEE"}
PENDING = "GPU numbers pending:\nthe lines are limits, nothing was timed"


@styled
def program_grid(n: int, block: int) -> Figure:
    """Which program of a kernel owns which of n places, `block` at a time; some do not exist."""
    if min(n, block) < 1:
        raise ValueError(f"n, block: {n}, {block}, expected positive numbers")
    programs = -(-n // block)
    figure = Picture(8.4, 2.3)
    ax = figure.subplots()
    colors = (COLORS["MLA"], COLORS["GQA"], MORE_COLORS[1], COLORS["MQA"])
    for place in range(programs * block):
        color = colors[place // block % 4]
        there = place < n
        ax.add_patch(Rectangle((place + 0.04, 0), 0.92, 1, facecolor=color if there else "white",
                               edgecolor=color, ls="-" if there else "--", lw=1.5))
        ax.annotate(str(place), (place + 0.5, 0.5), ha="center", va="center",
                    color="white" if there else INK)
    for i in range(programs):
        ax.annotate(f"program {i}", ((i + 0.5) * block, 1.15), ha="center", color=colors[i % 4])
    ax.set(xlim=(0, programs * block), ylim=(-0.1, 1.5), xlabel="place in memory",
           title=f"{programs} programs of {block} places; {programs * block - n} of these do not "
                 "exist")
    ax.set(xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    return figure


def tile_kinds(T: int, S: int, BM: int, BN: int) -> np.ndarray:
    """(⌈T/BM⌉, ⌈S/BN⌉) of "whole", "masked" or "skipped": causal, the queries the last T of S."""
    if min(T, BM, BN) < 1 or S < T:
        raise ValueError(f"T, S, BM, BN: {T}, {S}, {BM}, {BN}, expected positive numbers, S >= T")
    first = np.arange(0, T, BM)[:, None]                    # of the queries of a tile, and the last
    last = np.minimum(first + BM, T) - 1
    left = np.arange(0, S, BN)[None]
    right = np.minimum(left + BN, S) - 1
    return np.where(left > last + S - T, "skipped",
                    np.where(right <= first + S - T, "whole", "masked"))


@styled
def attention_tiles(T: int, S: int, BM: int, BN: int) -> Figure:
    """The T×S scores of causal attention, cut into tiles of BM queries and BN keys."""
    kinds = tile_kinds(T, S, BM, BN)
    figure = Picture(6.6, 4.6)
    ax = figure.subplots()
    for i, row in enumerate(kinds):
        for j, kind in enumerate(row):
            width, height = min(BN, S - j * BN), min(BM, T - i * BM)
            ax.add_patch(Rectangle((j * BN, i * BM), width, height, facecolor=TILE_COLORS[kind],
                                   edgecolor="white", lw=2.5))
    ax.plot(np.repeat(np.arange(S - T + 1, S + 1), 2), np.repeat(np.arange(T + 1), 2)[1:-1],
            color=INK, lw=1.4)
    count = {kind: int((kinds == kind).sum()) for kind in TILE_COLORS}
    names = {"whole": "computed, no mask", "masked": "computed, masked", "skipped": "never loaded"}
    figure.legend(handles=[Patch(facecolor=TILE_COLORS[k], label=f"{names[k]}: {count[k]}")
                           for k in TILE_COLORS], loc="outside right center")
    ax.set(xlim=(0, S), ylim=(T, 0), xlabel="key", ylabel="query",
           title=f"{count['skipped']} of {kinds.size} tiles are never loaded, "
                 f"{count['masked']} need a mask")
    ax.tick_params(length=0)
    return figure


def shares(scores: Sequence[float], tile: int) -> list[np.ndarray]:
    """After each tile, the share of each key seen so far in a softmax of base 2."""
    seen = [np.asarray(scores[: n + tile], float) for n in range(0, len(scores), tile)]
    weights = [np.exp2(s - s.max()) for s in seen]
    return [w / w.sum() for w in weights]


@styled
def softmax_in_pieces(scores: Sequence[float], tile: int) -> Figure:
    """Shares of one query's keys after each tile of `tile` keys; scores in powers of two."""
    if tile < 1 or len(scores) <= tile:
        raise ValueError(f"scores: {len(scores)} with tiles of {tile}, expected two tiles at least")
    steps = shares(scores, tile)
    figure = Picture(8.0, 0.75 * len(steps) + 1.3)
    ax = figure.subplots()
    for i, step in enumerate(steps):
        left = np.concatenate(([0.0], step.cumsum()))
        for j, share in enumerate(step):
            color = (COLORS["MLA"], COLORS["GQA"], *MORE_COLORS)[j // tile % 6]
            ax.barh(i, share, left=left[j], height=0.62, color=color, edgecolor="white", lw=1.5)
            if share > 0.06:
                ax.annotate(f"key {j}\n{share:.2f}", (left[j] + share / 2, i), ha="center",
                            va="center", color="white", fontsize=8.5)
    shrinks = ", ".join(f"{b[0] / a[0]:.2f}" for a, b in zip(steps, steps[1:]))
    ax.set(yticks=range(len(steps)), yticklabels=[f"after tile {i + 1}" for i in range(len(steps))],
           xlim=(0, 1), xlabel="share of the softmax so far",
           title=f"A new tile shrinks all earlier shares by one factor: {shrinks}")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return figure


def _roof(ax: Axes, memory_tb: float, matrix_tf: float, card: str) -> None:
    """Both limits, where they meet, and their names; logarithmic axes."""
    ridge = matrix_tf / memory_tb
    x = np.geomspace(8, 1024, 200)
    ax.plot(x, np.minimum(x * memory_tb, matrix_tf), color=INK)
    ax.axvline(ridge, color=INK, lw=1.0, ls=":")
    ax.annotate(f"ridge: {ridge:.0f} FLOP/byte", (ridge, 64), (-5, 0), rotation=90, ha="right",
                textcoords="offset points", va="bottom", fontsize=9.5)
    ax.annotate(f"memory: {memory_tb:g} TB/s", (12, 12 * memory_tb), (-8, 9), rotation=33,
                textcoords="offset points", fontsize=9.5)
    ax.annotate(f"matrix units: {matrix_tf:g} TFLOP/s\n({card})", (1000, matrix_tf), (0, 5),
                textcoords="offset points", fontsize=9.5, ha="right")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axis.set_minor_locator(NullLocator())
    ax.grid(True)


@styled
def decode_roofline(
    work: Mapping[str, tuple[float, float]], memory_tb: float, matrix_tf: float, card: str,
    measured: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """What a card can do at most against operations per byte, and where decoding stands.

    work: name -> (FLOPs, bytes) of one cached token; memory_tb in TB/s, matrix_tf in TFLOP/s, both
    of `card`; measured: name -> (FLOPs per byte, TFLOP/s). Without any, the picture says so.
    """
    if not work or min(min(pair) for pair in work.values()) <= 0:
        raise ValueError(f"work: {dict(work)}, expected (FLOPs, bytes), positive, of one at least")
    ridge = matrix_tf / memory_tb
    figure = Picture(8.4, 5.0)
    ax = figure.subplots()
    _roof(ax, memory_tb, matrix_tf, card)
    for i, (name, (flops, nbytes)) in enumerate(work.items()):
        at = flops / nbytes
        top = min(at * memory_tb, matrix_tf)
        color = COLORS["MLA"] if at < ridge else COLORS["MHA"]
        ax.plot([at, at], [32, top], color=color, lw=1.2, alpha=0.5)
        ax.plot(at, top, marker="o", ms=8, mfc="white", mec=color, mew=2)
        left = i % 2 and at < ridge                # neighbours on either side of the line
        ax.annotate(f"{name}\n{at:.0f}", (at, top), (-8, 3) if left else (7, -10),
                    textcoords="offset points", fontsize=9.5, color=color,
                    ha="right" if left else "left", va="bottom" if left else "top")
    for name, (at, tflops) in (measured or {}).items():
        ax.plot(at, tflops, marker="D", ms=7, color=MORE_COLORS[1])
        ax.annotate(name, (at, tflops), (-8, -4), textcoords="offset points", fontsize=9,
                    ha="right")
    if not measured:
        ax.annotate(PENDING, (0.97, 0.06), xycoords="axes fraction", ha="right", color=INK,
                    bbox={"boxstyle": "round", "fc": "#FFF6D5", "ec": COLORS["GQA"]})
    slow = [name for name, (flops, nbytes) in work.items() if flops / nbytes < ridge]
    ax.set(xlim=(8, 1024), ylim=(32, matrix_tf * 2), xlabel="operations per byte read (FLOP/byte)",
           ylabel="at most (TFLOP/s)",
           title=f"Memory is the limit of {len(slow)} of {len(work)}: those left of the ridge")
    return figure


@styled
def bytes_moved(ways: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """Bytes of memory traffic a cached token, in parts; others are compared with the first way.

    ways: name -> (what, bytes) of each pass over the memory.
    """
    if len(ways) < 2 or not all(ways.values()):
        raise ValueError(f"ways: {dict(ways)}, expected two at least, with one part or more each")
    figure = Picture(8.2, 0.75 * len(ways) + 1.3)
    ax = figure.subplots()
    totals = {way: sum(size for _, size in parts) for way, parts in ways.items()}
    base = next(iter(totals.values()))
    for way, parts in ways.items():
        left = 0.0
        for i, (what, size) in enumerate(parts):
            ax.barh(way, size, left=left, height=0.62, edgecolor="white", lw=1.5,
                    color=(COLORS["MLA"], COLORS["GQA"], COLORS["MQA"])[i % 3])
            ax.annotate(what, (left + size / 2, way), ha="center", va="center", fontsize=9,
                        color="white" if i % 3 == 0 else INK)
            left += size
        ax.annotate(f"{left:,.0f}", (left, way), (5, 0), textcoords="offset points", va="center")
    told = [f"{way}: {base / size:.2g} times less" if size < base else
            f"{way}: {size / base:.2g} times more" for way, size in list(totals.items())[1:]]
    ax.set(xlim=(0, max(totals.values()) * 1.12), xlabel="memory traffic of one cached token "
           "and layer (bytes)", title="\n".join(told))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return figure


@styled
def decode_floors(
    heads: Sequence[int], flops_per_head: float, nbytes: Mapping[str, float], tokens: int,
    memory_tb: float, matrix_tf: float,
) -> Figure:
    """The least time of one layer's decoding against the number of heads, for each kind of cache.

    flops_per_head and nbytes: of one cached token; tokens: cached ones of all sequences together.
    The first kind of cache is what the last is compared with.
    """
    if len(heads) < 2 or len(nbytes) < 2:
        raise ValueError(f"heads, nbytes: {len(heads)}, {len(nbytes)} given, expected two of each")
    def floor(h: np.ndarray, size: float) -> np.ndarray:                   # microseconds
        return tokens * np.maximum(flops_per_head * h / matrix_tf, size / memory_tb) / 1e6

    h, smooth = np.asarray(heads, float), np.geomspace(min(heads), max(heads), 200)
    figure = Picture(8.0, 4.6)
    ax = figure.subplots()
    ax.plot(smooth, floor(smooth, 0), color=INK, lw=1.2, ls=":", label="multiplying alone")
    for i, (kind, size) in enumerate(nbytes.items()):
        color = COLORS["MLA"] if i == 0 else color_of(kind, list(nbytes))
        ax.plot(smooth, floor(smooth, size), color=color, label=f"{kind}: {size:.0f} bytes")
        ax.plot(h, floor(h, size), color=color, marker="o", ms=5, ls="")
    kinds = list(nbytes)
    first, last = (floor(h, nbytes[kind]) for kind in (kinds[0], kinds[-1]))
    gain = first / last
    for n, y, g in zip(h, first, gain):
        ax.annotate(f"{g:.1f}x", (n, y), (0, 8), textcoords="offset points", ha="center")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(ylim=(0, max(first) * 1.12), xticks=h, xlabel="heads", ylabel="at least (µs per layer)",
           title=f"{kinds[-1]} gains {gain[0]:.1f}x at {heads[0]} heads and "
                 f"{gain[-1]:.1f}x at {heads[-1]}")
    ax.grid(True)
    ax.legend(loc="center left")
    return figure


@styled
def launch_bars(ways: Mapping[str, Mapping[str, int]], layers: int) -> Figure:
    """Launches of a step by what they are, one bar for each way of making it.

    ways: way -> kind -> launches of all `layers`; a kind may be missing in some.
    """
    if not ways or layers < 1 or not all(ways.values()):
        raise ValueError(f"ways: {dict(ways)}, layers: {layers}, expected launches of one way and "
                         "one layer at least")
    most = {kind: max(way.get(kind, 0) for way in ways.values()) / layers
            for way in ways.values() for kind in way}
    kinds = sorted(most, key=most.__getitem__, reverse=True)
    figure = Picture(8.4, 0.5 * len(kinds) + 1.7)
    ax = figure.subplots()
    height, colors = 0.8 / len(ways), (COLORS["GQA"], COLORS["MLA"], *MORE_COLORS)
    for i, (name, found) in enumerate(ways.items()):
        at = np.arange(len(kinds)) + (i + 0.5) * height - 0.4
        n = [found.get(kind, 0) / layers for kind in kinds]
        ax.barh(at, n, height=height * 0.92, color=colors[i],
                label=f"{name}: {sum(found.values()):,}")
        for y, x in zip(at, n):
            ax.annotate(f"{x:.0f}" if round(x, 1) == round(x) else f"{x:.1f}", (x, y), (4, 0),
                        textcoords="offset points", va="center", fontsize=9)
    each = [sum(found.values()) / layers for found in ways.values()]
    ax.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="launches a layer",
           xlim=(0, max(most.values()) * 1.1),
           title=f"Launches a layer: {' to '.join(f'{n:.0f}' for n in each)}")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.legend(loc="lower right")
    return figure

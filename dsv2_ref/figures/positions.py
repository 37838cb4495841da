# SPDX-License-Identifier: MIT
"""Positions: turned pairs, clocks, scores and errors against distance, what YaRN does to pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, png, styled

LINES = (COLORS["MLA"], COLORS["MHA"], MORE_COLORS[1], MORE_COLORS[0])


@styled
def turned_pair(pair: Sequence[float], radians: float, positions: Sequence[int]) -> Figure:
    """One pair (a, b) as an arrow in the plane, at each of the positions."""
    length, figure = float(np.hypot(*pair)), Picture(4.6, 4.4)
    if length == 0:
        raise ValueError("pair: (0, 0), expected an arrow that can be turned")
    ax, start = figure.subplots(), np.arctan2(pair[1], pair[0])
    circle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(length * np.cos(circle), length * np.sin(circle), color="#BBBBBB", lw=1)
    for i, position in enumerate(positions):
        angle = start + position * radians
        x, y = length * np.cos(angle), length * np.sin(angle)
        ax.annotate("", (x, y), (0, 0), arrowprops={
            "arrowstyle": "-|>", "lw": 2.2, "shrinkA": 0, "shrinkB": 0, "color": COLORS["MLA"],
            "alpha": 1 - 0.7 * i / max(len(positions), 1)})
        ax.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center")
    limit = 1.4 * length
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal",
           xlabel="first number of the pair", ylabel="second number of the pair",
           title=f"Each position turns the pair by {np.degrees(radians):.3g}\u00b0")
    ax.grid(True)
    return figure


def _clock(ax: Axes, x: float, y: float, angle: float) -> None:
    circle = np.linspace(0, 2 * np.pi, 60)
    ax.plot(x + 0.38 * np.cos(circle), y + 0.38 * np.sin(circle), color="#AAAAAA", lw=1)
    ax.plot([x, x + 0.36 * np.cos(angle)], [y, y - 0.36 * np.sin(angle)], color=COLORS["MLA"], lw=2)


@styled
def pair_clocks(frequencies: Any, positions: Sequence[int], pairs: Sequence[int]) -> Figure:
    """Each chosen pair as the hand of a clock (a column), at several positions (the rows).

    frequencies: radians per position, of all pairs.
    """
    frequencies = np.asarray(frequencies, float)
    if not pairs or min(pairs) < 0 or max(pairs) >= len(frequencies):
        raise ValueError(f"pairs: {list(pairs)}, expected numbers from 0 to {len(frequencies) - 1}")
    fast, slow = (2 * np.pi / frequencies[list(pairs)][i] for i in (0, -1))
    figure = Picture(max(0.82 * len(pairs) + 1.6, 6.8), 0.82 * len(positions) + 1.1)
    ax = figure.subplots()
    for i, position in enumerate(positions):
        for j, pair in enumerate(pairs):
            _clock(ax, j, i, float(position * frequencies[pair]))
    ax.set(xlim=(-0.6, len(pairs) - 0.4), ylim=(len(positions) - 0.5, -0.5), aspect="equal",
           anchor="W", xlabel="pair of numbers", ylabel="position",
           title=f"Pair {pairs[0]} turns once in {fast:,.3g} positions, pair {pairs[-1]} in "
                 f"{slow:,.0f}")
    ax.set_xticks(range(len(pairs)), pairs)
    ax.set_yticks(range(len(positions)), [f"{p:,}" for p in positions])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def position_slider(frequencies: Any, pairs: Sequence[int], last: int) -> Any:
    """A slider over positions 0 to `last` and below it the clocks of the pairs at that position."""
    def draw(position: int) -> bytes:
        return png(pair_clocks(frequencies, [position], pairs))

    return slider("position", range(last + 1), 0, draw, width=820)


def _lines(x: Any, curves: Mapping[str, Any], title: str, xlabel: str, ylabel: str,
           log: bool = False) -> Figure:
    """One line per curve, named below the axes."""
    if not curves or any(len(y) != len(x) for y in curves.values()):
        raise ValueError(f"curves: lengths {[len(y) for y in curves.values()]}, expected at least "
                         f"one curve, each of {len(x)} numbers")
    figure = Picture(7.6, 4.3)
    ax = figure.subplots()
    for (name, y), color in zip(curves.items(), LINES):
        ax.plot(x, np.asarray(y, float), color=color, label=name, marker="o" if log else "", ms=4)
    if log:
        ax.set(xscale="log", yscale="log")
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    figure.legend(loc="outside lower center", ncols=2)
    ax.grid(True)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


@styled
def losses_by_position(edges: Sequence[int], curves: Mapping[str, Any]) -> Figure:
    """Mean loss (nats per token) of groups of positions; the first curve is right, the second not.

    edges: group i is positions edges[i] to edges[i + 1] - 1, so there is one edge more than groups.
    """
    if len(edges) < 3:
        raise ValueError(f"edges: {list(edges)}, expected at least three, for two groups")
    groups = [f"{a}\u2013{b - 1}" for a, b in zip(edges, edges[1:])]
    (_, right), (name, wrong) = list(curves.items())[:2]
    figure = _lines(range(len(groups)), curves,
                    f"{name}: {wrong[1] - right[1]:+.2f} nats at tokens {groups[1]}, "
                    f"{wrong[-1] - right[-1]:+.2f} at {groups[-1]}",
                    "position in the text (tokens)", "mean loss (nats per token)")
    ax = figure.axes[0]
    for line in ax.lines:
        line.set(marker="o", markersize=5)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(xlim=(-0.4, len(groups) - 0.6), ylim=(0, None))
    return figure


@styled
def angle_errors(positions: Sequence[int], errors: Mapping[str, Any]) -> Figure:
    """Largest error of an angle over all pairs, in radians, against position; logarithmic."""
    worst = max(errors, key=lambda name: errors[name][-1])
    return _lines(positions, errors, f"{worst}: off by {errors[worst][-1]:.2g} rad at position "
                  f"{positions[-1]:,}", "position", "largest error of an angle (rad)",
                  log=True)


@styled
def errors_by_position(errors: Mapping[str, Any], what: str) -> Figure:
    """Relative error of an output at positions 0, 1, 2 ...; `what` begins the title."""
    first, n = max(float(y[0]) for y in errors.values()), len(next(iter(errors.values())))
    rest = min(float(np.min(y[1:])) for y in errors.values())
    return _lines(range(n), errors,
                  f"{what}: error {first:.2g} at position 0, at least {rest:.2g} after it",
                  "position (tokens)", "error relative to the output")


@styled
def yarn_pairs(frequencies: Any, stretched: Any, ramp: Any, original_positions: int) -> Figure:
    """Turns that each pair makes inside the original context, before and after YaRN.

    ramp: share of interpolation, 0 (kept) to 1 (angle divided by the factor).
    """
    before, after, ramp = (np.asarray(v, float) for v in (frequencies, stretched, ramp))
    kept, divided = int((ramp == 0).sum()), int((ramp == 1).sum())
    turns, figure = original_positions / (2 * np.pi), Picture(7.6, 4.2)
    ax = figure.subplots()
    ax.plot(before * turns, color="#999999", marker="o", ms=4, label="plain RoPE")
    ax.plot(after * turns, color=COLORS["MLA"], marker="o", ms=4, label="under YaRN")
    ax.axvspan(kept - 0.5, len(ramp) - divided - 0.5, color="#EEEEEE", zorder=0)
    for middle, text in (((kept - 1) / 2, "kept"), (len(ramp) - (divided + 1) / 2, "divided"),
                         ((kept + len(ramp) - divided - 1) / 2, "mixed")):
        ax.text(middle, 1.5 * turns, text, ha="center", va="bottom", color=INK)
    ax.axhline(1, color=INK, lw=1, ls="--")
    ax.annotate("one turn", (0, 1), (0, -4), textcoords="offset points", va="top")
    ax.set(yscale="log", ylim=(None, turns * 4), xlabel="pair of numbers",
           ylabel=f"turns in {original_positions:,} positions",
           title=f"YaRN keeps {kept} of {len(ramp)} pairs, divides {divided}, mixes the "
                 f"{len(ramp) - kept - divided} between")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(0.0, 0.2))
    return figure

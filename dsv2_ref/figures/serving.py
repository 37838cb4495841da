# SPDX-License-Identifier: MIT
"""Serving: pages and who holds them, who takes part in which pass, what a larger batch brings."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled

HOLDERS = (COLORS["MLA"], COLORS["MHA"], MORE_COLORS[1], MORE_COLORS[0], COLORS["GQA"])
SHARED, FREE = MORE_COLORS[3], "white"
WORK = {"prompt": COLORS["GQA"], "token": COLORS["MLA"], "padding": "#DDDDDD",
        "read again": COLORS["MHA"]}
CACHES = {"per-head": COLORS["MHA"], "latent": COLORS["MLA"], "six-bit": MORE_COLORS[1]}


@styled
def page_pool(users: Sequence[int], tables: Mapping[str, Sequence[int]]) -> Figure:
    """The pages of a pool in a row, and below it the table of each sequence.

    users: of each page, as the pool counts them. A page that one sequence holds has its colour,
    grey ones have several, white ones are free.
    """
    held = [[name for name, table in tables.items() if page in table]
            for page in range(len(users))]
    if [len(names) for names in held] != list(users):
        raise ValueError(f"users: {list(users)}, expected {[len(names) for names in held]}, as "
                         "the tables say")
    colors = dict(zip(tables, HOLDERS * len(tables), strict=False))
    figure = Picture(8.6, 1.6 + 0.62 * len(tables))
    ax = figure.subplots()
    for page, names in enumerate(held):
        color = FREE if not names else colors[names[0]] if len(names) == 1 else SHARED
        _page(ax, page, 0, str(page), color)
        ax.text(page + 0.45, -0.72, f"{users[page]}", ha="center", va="center", fontsize=9)
    ax.text(-0.25, 0, "pool", ha="right", va="center", fontweight="bold")
    ax.text(-0.25, -0.72, "users", ha="right", va="center", fontsize=9)
    for row, (name, table) in enumerate(tables.items(), 1):
        ax.text(-0.25, row + 0.4, name, ha="right", va="center", color=colors[name],
                fontweight="bold")
        for i, page in enumerate(table):
            _page(ax, i, row + 0.4, str(page),
                  SHARED if len(held[page]) > 1 else colors[name])
    used = sum(n > 0 for n in users)
    told = sum(len(table) for table in tables.values())
    ax.set(xlim=(-1.6, max(len(users), 6)), ylim=(len(tables) + 1.1, -1.15),
           title=f"{told} entries in tables, {used} of {len(users)} pages in use")
    ax.set_axis_off()
    return figure


def _page(ax, x: float, y: float, text: str, color: str) -> None:
    ax.add_patch(Rectangle((x, y - 0.36), 0.9, 0.72, facecolor=color, edgecolor=INK, lw=1.0))
    ax.text(x + 0.45, y, text, ha="center", va="center",
            color=INK if color in (FREE, SHARED) else "white")


@styled
def serving_timeline(ways: Mapping[str, Sequence[Sequence[str | None]]]) -> Figure:
    """Who took part in which pass, a panel for each way of serving.

    ways: for each of the requests, for each pass, "prompt", "token", "padding", "read again" or
    None where it was not in the batch. Idle and padded places are what a larger batch could use.
    """
    if not ways or not all(ways.values()):
        raise ValueError("ways: expected at least one, of at least one request")
    for name, rows in ways.items():
        if unknown := {work for row in rows for work in row} - {None, *WORK}:
            raise ValueError(f"ways: {unknown.pop()!r} in {name!r}, expected None or one of "
                             f"{', '.join(WORK)}")
    end = max(len(row) for rows in ways.values() for row in rows)
    heights = [0.26 * len(rows) + 0.6 for rows in ways.values()]
    figure = Picture(9.4, sum(heights) + 0.9)
    axes = figure.subplots(len(ways), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, (name, rows) in zip(axes, ways.items(), strict=True):
        for y, row in enumerate(rows):
            for x, work in enumerate(row):
                if work is not None:
                    ax.add_patch(Rectangle((x, y - 0.42), 1, 0.84, facecolor=WORK[work],
                                           edgecolor="white", lw=0.6))
        passes = max(i + 1 for row in rows for i, work in enumerate(row) if work)
        ax.set(xlim=(0, end), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)),
               ylabel="request", title=f"{name}: {passes} passes")
        ax.tick_params(length=0)
        ax.axvline(passes, color=INK, lw=1.0, ls=":")
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes[-1].set_xlabel("pass of the model")
    seen = {work for rows in ways.values() for row in rows for work in row}
    figure.legend(handles=[Patch(facecolor=color, label=work) for work, color in WORK.items()
                           if work in seen], loc="outside lower left", ncols=4)
    return figure


@styled
def throughput_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    title: str | None = None,
) -> Figure:
    """Tokens per second against the batch: curves predicted, points measured, one colour a name.

    A curve ends where its memory is full; a dot and a number mark that end. Both axes are
    logarithmic.
    """
    if not curves or any(len(x) != len(y) or not len(x) for x, y in curves.values()):
        raise ValueError("curves: expected at least one, each with as many batches as rates")
    figure = Picture(8.0, 4.4)
    ax = figure.subplots()
    others = [name for name in curves if name not in CACHES]
    for name, (x, y) in curves.items():
        color = CACHES.get(name) or HOLDERS[others.index(name) % len(HOLDERS)]
        ax.plot(x, y, color=color, label=name)
        ax.plot(x[-1], y[-1], "o", color=color, ms=7)
        ax.annotate(f"{x[-1]:,.0f}", (x[-1], y[-1]), (0, 8), textcoords="offset points",
                    ha="center", color=color)
        if points and name in points:
            ax.plot(*points[name], "s", color=color, ms=6, fillstyle="none", label="measured")
    first, last = next(iter(curves.values())), list(curves.values())[-1]
    gain = last[1][-1] / (first[1][-1] if len(curves) > 1 else first[1][0])
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.9g}"))
    low = min(np.min(y) for _, y in curves.values())
    high = max(np.max(y) for _, y in curves.values())
    ax.set(xlabel="batch (sequences)", ylabel="new tokens per second",
           ylim=(0.7 * low, 1.8 * high), title=title or f"The largest batch brings {gain:.3g} "
           "times the tokens" + (f" of {next(iter(curves))}" if len(curves) > 1 else ""))
    ax.grid(True)
    figure.legend(loc="outside right center")
    return figure

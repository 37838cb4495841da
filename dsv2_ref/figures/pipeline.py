# SPDX-License-Identifier: MIT
"""Pipelines: who works when, how long nobody does, and what waits in memory meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, png, styled
from dsv2_ref.parallel.schedule import SCHEDULES, Timeline

WORK = {"F": COLORS["MLA"], "B": COLORS["MHA"], "I": COLORS["GQA"], "W": MORE_COLORS[1]}
NAMES = {"F": "forward", "B": "whole backward", "I": "backward for inputs",
         "W": "backward for weights"}
_LINES = (MORE_COLORS[3], COLORS["MHA"], COLORS["GQA"], COLORS["MQA"], COLORS["MLA"],
          MORE_COLORS[1], MORE_COLORS[0])
_MARKS = "os^Dv*P"


def _place(name: str, i: int) -> int:
    """A schedule looks the same in each figure; whatever else is drawn takes the i-th look."""
    return list(SCHEDULES).index(name) if name in SCHEDULES else i % len(_LINES)


def _paler(color: str) -> tuple[float, ...]:
    return tuple(0.45 * c + 0.55 for c in to_rgb(color))


def _gantt(ax: Axes, name: str, timeline: Timeline, end: float, inches: float) -> None:
    """One row per rank; the number of a micro-batch where there is room for it."""
    start = min(slot.start for row in timeline.rows for slot in row)
    digits = len(str(max(slot.action.batch for row in timeline.rows for slot in row)))
    for rank, row in enumerate(timeline.rows):
        first = min(slot.action.stage for slot in row)
        for (kind, stage, batch, _), began, ended in row:
            later = stage != first                       # the rank's second stage
            color = _paler(WORK[kind]) if later else WORK[kind]
            ax.add_patch(Rectangle((began - start, rank - 0.42), ended - began, 0.84,
                                   facecolor=color, edgecolor="white", lw=0.6))
            if (ended - began) / end * inches > 0.085 * digits + 0.03:
                ax.text((began + ended) / 2 - start, rank, batch, ha="center", va="center",
                        color=INK if later or kind == "I" else "white", fontsize=7.5)
    ax.set(xlim=(0, end), ylim=(len(timeline.rows) - 0.5, -0.5), yticks=range(len(timeline.rows)),
           ylabel="rank", title=f"{name}: idle {100 * timeline.bubble:.0f} % of the time")
    if len(timeline.rows) > 8:
        ax.set_yticks(range(0, len(timeline.rows), 4))
    ax.tick_params(length=0)


@styled
def schedule_gantt(timelines: Mapping[str, Timeline], unit: str = "time (forwards)") -> Figure:
    """What each rank does when, a panel for each schedule; numbers are micro-batches.

    Pale: the rank's second stage. `unit` names the axis; all panels have the same one.
    """
    if not timelines:
        raise ValueError("timelines: none, expected at least one")
    end = max(t.makespan for t in timelines.values())
    heights = [0.24 * max(len(t.rows), 3) + 0.55 for t in timelines.values()]
    figure = Picture(11.0, sum(heights) + 0.9)
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, (name, timeline) in zip(axes, timelines.items(), strict=True):
        _gantt(ax, name, timeline, end, 10.0)
    axes[-1].set_xlabel(unit)
    seen = {slot.action.kind for t in timelines.values() for row in t.rows for slot in row}
    figure.legend(handles=[Patch(facecolor=WORK[kind], label=f"{kind}: {NAMES[kind]}")
                           for kind in WORK if kind in seen], loc="outside lower left", ncols=4)
    return figure


@styled
def bubble_curves(micro_batches: Sequence[int], bubbles: Mapping[str, Sequence[float]],
                  published: Mapping[str, Sequence[float | None]] | None = None) -> Figure:
    """Share of the time in which ranks are idle against micro-batches: lines simulated, rings as
    published."""
    if not bubbles or any(len(y) != len(micro_batches) for y in bubbles.values()):
        raise ValueError(f"bubbles: {[len(y) for y in bubbles.values()]} values, expected "
                         f"{len(micro_batches)} for each schedule, at least one")
    figure = Picture(8.6, 4.6)
    ax = figure.subplots()
    same: dict[tuple[float, ...], list[str]] = {}            # lines that would hide each other
    for name, y in bubbles.items():
        same.setdefault(tuple(np.round(y, 9)), []).append(name)
    for i, (y, names) in enumerate(same.items()):
        look = _place(names[0], i)
        ax.plot(micro_batches, 100 * np.asarray(y), color=_LINES[look], marker=_MARKS[look], ms=5,
                label=", ".join(names))
        for name in names:
            told = [(m, 100 * b) for m, b in zip(micro_batches, (published or {}).get(name, ()))
                    if b is not None]
            if told:
                ax.plot(*zip(*told, strict=True), ls="", marker="o", ms=11, fillstyle="none",
                        color=_LINES[look])
    last = {name: 100 * y[-1] for name, y in bubbles.items()}
    most, least = max(last, key=last.get), min(last, key=last.get)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="micro-batches", ylabel="ranks idle (% of a step)", ylim=(0, None),
           xticks=list(micro_batches),
           title=f"At {micro_batches[-1]} micro-batches: {most} {last[most]:.0f} %, "
                 f"{least} {last[least]:.0f} %")
    ax.grid(True, axis="y")
    figure.legend(loc="outside right center")
    return figure


@styled
def in_flight_bars(held: Mapping[str, Sequence[float]], unit: str = "GiB") -> Figure:
    """The most that each rank keeps of started micro-batches, a group of bars for each schedule."""
    if not held or len({len(y) for y in held.values()}) != 1:
        raise ValueError(f"held: {[len(y) for y in held.values()]} ranks, expected as many for "
                         "each schedule")
    p = len(next(iter(held.values())))
    figure = Picture(10.5, 4.0)
    ax = figure.subplots()
    colors = [_LINES[_place(name, i)] for i, name in enumerate(held)]
    _bars_in_groups(ax, held, colors)
    peaks = {name: max(y) for name, y in held.items()}
    most, least = max(peaks, key=peaks.get), min(peaks, key=peaks.get)
    ax.set(xlabel="rank", ylabel=f"kept at most ({unit})", xticks=range(p),
           title=f"The fullest rank keeps {peaks[most]:.3g} {unit} with {most}, "
                 f"{peaks[least]:.3g} with {least}")
    figure.legend(loc="outside right center")
    return figure


@styled
def phase_bars(ranks: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bytes that there are in each phase of a run, a group of bars for each rank."""
    if not ranks or len({tuple(phases) for phases in ranks.values()}) != 1:
        raise ValueError(f"ranks: phases {[list(phases) for phases in ranks.values()]}, expected "
                         "the same ones for each rank")
    phases = list(next(iter(ranks.values())))
    figure = Picture(7.0, 3.4)
    ax = figure.subplots()
    groups = {name: [n / 2**20 for n in of.values()] for name, of in ranks.items()}
    _bars_in_groups(ax, groups, _LINES[::-1])
    most, phase = max((y, phase) for of in groups.values() for y, phase in zip(of, phases,
                                                                              strict=True))
    ax.set(ylabel="MiB", title=f"The fullest rank holds {most:.3g} MiB, in {phase}")
    ax.set_xticks(range(len(phases)), phases)
    ax.legend()
    return figure


def _bars_in_groups(ax: Axes, bars: Mapping[str, Sequence[float]], colors: Sequence[str]) -> None:
    """The i-th values of all names side by side at i."""
    width = 0.86 / len(bars)
    for i, (name, y) in enumerate(bars.items()):
        x = np.arange(len(y)) + (i - (len(bars) - 1) / 2) * width
        ax.bar(x, y, width=0.92 * width, color=colors[i % len(colors)], label=name)
    ax.grid(True, axis="y")
    ax.tick_params(axis="x", length=0)


def pipeline_slider(timelines: Mapping[tuple[int, int], Mapping[str, Timeline]]) -> Any:
    """A slider over (ranks, micro-batches) and below it what each rank does when."""
    sizes = list(timelines)

    def draw(size: tuple[int, int]) -> bytes:
        return png(schedule_gantt(timelines[size]))

    return slider("p, m", [(f"{p}, {m}", (p, m)) for p, m in sizes], sizes[0], draw, width=900)

# SPDX-License-Identifier: MIT
"""How pretraining works: windows, steps, schedules, a live run, rounding, codes, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled
from dsv2_ref.training.watching import fair_shares

_LINES = (COLORS["MLA"], COLORS["MHA"], COLORS["GQA"], *MORE_COLORS)
_DASHES = ("-", "--", "-.", ":")


@styled
def packed_windows(
    tokens: Sequence[int], starts: Sequence[int], sequence: int, begin: int
) -> Figure:
    """Documents in one row of tokens, and the windows that are cut from it, in reading order.

    tokens: ids, each document opened by the id `begin`; starts: where each window of `sequence`
    tokens begins. A document has one colour in both panels.
    """
    ids = np.asarray(tokens)
    if sequence < 1 or not len(starts) or min(starts) < 0 or max(starts) + sequence > len(ids):
        raise ValueError(f"starts: {list(starts)}, expected windows of {sequence} within "
                         f"{len(ids)} tokens, one at least")
    document = np.cumsum(ids == begin)                                      # (tokens,) from 1
    colors = (COLORS["MLA"], COLORS["GQA"], MORE_COLORS[1], MORE_COLORS[0], COLORS["MQA"])
    figure = Picture(9.0, 0.42 * len(starts) + 2.3)
    above, below = figure.subplots(2, 1, height_ratios=[1.0, len(starts)], sharex=False)

    def cells(ax: Axes, row: int, first: int, n: int, at: int) -> None:
        for i in range(n):
            ax.barh(row, 1, left=at + i, height=0.8, color=colors[document[first + i] % 5],
                    edgecolor="white", lw=0.8)
            if ids[first + i] == begin:
                ax.annotate("b", (at + i + 0.5, row), ha="center", va="center", color="white",
                            fontsize=9)

    cells(above, 0, 0, len(ids), 0)
    mixed = 0
    for row, first in enumerate(starts):
        cells(below, row, first, sequence, 0)
        mixed += document[first] != document[first + sequence - 1]
    for ax, rows, width in ((above, [0], len(ids)), (below, range(len(starts)), sequence)):
        ax.set(xlim=(0, width), yticks=list(rows))
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for cut in sorted({*starts, max(starts) + sequence}):
        above.axvline(cut, color=INK, lw=2.4)
    above.set(yticklabels=["all tokens"],
              title=f"{document[-1]} documents, {len(starts)} windows, {mixed} with more than one "
                    "document")
    below.set(yticklabels=[f"window {n + 1}" for n in range(len(starts))],
              xlabel="place in the window (a colour per document; b: its begin mark; black: a cut)")
    return figure


@styled
def optimizer_paths(
    gradients: Sequence[float], m: Sequence[float], root_v: Sequence[float],
    steps: Sequence[float],
) -> Figure:
    """AdamW on one weight: its gradients, their two running means, and the steps that follow.

    All by step; root_v: the root of the second mean; steps: in units of the rate.
    """
    if not len(gradients) or {len(gradients)} != {len(m), len(root_v), len(steps)}:
        raise ValueError(f"gradients: {len(gradients)}, m: {len(m)}, root_v: {len(root_v)}, steps: "
                         f"{len(steps)}, expected as many of each, one at least")
    x = np.arange(1, len(gradients) + 1)
    sizes, moved = np.abs(np.asarray(gradients, float)), np.abs(np.asarray(steps, float))
    figure = Picture(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    left.plot(x, sizes, ".", color="#999999", label="|gradient|")
    left.plot(x, np.abs(np.asarray(m, float)), color=COLORS["MLA"], label="|m|, 10 steps")
    left.plot(x, root_v, color=COLORS["MHA"], ls="--", label="root of v, 20 steps")
    left.set(yscale="log", ylabel="size",
             title=f"Gradients of up to {sizes.max():,.3g}")
    left.legend(loc="best")
    right.plot(x, moved, color=COLORS["GQA"])
    right.axhline(1, color=INK, lw=1.2, ls="--")
    right.set(ylabel="step (rate = 1)", ylim=(0, None),
              title=f"Steps of up to {moved.max():.1f} rates")
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(True, axis="y")
    return figure


@styled
def schedule_curves(progress: Sequence[float], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Rates over a run. progress: shares of the run; shares: name -> rate, peak = 1."""
    if not shares or any(len(values) != len(progress) for values in shares.values()):
        raise ValueError(f"shares: {[len(v) for v in shares.values()]} values, expected "
                         f"{len(progress)} each")
    figure = Picture(7.6, 3.8)
    ax = figure.subplots()
    x = 100 * np.asarray(progress, float)
    for i, (name, values) in enumerate(shares.items()):
        ax.plot(x, values, color=_LINES[i], ls=_DASHES[i % 4], label=name)
    ends = ", ".join(f"{name} {100 * values[-1]:.0f} %" for name, values in shares.items())
    ax.set(xlabel="done (% of the run)", ylabel="rate (peak = 1)", ylim=(0, None),
           title=f"Rates end at: {ends}")
    ax.grid(True, axis="y")
    ax.legend(loc="best")
    return figure


@styled
def live_picture(log: Sequence[Mapping[str, Any]], steps: int) -> Figure:
    """Where a run of `steps` steps is: its loss, and the load of its last layer's experts.

    log: entries so far, the last one with `expert_load` among them is drawn.
    """
    loads = [entry["expert_load"] for entry in log if "expert_load" in entry]
    if not loads:
        raise ValueError("log: no entry has 'expert_load', expected one at least")
    shares = fair_shares(loads[-1][-1])                                     # (E,)
    figure = Picture(10.0, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot([entry["step"] for entry in log], [entry["language"] for entry in log],
              color=COLORS["MLA"], lw=1.2, marker=".", ms=4)
    left.set(xlabel="step", ylabel="training loss (nats per token)", xlim=(0, steps),
             title=f"Step {log[-1]['step']} of {steps}: {log[-1]['language']:.2f} nats per token")
    right.bar(range(len(shares)), shares, color=COLORS["GQA"])
    right.axhline(1, color=INK, lw=1.2, ls="--")
    right.set(xlabel="routed expert of the last layer", ylabel="load (fair share = 1)",
              ylim=(0, 3), title=f"Fullest expert: {shares.max():.1f} times its share")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (left, right):
        ax.grid(True, axis="y")
    return figure


@styled
def rounding_paths(paths: Mapping[str, Sequence[float]], what: str = "weight") -> Figure:
    """A number, update by update, in several ways of keeping it: name -> its values."""
    if not paths or min(len(values) for values in paths.values()) < 2:
        raise ValueError("paths: expected at least one way, of two values or more")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    for i, (name, values) in enumerate(paths.items()):
        ax.plot(values, color=_LINES[i], ls="-" if i else "--", lw=1.6, label=name)
    n = max(len(values) for values in paths.values()) - 1
    moved = ", ".join(f"{name} {values[-1] - values[0]:+.3f}" for name, values in paths.items())
    ax.set(xlabel="update", ylabel=what, title=f"{n:,} updates: {moved}")
    ax.grid(True, axis="y")
    ax.legend(loc="best")
    return figure


@styled
def code_steps(sizes: Sequence[float], kept: Mapping[str, Sequence[float]]) -> Figure:
    """What codes make of sizes (largest = 1), both axes logarithmic; 0 is drawn at the bottom."""
    x = np.asarray(sizes, float)
    if not len(x) or x.min() <= 0 or any(len(values) != len(x) for values in kept.values()):
        raise ValueError("sizes, kept: expected positive sizes, and as many kept ones of each kind")
    figure = Picture(7.6, 4.4)
    ax = figure.subplots()
    bottom, lost = x.min() / 3, []
    for i, (name, values) in enumerate(kept.items()):
        y = np.asarray(values, float)
        lost.append(f"{name} {100 * np.mean(y == 0):.0f} %")
        ax.plot(x, np.maximum(y, bottom), color=_LINES[i], ls=_DASHES[i % 4], label=name)
    ax.axline((1, 1), (1e-2, 1e-2), color=INK, lw=1.0, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="size (largest of the block = 1)",
           ylabel="size after coding", title=f"Become 0: {', '.join(lost)} of these sizes")
    ax.grid(True)
    ax.legend(loc="best")
    return figure


@styled
def memory_bars(
    parts: Mapping[str, Mapping[str, float]], limit: float | None = None, unit: str = "GB",
    counted: Mapping[str, float] | None = None,
) -> Figure:
    """Bytes by what they are for, a stacked bar for each way of training.

    parts: way -> part -> bytes, the same parts everywhere; limit: what there is, in bytes; unit GB
    or MB, powers of ten; counted: way -> bytes, marked beside the sum.
    """
    if unit not in ("GB", "MB"):
        raise ValueError(f"unit: {unit!r}, expected GB or MB")
    scale = 1e9 if unit == "GB" else 1e6
    totals = {way: sum(sizes.values()) for way, sizes in parts.items()}
    figure, ax = _stacked(parts, scale)
    if counted:
        ax.plot([counted[way] / scale for way in parts], range(len(parts)), "D", color="white",
                mec=INK, ms=6, label="counted")
    most, least = (f(totals.values()) / scale for f in (max, min))
    title = f"From {most:,.3g} to {least:,.3g} {unit}"
    if limit is not None:
        ax.axvline(limit / scale, color=INK, lw=1.4, ls="--")
        fitting = [way for way, total in totals.items() if total <= limit]
        told = f"fits: {fitting[0]}" if len(fitting) == 1 else (
            f"fit {len(fitting)} of these {len(parts)}")
        title = f"In {limit / scale:,.3g} {unit} {told}"
    ax.set(xlabel=f"memory ({unit})", title=title,
           xlim=(0, max(most, (limit or 0) / scale) * 1.12))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _stacked(parts: Mapping[str, Mapping[str, float]], scale: float) -> tuple[Figure, Axes]:
    """A bar for each way, of its parts over `scale`, with their sum behind it."""
    names = list(next(iter(parts.values()), {}))
    if not names or any(list(ways) != names for ways in parts.values()):
        raise ValueError(f"parts: {[list(ways) for ways in parts.values()]}, expected the same "
                         "parts for each way, one at least")
    figure = Picture(9.0, 0.62 * len(parts) + 1.9)
    ax = figure.subplots()
    left = np.zeros(len(parts))
    for i, name in enumerate(names):
        widths = np.array([sizes[name] / scale for sizes in parts.values()])
        ax.barh(list(parts), widths, left=left, color=_LINES[i], height=0.62, label=name)
        left += widths
    for i, total in enumerate(left):
        ax.annotate(f"{total:,.3g}", (total, i), (5, 0), va="center", textcoords="offset points")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    return figure, ax


@styled
def step_seconds(
    parts: Mapping[str, Mapping[str, float]], tokens: int,
    measured: Mapping[str, float] | None = None,
) -> Figure:
    """Seconds of a training step of `tokens` tokens by what takes them, a bar for each estimate.

    parts: estimate -> part -> seconds, the same parts everywhere; measured: run -> seconds. Without
    any, the picture says so.
    """
    figure, ax = _stacked(parts, 1.0)
    slow, fast = (f(sum(p.values()) for p in parts.values()) for f in (max, min))
    for name, seconds in (measured or {}).items():
        ax.barh(name, seconds, color="#999999", height=0.62)
        ax.annotate(f"{seconds:,.3g}", (seconds, name), (5, 0), va="center",
                    textcoords="offset points")
    told = "" if measured else "; nothing was measured yet"
    speeds = [f"{tokens / seconds / 1e3:.1f}K" for seconds in (slow, fast)]
    ax.set(xlabel=f"a step of {tokens:,} tokens (seconds)",
           xlim=(0, max(slow, *(measured or {"": 0}).values()) * 1.12),
           title=f"Expected: {' to '.join(speeds)} tokens/s{told}")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


@styled
def memory_over_step(in_use: Sequence[float], planned: float, standing: float) -> Figure:
    """Bytes in use after each allocation of one training step, beside the peak that was planned.

    standing: weights and moments, which are there before and after.
    """
    y = np.asarray(in_use, float) / 1e6
    if not len(y) or not planned > 0:
        raise ValueError(f"in_use: {len(y)} values, planned: {planned}, expected some, and a "
                         "positive plan")
    figure = Picture(8.6, 4.0)
    ax = figure.subplots()
    parts = np.array_split(y, min(len(y), 500))      # each by its most: no spike is missed
    x = np.cumsum([0, *(len(part) for part in parts)])
    most = [part.max() for part in parts]
    ax.fill_between(x, [*most, most[-1]], color=COLORS["MQA"], lw=0, step="post",
                    label="measured")
    ax.axhline(planned / 1e6, color=INK, lw=1.4, ls="--", label="planned peak")
    ax.axhline(standing / 1e6, color=COLORS["MHA"], lw=1.4, ls=":", label="weights and moments")
    ax.set(xlabel="allocations of the step, in order", ylabel="memory in use (MB)",
           xlim=(0, len(y)), ylim=(0, max(y.max(), planned / 1e6) * 1.05),
           title=f"Peak: {y.max():,.3g} MB measured, {planned / 1e6:,.3g} MB planned")
    ax.grid(True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure

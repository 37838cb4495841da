# SPDX-License-Identifier: MIT
"""How pretraining works: schedules, a live run, rounding, codes of moments, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled
from dsv2_ref.training.watching import fair_shares

_LINES = (COLORS["MLA"], COLORS["MHA"], COLORS["GQA"], *MORE_COLORS)
_DASHES = ("-", "--", "-.", ":")


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
def rounding_paths(paths: Mapping[str, Sequence[float]]) -> Figure:
    """One weight, update by update, in several ways of keeping it: name -> its values."""
    if not paths or min(len(values) for values in paths.values()) < 2:
        raise ValueError("paths: expected at least one way, of two values or more")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    for i, (name, values) in enumerate(paths.items()):
        ax.plot(values, color=_LINES[i], ls="-" if i else "--", lw=1.6, label=name)
    n = max(len(values) for values in paths.values()) - 1
    moved = ", ".join(f"{name} {values[-1] - values[0]:+.3f}" for name, values in paths.items())
    ax.set(xlabel="update", ylabel="weight", title=f"{n:,} updates: {moved}")
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
    parts: Mapping[str, Mapping[str, float]], limit: float | None = None, unit: str = "GB"
) -> Figure:
    """Bytes by what they are for, a stacked bar for each way of training.

    parts: way -> part -> bytes, the same parts everywhere; limit: what there is, in bytes; unit GB
    or MB, powers of ten.
    """
    if unit not in ("GB", "MB"):
        raise ValueError(f"unit: {unit!r}, expected GB or MB")
    names = list(next(iter(parts.values()), {}))
    if not names or any(list(ways) != names for ways in parts.values()):
        raise ValueError(f"parts: {[list(ways) for ways in parts.values()]}, expected the same "
                         "parts for each way, one at least")
    scale = 1e9 if unit == "GB" else 1e6
    totals = {way: sum(sizes.values()) for way, sizes in parts.items()}
    figure = Picture(9.0, 0.62 * len(parts) + 1.9)
    ax = figure.subplots()
    left = np.zeros(len(parts))
    for i, name in enumerate(names):
        widths = np.array([sizes[name] / scale for sizes in parts.values()])
        ax.barh(list(parts), widths, left=left, color=_LINES[i], height=0.62, label=name)
        left += widths
    for i, total in enumerate(totals.values()):
        ax.annotate(f"{total / scale:,.3g}", (total / scale, i), (5, 0), va="center",
                    textcoords="offset points")
    most, least = (f(totals.values()) / scale for f in (max, min))
    title = f"From {most:,.3g} to {least:,.3g} {unit}"
    if limit is not None:
        ax.axvline(limit / scale, color=INK, lw=1.4, ls="--")
        fitting = [way for way, total in totals.items() if total <= limit]
        told = f"fits: {fitting[0]}" if len(fitting) == 1 else (
            f"fit {len(fitting)} of these {len(parts)}")
        title = f"In {limit / scale:,.3g} {unit} {told}"
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.set(xlabel=f"memory ({unit})", title=title,
           xlim=(0, max(most, (limit or 0) / scale) * 1.12))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return figure

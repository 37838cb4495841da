# SPDX-License-Identifier: MIT
"""A cluster on paper: memory of each stage, what each assumption does, hours against devices."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled, tokens_label

_PARTS = (COLORS["MLA"], COLORS["MQA"], MORE_COLORS[1], COLORS["GQA"], MORE_COLORS[3])
_MARKS = ("x", "_", "+", "|")


@styled
def stage_memory(
    stages: Sequence[Mapping[str, float]], layers: Sequence[int], limit: float,
    others: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Bytes of one device of each stage of a pipeline, beside what a card has.

    stages: for each, part -> bytes, the same parts everywhere; layers: how many each has; limit:
    the card's bytes; others: name -> what the stages would take in all if planned otherwise.
    """
    names = list(stages[0]) if stages else []
    if not names or any(list(s) != names for s in stages) or len(layers) != len(stages):
        raise ValueError(f"stages, layers: {len(stages)} and {len(layers)}, expected as many of "
                         "both, one at least, and the same parts in all")
    others = others or {}
    if any(len(totals) != len(stages) for totals in others.values()):
        raise ValueError(f"others: {[len(t) for t in others.values()]} totals, expected "
                         f"{len(stages)} each")
    figure = Picture(9.6, 4.8)
    ax = figure.subplots()
    x, bottom = np.arange(len(stages)), np.zeros(len(stages))
    for i, name in enumerate(names):
        heights = np.array([s[name] / 1e9 for s in stages])
        ax.bar(x, heights, bottom=bottom, color=_PARTS[i % len(_PARTS)], width=0.72, label=name)
        bottom += heights
    for i, (name, totals) in enumerate(others.items()):
        ax.plot(x, np.asarray(totals, float) / 1e9, ls="", marker=_MARKS[i % 4], ms=9, mew=2,
                color=INK, label=name)
    ax.axhline(limit / 1e9, color=COLORS["MHA"], lw=1.6, ls="--", label=f"{limit / 1e9:.0f} GB")
    ax.set_xticks(x, [f"{i}\n{n}" for i, n in enumerate(layers)])
    told = "".join(f"; {name}: {max(t) / 1e9:.0f} GB" for name, t in others.items())
    ax.set(xlabel="stage, and how many layers it has", ylabel="memory of one device (GB)",
           title=f"Fullest device: {bottom.max():.0f} of {limit / 1e9:.0f} GB{told}")
    ax.grid(True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


@styled
def hour_ranges(
    ranges: Mapping[str, tuple[float, float]], middle: float, published: float,
    values: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """What each assumption alone does to the GPU-hours per trillion tokens.

    ranges: assumption -> (hours at its best, at its worst), drawn in this order; a name may be
    "name: explanation". middle: hours with all in the middle; published: the paper's; values:
    assumption -> its best and worst, in words.
    """
    if not ranges or any(best > worst for best, worst in ranges.values()):
        raise ValueError("ranges: expected at least one, the best hours first")
    words = max(map(len, ranges))                        # long names take room of their own
    figure = Picture(9.0 + 0.05 * max(words - 16, 0), 0.36 * len(ranges) + 2.0)
    ax = figure.subplots()
    for i, (name, (best, worst)) in enumerate(ranges.items()):
        ax.barh(i, (middle - best) / 1e3, left=best / 1e3, color=COLORS["MLA"], height=0.66)
        ax.barh(i, (worst - middle) / 1e3, left=middle / 1e3, color=COLORS["GQA"], height=0.66)
        for x, text, side in zip((best, worst), (values or {}).get(name, ()), (-1, 1)):
            ax.annotate(text, (x / 1e3, i), (5 * side, 0), textcoords="offset points", va="center",
                        ha="left" if side > 0 else "right", fontsize=9)
    ax.set_yticks(range(len(ranges)), list(ranges))
    ax.axvline(middle / 1e3, color=INK, lw=1.2, label=f"all in the middle: {middle / 1e3:.0f}K")
    ax.axvline(published / 1e3, color=COLORS["MHA"], lw=1.6, ls="--",
               label=f"the paper: {published / 1e3:.1f}K")
    widest = max(ranges, key=lambda name: ranges[name][1] - ranges[name][0])
    low, high = (hours / 1e3 for hours in ranges[widest])
    ends = [hours / 1e3 for pair in ranges.values() for hours in pair] + [published / 1e3]
    room = 0.12 * (max(ends) - min(ends))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.set(xlabel="GPU-hours per trillion tokens (thousands)",
           xlim=(min(ends) - room, max(ends) + room),
           title=f"Least certain: {widest.split(':')[0]}, {low:.0f}K to {high:.0f}K")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def hours_by_devices(
    devices: Sequence[int], hours: Mapping[str, Sequence[float]], published: float
) -> Figure:
    """GPU-hours per trillion tokens as a cluster grows, both axes logarithmic.

    hours: name -> one value for each size; published: the paper's.
    """
    if not hours or any(len(values) != len(devices) for values in hours.values()):
        raise ValueError(f"hours: {[len(v) for v in hours.values()]} values, expected "
                         f"{len(devices)} each")
    figure = Picture(8.6, 4.4)
    ax = figure.subplots()
    colors = (COLORS["MLA"], COLORS["GQA"], *MORE_COLORS)
    for i, (name, values) in enumerate(hours.items()):
        ax.plot(devices, np.asarray(values, float) / 1e3, marker="o", ms=5, color=colors[i],
                ls=("-", "--", "-.", ":")[i % 4], label=name)
    ax.axhline(published / 1e3, color=COLORS["MHA"], lw=1.4, ls=":",
               label=f"the paper: {published / 1e3:.1f}K")
    grown = " and ".join(f"{values[-1] / values[0]:.1f}" for values in hours.values())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(devices, [tokens_label(n) for n in devices])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0f}"))
    ax.minorticks_off()
    ax.set(xlabel="devices", ylabel="GPU-hours per trillion tokens (thousands)",
           title=f"{tokens_label(devices[0])} to {tokens_label(devices[-1])} devices: hours times "
                 f"{grown}")
    ax.grid(True)
    ax.legend(loc="best")
    return figure

# SPDX-License-Identifier: MIT
"""Scores: one question judged in several ways, tokens against bytes, Pass@k, a seen question."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled

PICKED, RIGHT, OTHER = COLORS["MLA"], MORE_COLORS[1], "#CCCCCC"


@styled
def choice_bars(
    choices: Sequence[str], scores: Mapping[str, Sequence[float]], right: int
) -> Figure:
    """A panel for each way of scoring: the score of each choice, the largest one filled.

    right: the number of the right choice, which has a frame in every panel.
    """
    if not scores or any(len(row) != len(choices) for row in scores.values()) or not choices:
        raise ValueError(f"scores: {[len(row) for row in scores.values()]} of {len(choices)} "
                         "choices, expected one for each, in some way")
    if not 0 <= right < len(choices):
        raise ValueError(f"right: {right}, expected 0 to {len(choices) - 1}")
    figure = Picture(3.6 * len(scores), 1.1 + 0.36 * len(choices))
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for ax, (way, row) in zip(axes, scores.items(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        bars = ax.barh(range(len(choices)), row, color=OTHER, edgecolor="none")
        bars[best].set_color(PICKED)
        bars[right].set_edgecolor(RIGHT)
        bars[right].set_linewidth(2.5)
        ax.set(xlabel=way, title=f"→ {choices[best].strip()}")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(True, axis="x")
    axes[0].set_yticks(range(len(choices)), [c.strip() for c in choices])
    axes[0].invert_yaxis()
    figure.legend(handles=[Patch(color=PICKED, label="chosen: the largest score"),
                           Patch(facecolor="none", edgecolor=RIGHT, lw=2.5, label="right")],
                  loc="outside lower center", ncols=2)
    return figure


@styled
def tokens_and_bytes(names: Sequence[str], per_token: Sequence[float],
                     per_byte: Sequence[float]) -> Figure:
    """The same text in several tokenizers: bits per token beside bits per byte, a bar each."""
    if len(names) < 2 or not len(names) == len(per_token) == len(per_byte):
        raise ValueError(f"names: {len(names)} with {len(per_token)} and {len(per_byte)} numbers, "
                         "expected as many of each, at least two")
    figure = Picture(9.0, 3.2)
    for ax, values, unit, color in zip(figure.subplots(1, 2), (per_token, per_byte),
                                       ("token", "byte"), (COLORS["MHA"], PICKED), strict=True):
        bars = ax.bar(range(len(names)), values, color=color, width=0.6)
        ax.bar_label(bars, [f"{v:.3g}" for v in values], padding=2)
        ax.set_xticks(range(len(names)), names)
        ratio = max(values) / min(values)
        ax.set(ylabel=f"bits per {unit}", ylim=(0, 1.15 * max(values)), title=(
            f"Per {unit}: the same for all" if ratio < 1.001
            else f"Per {unit}: {ratio:.1f} times apart"))
    return figure


@styled
def pass_curves(ks: Sequence[int], truth: Sequence[float],
                estimates: Mapping[str, Sequence[float]]) -> Figure:
    """Pass@k against k: what is true, and what ways of estimating it give on average."""
    if len(ks) < 2 or any(len(row) != len(ks) for row in (truth, *estimates.values())):
        raise ValueError(f"ks: {len(ks)}, expected at least two, and as many numbers in each row")
    figure = Picture(6.4, 3.6)
    ax = figure.subplots()
    ax.plot(ks, truth, color=INK, lw=5, alpha=0.25, label="true")
    for (name, row), color, line in zip(estimates.items(), (PICKED, COLORS["MHA"]), ("-", "--")):
        ax.plot(ks, row, color=color, ls=line, marker="o", ms=4, label=name)
    gaps = {name: float(np.abs(np.subtract(row, truth)).max()) for name, row in estimates.items()}
    worst = max(gaps, key=gaps.__getitem__)
    ax.set(xlabel="k", ylabel="Pass@k, on average",
           title=f"{worst}: off by up to {100 * gaps[worst]:.0f} points")
    ax.set_xticks(ks)
    ax.grid(True)
    ax.legend(loc="lower right")
    return figure


@styled
def seen_and_unseen(
    before: Sequence[float], after: Sequence[float], seen: Sequence[bool]
) -> Figure:
    """log p of the right answers before and after training that had some of the questions in it.

    A dot is a question; on the grey line nothing changed.
    """
    if not len(before) == len(after) == len(seen) or not any(seen) or all(seen):
        raise ValueError(f"seen: {list(seen)} of {len(before)} and {len(after)} questions, "
                         "expected some that are and some that are not")
    figure = Picture(6.4, 4.4)
    ax = figure.subplots()
    flags, before, after = np.array(seen), np.array(before), np.array(after)
    left, low = before.min() - 0.3, min(before.min(), after.min()) - 0.4
    ax.plot([left, 0], [left, 0], color=MORE_COLORS[3], lw=1.4, label="no change")
    for flag, color, marker, name in ((True, COLORS["MHA"], "s", "was in the training text"),
                                      (False, PICKED, "o", "was not")):
        ax.plot(before[flags == flag], after[flags == flag], marker, color=color, ms=6, label=name)
    gains = [float((after - before)[flags == flag].mean()) for flag in (True, False)]
    ax.set(xlabel="log p of the right answer before (nat)", ylabel="after (nat)",
           xlim=(left, 0.2), ylim=(low, 0.4),
           title=f"Seen: {gains[0]:+.1f} nat, unseen: {gains[1]:+.1f} nat")
    ax.grid(True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure

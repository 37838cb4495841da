# SPDX-License-Identifier: MIT
"""Learning from rewards: one group of answers, where the clip bites, and how a policy learned;
what is learned of a conversation, whether a reward model knows how sure to be, and what each stage
of alignment brought."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled

UP, DOWN, CALM = COLORS["MLA"], COLORS["MHA"], MORE_COLORS[3]
_LINES = (COLORS["MLA"], COLORS["MHA"], MORE_COLORS[1], COLORS["GQA"])
_HEADS = ("question", "policy writes\nG answers", "reward of each", "advantage (34)", "loss (32)")
_X = (0.0, 2.2, 4.4, 6.2, 8.4)                       # middle of each column
_WIDE = (1.4, 1.9, 1.1, 1.6, 2.0)
FEW = 0.1                        # bins with less than this share of the largest are not joined


def _box(ax: Axes, column: int, y: float, text: str, color: str = INK) -> None:
    x, wide = _X[column], _WIDE[column]
    ax.add_patch(FancyBboxPatch((x - wide / 2, y - 0.27), wide, 0.54, boxstyle="round,pad=0.04",
                                facecolor="white", edgecolor=color, lw=1.4))
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(ax: Axes, column: int, y0: float, y1: float, color: str = CALM) -> None:
    start, end = _X[column] + _WIDE[column] / 2 + 0.08, _X[column + 1] - _WIDE[column + 1] / 2
    ax.annotate("", (end - 0.08, y1), (start, y0),
                arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.2})


@styled
def reward_loop(question: str, answers: Sequence[str], rewards: Sequence[float],
                advantages: Sequence[float]) -> Figure:
    """One round of GRPO as boxes and arrows: a question, its answers, what each is worth, the loss.

    All three lists have one entry for each answer.
    """
    G = len(answers)
    if not G or len(rewards) != G or len(advantages) != G:
        raise ValueError(f"answers: {G} with {len(rewards)} rewards and {len(advantages)} "
                         "advantages, expected as many of each, at least one")
    figure = Picture(10.5, 1.7 + 0.62 * G)
    ax = figure.subplots()
    middle = (G - 1) / 2
    _box(ax, 0, middle, question)
    _box(ax, 4, middle, "more of the better,\nless of the worse")
    for y, (answer, r, a) in enumerate(zip(answers, rewards, advantages, strict=True)):
        color = UP if a > 0 else DOWN if a < 0 else CALM
        _arrow(ax, 0, middle, y)
        _box(ax, 1, y, answer)
        _arrow(ax, 1, y, y)
        _box(ax, 2, y, f"{r:.3g}")
        _arrow(ax, 2, y, y)
        _box(ax, 3, y, f"{a:+.2f}", color)
        _arrow(ax, 3, y, middle, color)
    for x, head in zip(_X, _HEADS, strict=True):
        ax.text(x, -0.85, head, ha="center", va="center", fontweight="bold", fontsize=10)
    ax.annotate("", (_X[1], G - 0.35), (_X[4], G - 0.35), arrowprops={
        "arrowstyle": "-|>", "color": INK, "lw": 1.4, "connectionstyle": "arc3,rad=-0.08"})
    ax.text((_X[1] + _X[4]) / 2, G + 0.22, "the changed policy answers the next questions",
            ha="center", va="center", fontsize=10)
    best, worst = max(advantages), min(advantages)
    ax.set(xlim=(-0.9, 9.5), ylim=(G + 0.5, -1.2),
           title=f"{G} answers to one question: the best counts {best:+.2f}, the worst {worst:+.2f}"
           if best > worst else f"{G} answers of equal worth teach nothing")
    ax.set_axis_off()
    return figure


@styled
def clipped_gain(clip: float) -> Figure:
    """The gain of one token against its ratio, for an answer that is better and one that is worse.

    Shaded: where the gain is flat, so that this token moves nothing.
    """
    if not 0 < clip < 1:
        raise ValueError(f"clip: {clip}, expected a number between 0 and 1")
    figure = Picture(9.6, 3.8)
    ratio = np.linspace(0.4, 1.6, 241)
    for ax, A, color in zip(figure.subplots(1, 2), (1, -1), (UP, DOWN), strict=True):
        kept = np.clip(ratio, 1 - clip, 1 + clip)
        ax.plot(ratio, ratio * A, color=CALM, ls="--", lw=1.5, label="ratio · A")
        ax.plot(ratio, np.minimum(ratio * A, kept * A), color=color, lw=2.6, label="clipped gain")
        flat = (1 + clip, 1.6) if A > 0 else (0.4, 1 - clip)
        ax.axvspan(*flat, color=color, alpha=0.12, lw=0)
        ax.axvline(1, color=INK, lw=0.8, ls=":")
        edge = f"above {1 + clip:g}" if A > 0 else f"below {1 - clip:g}"
        ax.set(xlabel=r"ratio $\pi\,/\,\pi_{old}$", ylabel="gain", xlim=(0.4, 1.6),
               title=f"A = {A:+d}: no more say {edge}")
        ax.grid(True)
        ax.legend(loc="upper left" if A > 0 else "lower left")
    return figure


@styled
def reward_curves(runs: Mapping[str, Sequence[Mapping[str, float]]],
                  panels: Mapping[str, str]) -> Figure:
    """How policies learned, from their logs: a panel for each number, a line for each run.

    runs: by name the entries of a log, each with `step`; an entry may lack a number that is not
    measured at each step. panels: the number's name in the log -> what its axis says.
    """
    if not runs or not all(runs.values()) or not panels:
        raise ValueError("runs: expected at least one entry of at least one run, and a panel")
    figure = Picture(3.9 * min(len(panels), 3), 3.3 * -(-len(panels) // 3) + 0.3 * (len(runs) > 1))
    grid = list(figure.subplots(-(-len(panels) // 3), min(len(panels), 3), squeeze=False).flat)
    for ax, (name, says) in zip(grid, panels.items(), strict=False):
        ends = []
        for color, (run, log) in zip(_LINES, runs.items(), strict=False):
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if not points:
                raise ValueError(f"runs: {run!r} has no {name!r}, expected it in some entry")
            x, y = np.array(points, float).T
            ax.plot(x, y, color=color, label=run, marker="o" if len(x) < 20 else None, ms=4)
            ends.append((y[0], y[-1]))
        told = f"{ends[0][0]:.2f} → {ends[0][1]:.2f}" if len(runs) == 1 else (
            "ends at " + ", ".join(f"{last:.2f}" for _, last in ends))
        ax.set(xlabel="step", ylabel=says, title=told)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(True)
    for ax in grid[len(panels):]:
        ax.set_axis_off()
    if len(runs) > 1:
        handles: list[Any] = figure.axes[0].get_lines()
        figure.legend(handles=handles, loc="outside lower left", ncols=len(runs))
    return figure


@styled
def calibration_curves(models: Mapping[str, Sequence[tuple[float, float, int]]],
                       what: str) -> Figure:
    """What was predicted beside what happened: for each model its bins (chance, share, count).

    what: that which is predicted, as in "the first answer wins". A dot is as large as many are in
    its bin; where they are few, chance decides, so the dot is pale and the line leaves it out. On
    the dashed line chances are what they say.
    """
    if not models or not all(models.values()):
        raise ValueError("models: expected at least one, each with at least one bin")
    figure = Picture(5.6, 5.5)
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=CALM, ls="--", lw=1.5, label="perfectly calibrated")
    off = []
    for color, (name, bins) in zip(_LINES, models.items(), strict=False):
        chance, share, count = np.array(bins, float).T
        many = count >= FEW * count.max()
        ax.plot(chance[many], share[many], color=color, lw=1.4, label=name)
        ax.scatter(chance, share, s=20 + 180 * count / count.max(), color=color,
                   alpha=np.where(many, 0.75, 0.3))
        off.append(f"{float((abs(chance - share) * count).sum() / count.sum()):.2f}")
    ax.set(xlabel=f"predicted: {what}", ylabel="share that happened", xlim=(-0.03, 1.03),
           ylim=(-0.05, 1.05), aspect="equal", title=f"chances are off by {' and '.join(off)}")
    ax.grid(True)
    handles: list[Any] = ax.get_lines()
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


@styled
def exam_table(models: Mapping[str, Mapping[str, float]]) -> Figure:
    """Which share of each kind's held-out questions each checkpoint got right, as a table.

    The row `bits_per_byte`, where there is one, is no share: it is written and not coloured.
    """
    if not models or len({tuple(shares) for shares in models.values()}) != 1:
        raise ValueError(f"models: {len(models)} with different kinds, expected some with the same")
    kinds = [kind for kind in next(iter(models.values())) if kind != "bits_per_byte"]
    shown = kinds + ["bits_per_byte"] * ("bits_per_byte" in next(iter(models.values())))
    figure = Picture(2.6 + 1.1 * len(models), 0.7 + 0.27 * len(shown))
    ax = figure.subplots()
    shares = np.array([[of.get(kind, np.nan) if kind in kinds else np.nan
                        for of in models.values()] for kind in shown])
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for y, kind in enumerate(shown):
        for x, of in enumerate(models.values()):
            text = f"{of[kind]:.3f}" if kind == "bits_per_byte" else f"{of[kind]:.0%}"
            dark = kind in kinds and of[kind] > 0.6
            ax.text(x, y, text, ha="center", va="center", fontsize=9,
                    color="white" if dark else INK)
    ax.set_xticks(range(len(models)), list(models))
    ax.set_yticks(range(len(shown)), [kind.replace("_", " ") for kind in shown])
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    first, last = ([of[kind] for kind in kinds] for of in (next(iter(models.values())),
                                                           list(models.values())[-1]))
    ax.set_title(f"right: {np.mean(first):.0%} → {np.mean(last):.0%}", loc="left", pad=22)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    return figure


@styled
def answer_tokens(tokens: Sequence[str], learned: Sequence[bool], across: int = 12) -> Figure:
    """A conversation's tokens in boxes, `across` in a row; those that are learned have colour."""
    if not tokens or len(tokens) != len(learned):
        raise ValueError(f"tokens: {len(tokens)}, learned: {len(learned)}, expected as many of "
                         "both, at least one")
    rows = -(-len(tokens) // across)
    figure = Picture(10.0, 0.9 + 0.55 * rows)
    ax = figure.subplots()
    for i, (token, counts) in enumerate(zip(tokens, learned, strict=True)):
        x, y, color = i % across, i // across, UP if counts else CALM
        ax.add_patch(FancyBboxPatch(
            (x + 0.09, y + 0.18), 0.82, 0.64, boxstyle="round,pad=0.04", lw=1.4, edgecolor=color,
            facecolor=color if counts else "white"))
        ax.text(x + 0.5, y + 0.5, token, ha="center", va="center", fontsize=9,
                color="white" if counts else INK)
    ax.set(xlim=(0, across), ylim=(rows, 0),
           title=f"{sum(learned)} of {len(tokens)} tokens are learned, the others are read")
    ax.set_axis_off()
    return figure


@styled
def learning_ways(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The runs of `bench grpo`: held-out questions right by CPU seconds, each way a colour, a thin
    line for each seed and a thick one for their mean."""
    if not runs:
        raise ValueError("runs: expected at least one")
    figure = Picture(8.0, 4.0)
    ax = figure.subplots()
    ends = []
    for color, way in zip(_LINES, runs[0]["curves"], strict=False):
        curves = [run["curves"][way] for run in runs]
        for curve in curves:
            ax.plot([p["seconds"] for p in curve], [p["right"] for p in curve], color=color, lw=0.8,
                    alpha=0.5)
        mean = {key: np.mean([[p[key] for p in curve] for curve in curves], 0)
                for key in ("seconds", "right")}
        ax.plot(mean["seconds"], mean["right"], color=color, lw=2.2, label=way)
        ends.append(f"{way} {mean['right'][-1]:.0%}")
    start = np.mean([run["curves"][way][0]["right"] for run in runs])
    ax.set_title(f"from {start:.0%} to " + ", ".join(ends), loc="left")
    ax.set_xlabel("CPU seconds")
    ax.set_ylabel("held-out questions right")
    ax.set_ylim(0, 1)
    ax.legend(loc="lower right")
    return figure

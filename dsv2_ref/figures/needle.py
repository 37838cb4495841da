# SPDX-License-Identifier: MIT
"""Long context: what a model finds, by length and depth; where it looks; what a length costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv2_ref.figures.style import COLORS, GIB, INK, MORE_COLORS, Picture, styled, tokens_label

# from "nothing found" to "all found": two colours that differ in brightness as well
_FOUND = LinearSegmentedColormap.from_list("found", ("#D55E00", "#F4E3C1", "#009E73"))


def _grid(ax: Any, result: Mapping[str, Any], title: str, depths: bool = True) -> Any:
    values = np.array(result["grid"], dtype=float).T                         # (depths, lengths)
    if values.shape != (len(result["depths"]), len(result["lengths"])):
        raise ValueError(f"grid: {values.T.shape}, expected a row for each of "
                         f"{len(result['lengths'])} lengths, a number for each of "
                         f"{len(result['depths'])} depths")
    image = ax.imshow(values, cmap=_FOUND, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(values.shape[1]), [tokens_label(n) for n in result["lengths"]])
    ax.set_yticks(range(values.shape[0]), [f"{d:g}" for d in result["depths"]])
    if values.size <= 80:
        for (row, column), value in np.ndenumerate(values):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=INK)
    ax.set(xlabel="tokens", ylabel="depth of the needle (%)" if depths else "")
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


@styled
def needle_grid(result: Mapping[str, Any]) -> Figure:
    """The paper's Figure 4 for a model of ours, from a result of `inference.needle.run`."""
    n = len(result["lengths"])
    figure = Picture(min(3.2 + 0.75 * n, 10), 0.9 + 0.42 * max(len(result["depths"]), 5))
    ax = figure.subplots()
    image = _grid(ax, result, f"{100 * result['mean']:.0f} % of the needles found")
    figure.colorbar(image, ax=ax, label="share found")
    return figure


@styled
def needle_grids(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Several grids side by side, by name: the same lengths and depths, read differently."""
    if not results:
        raise ValueError("results: empty, expected at least one grid")
    figure = Picture(2.0 + 2.6 * len(results), 3.6)
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for i, (ax, (name, result)) in enumerate(zip(axes, results.items())):
        image = _grid(ax, result, f"{name}\n{100 * result['mean']:.0f} % found", depths=i == 0)
    figure.colorbar(image, ax=axes, label="share found")
    return figure


@styled
def pair_wavelengths(frequencies: Any, stretched: Any, trained: int, factor: float) -> Figure:
    """Tokens that one turn of each pair takes, before and after YaRN, beside the two lengths.

    frequencies, stretched: (d_r/2,) radians per token.
    """
    before, after = (2 * np.pi / np.asarray(f, float) for f in (frequencies, stretched))
    unseen = int((before > trained).sum())
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    ax.plot(before, color=MORE_COLORS[3], marker="o", ms=5, label="plain RoPE")
    ax.plot(after, color=COLORS["MLA"], marker="o", ms=5, label=f"YaRN, s = {factor:g}")
    for length, text in ((trained, "trained"), (factor * trained, "read")):
        ax.axhline(length, color=INK, lw=1, ls="--")
        ax.annotate(f"{text}: {tokens_label(length)} tokens", (0, length), (0, 3),
                    textcoords="offset points", va="bottom")
    ax.set(yscale="log", xlabel="pair of numbers of the RoPE key", ylabel="tokens for one turn",
           title=f"{unseen} of {len(before)} pairs never made a whole turn in training")
    ax.set_xticks(range(0, len(before), max(1, len(before) // 16)))
    ax.legend(loc="lower right")
    return figure


@styled
def found_by_length(runs: Sequence[Mapping[str, Mapping[str, Any]]], trained: int) -> Figure:
    """Share of the needles found against the length: a dot for each seed, a line for their mean.

    runs: of each seed, name -> a result of `inference.needle.run`; `trained`: the length that the
    models were trained at. The title is about the longest length that all were read at.
    """
    if not runs or any(list(seed) != list(runs[0]) for seed in runs):
        raise ValueError("runs: expected at least one seed, and the same names in all")
    figure = Picture(8.6, 4.0)
    ax = figure.subplots()
    colors = (MORE_COLORS[3], COLORS["MLA"], COLORS["GQA"], MORE_COLORS[1], MORE_COLORS[0])
    means: dict[str, dict[int, float]] = {}
    for i, name in enumerate(runs[0]):
        lengths = list(runs[0][name]["lengths"])
        found = np.array([[np.mean(row) for row in seed[name]["grid"]] for seed in runs])
        beside = 2 ** (0.09 * (i - (len(runs[0]) - 1) / 2))      # lines that would hide each other
        x = beside * np.array(lengths, float)
        color = colors[i % len(colors)]
        ax.plot(np.tile(x, len(runs)), found.ravel(), "o", ms=4, color=color, alpha=0.55)
        ax.plot(x, found.mean(0), color=color, marker="_", ms=12, mew=2, label=name)
        means[name] = dict(zip(lengths, found.mean(0), strict=True))
    ticks = sorted({n for of in means.values() for n in of})
    common = [n for n in ticks if all(n in of for of in means.values())]
    told = max(common or ticks)
    ends = {name: of[told] for name, of in means.items() if told in of}
    most, least = max(ends, key=ends.get), min(ends, key=ends.get)
    ax.axvline(trained, color=INK, lw=1, ls=":", label=f"trained at {tokens_label(trained)}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [tokens_label(n) for n in ticks])
    ax.minorticks_off()
    ax.grid(True, axis="y")
    ax.set(ylim=(-0.04, 1.04), xlabel="tokens", ylabel="share of needles found",
           title=f"At {tokens_label(told)} tokens: {100 * ends[least]:.0f} % with {least}, "
                 f"{100 * ends[most]:.0f} % with {most}")
    figure.legend(loc="outside right center")
    return figure


@styled
def mistakes_by_factor(
    by_factor: Sequence[Mapping[str, Mapping[str, float]]], trained: int
) -> Figure:
    """Share of needles found at s times the trained length: YaRN, and YaRN with a mistake.

    by_factor: of each seed, s -> {"yarn" or a mistake: share found}. A line is the mean over seeds.
    """
    factors = [round(float(s)) for s in by_factor[0]]
    names = list(next(iter(by_factor[0].values())))
    colors = dict(zip(names, (COLORS["MLA"], *MORE_COLORS[:2], COLORS["MHA"])))
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    worst = {}
    for name in names:
        values = np.array([[at[name] for at in seed.values()] for seed in by_factor])
        wide = {"lw": 6, "alpha": 0.4} if name == "yarn" else {}      # to be seen under others
        ax.plot(factors, values.mean(0), color=colors[name], marker="o", ms=5, label=name, **wide)
        worst[name] = values.mean(0).min()
    ax.set(xscale="log", ylim=(-0.03, 1.03), xlabel=f"s, reading s × {trained} tokens",
           ylabel="share of needles found")
    ax.set_xticks(factors, [str(s) for s in factors])
    ax.minorticks_off()
    ax.grid(True, axis="y")
    fell = min(worst, key=worst.get)
    ax.set_title(f"The worst mistake here: {fell}")
    ax.legend(loc="center left")
    return figure


@styled
def needle_attention(weights: Any, needle: range, words: Sequence[str] = ()) -> Figure:
    """Where each head looks when it has to say the first word of the answer.

    weights (layers, heads, S): of the last token over all S; needle: the places of its tokens,
    words: what stands there.
    """
    weights = np.asarray(weights, float)
    L, n_h, S = weights.shape
    inside = weights[:, :, needle.start : needle.stop].sum(-1)               # (layers, heads)
    layer, head = np.unravel_index(inside.argmax(), inside.shape)
    figure = Picture(9.0, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    left.imshow(inside, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(inside):
        left.text(column, row, f"{value:.2f}", ha="center", va="center",
                  color="white" if value > 0.5 else INK)
    left.set_xticks(range(n_h))
    left.set_yticks(range(L))
    left.set(xlabel="head", ylabel="layer")
    left.set_title("attention that lands on the needle")
    right.bar(range(len(needle)), weights[layer, head, needle.start : needle.stop],
              color=COLORS["MLA"])
    right.set_xticks(range(len(needle)), words or [str(i) for i in needle], rotation=45, ha="right")
    right.set(ylabel="attention", ylim=(0, 1))
    right.set_title(f"layer {layer}, head {head}: {100 * inside[layer, head]:.0f} % on "
                    f"{len(needle)} of {S:,} tokens")
    return figure


@styled
def length_costs(points: Sequence[Mapping[str, float]]) -> Figure:
    """Memory, time to read and time of a decode step against the length, from `long_context`."""
    n = np.array([p["tokens"] for p in points], float)
    figure = Picture(10.0, 3.6)
    memory, reading, decoding = figure.subplots(1, 3)
    memory.plot(n, [p["cache_bytes"] / GIB for p in points], "o-", color=COLORS["MLA"])
    memory.set(ylabel="cache (GiB)")
    seconds, counted = (np.array([p[key] for p in points], float) for key in ("seconds", "counted"))
    reading.plot(n, seconds, "o", color=COLORS["MLA"], label="measured")
    reading.plot(n, counted * seconds[-1] / counted[-1], color=MORE_COLORS[3], label="as counted")
    reading.set(xscale="log", yscale="log", ylabel="seconds to read")
    reading.legend()
    decoding.plot(n, [p["decode_ms"] for p in points], "o-", color=COLORS["MLA"])
    decoding.set(ylabel="ms for one new token", ylim=(0, None))
    shown = [v for v in n if v in (n[-1], n[-1] / 2, n[-1] / 4)]
    for ax in (memory, decoding):
        ax.set_xticks(shown, [tokens_label(v) for v in shown])
    few = n[:: 3] if len(n) > 4 else n
    reading.set_xticks(few, [tokens_label(v) for v in few])
    reading.minorticks_off()
    for ax in (memory, reading, decoding):
        ax.set_xlabel("tokens")
    memory.set_title("memory: a line")
    reading.set_title("reading: a square")
    decoding.set_title("decoding: a line")
    return figure

# SPDX-License-Identifier: MIT
"""MHA, GQA, MQA and MLA at equal parameters: what was measured, and what could have been seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled


def _by_kind(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        kinds.setdefault(run["setting"], []).append(run)
    if len({len(of) for of in kinds.values()}) != 1 or any(
            len({run["seed"] for run in of}) != len(of) for of in kinds.values()):
        raise ValueError(f"runs: {[len(of) for of in kinds.values()]} of each kind, expected each "
                         "seed once with each kind")
    return kinds


@styled
def attention_study(runs: Sequence[Mapping[str, Any]], floor: float) -> Figure:
    """Held-out bits per byte of each kind, a point for each seed, and the corpus's exact entropy.

    runs: records with `setting`, `seed`, `bits_per_byte`, `parameters` and `cached`; floor: bits
    per byte that no model can be below. The bar is the mean over the seeds.
    """
    kinds = _by_kind(runs)
    parameters = [run["parameters"] for run in runs]
    figure = Picture(7.6, 4.2)
    ax = figure.subplots()
    means = {}
    for place, (kind, of) in enumerate(kinds.items()):
        bits = np.array([run["bits_per_byte"] for run in of])
        color = COLORS.get(kind, MORE_COLORS[3])
        ax.plot(place + 0.09 * (np.arange(len(bits)) - (len(bits) - 1) / 2), bits, "o", ms=6,
                color=color)
        ax.plot([place - 0.28, place + 0.28], [bits.mean()] * 2, color=color, lw=2.4)
        ax.annotate(f"{bits.mean():.3f}", (place + 0.3, bits.mean()), (3, 0), va="center",
                    textcoords="offset points", fontsize=9.5)
        means[kind] = bits.mean()
    ax.axhline(floor, color=INK, lw=1.4, ls="--")
    ax.annotate(f"exact entropy of the text: {floor:.3f}", (-0.5, floor), (4, 4),
                textcoords="offset points", va="bottom", fontsize=9.5)
    ax.set_xticks(range(len(kinds)), [
        f"{kind}\n{of[0]['cached']:,} cached" for kind, of in kinds.items()])
    ax.tick_params(axis="x", length=0)
    ax.grid(True, axis="y")
    top = max(run["bits_per_byte"] for run in runs)
    least, most = min(means.values()), max(means.values())
    off = 100 * (max(parameters) / min(parameters) - 1)
    ax.set(xlim=(-0.5, len(kinds) - 0.3), ylim=(min(0.85 * floor, least), 1.06 * top),
           ylabel="bits per byte of held-out text",
           xlabel="numbers cached per token and layer",
           title=f"{np.mean(parameters) / 1e6:.2f}M parameters each (±{off / 2:.2f} %): "
                 f"{least / floor:.1f} to {most / floor:.1f} times the floor")
    return figure


@styled
def seeds_and_differences(
    seeds: Sequence[int], smallest: Sequence[float], found: Mapping[str, float], had: int
) -> Figure:
    """The smallest difference that so many seeds see, beside the differences that were found.

    smallest: for each of `seeds` per kind, bits per byte seen in 8 of 10 such studies; found: kind
    -> its difference from the first, drawn at the number of seeds that the study `had`.
    """
    if len(seeds) != len(smallest) or had not in seeds:
        raise ValueError(f"seeds: {list(seeds)} with {len(smallest)} differences, expected as many "
                         f"of both, and {had} among the seeds")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    ax.plot(seeds, smallest, color=INK, label="smallest that is seen 8 times of 10")
    ax.fill_between(seeds, smallest, 0, color="#EEEEEE", label="below: missed more than 2 of 10")
    for kind, difference in found.items():
        ax.plot(had, abs(difference), "o", ms=8, color=COLORS.get(kind, MORE_COLORS[3]),
                label=f"{kind}: {difference:+.4f}")
    at = smallest[list(seeds).index(had)]
    ax.set(xscale="log", yscale="log", xlabel="seeds per kind",
           ylabel="difference (bits per byte)",
           ylim=(0.7 * min(*smallest, *map(abs, found.values())), None),
           title=f"{had} seeds see {at:.3f} bits per byte, {seeds[-1]} seeds {smallest[-1]:.4f}")
    ticks = [n for n in (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if seeds[0] <= n <= seeds[-1]]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    low, high = ax.get_ylim()
    marks = [m * 10.0**e for e in range(-6, 2) for m in (1, 2, 5) if low < m * 10.0**e < high]
    ax.set_yticks(marks, [f"{m:g}" for m in marks])
    ax.minorticks_off()
    ax.grid(True)
    ax.legend(loc="upper right")
    return figure

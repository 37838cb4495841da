# SPDX-License-Identifier: MIT
"""What one change does to a model, beside what another seed does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv2_ref.figures.routing import SEED_COLORS
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled


@styled
def study_changes(studies: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """What each setting changes against the first of its study, in per cent of held-out bits.

    studies: name -> records with `setting`, `seed` and `bits_per_byte`, every seed with every
    setting. A dot is one seed compared with itself; the bar is their mean ± one deviation. A change
    is told apart from chance if its mean is more than twice its deviation over the seeds.
    """
    if not studies:
        raise ValueError("studies: empty, expected at least one")
    figure = Picture(6.4 if len(studies) == 1 else 8.8, 2.9 * -(-len(studies) // 2) + 0.3)
    axes = figure.subplots(-(-len(studies) // 2), min(len(studies), 2), squeeze=False).ravel()
    found = n_changes = 0
    for ax, (name, runs) in zip(axes, studies.items()):
        kinds, changes = _changes(name, runs)
        mean, deviation = changes.mean(0), changes.std(0, ddof=1 if len(changes) > 1 else 0)
        found += int((np.abs(mean) > 2 * deviation).sum()) if len(changes) > 1 else 0
        n_changes += len(kinds) - 1
        places = np.arange(1, len(kinds))
        ax.axhline(0, color=INK, lw=1.0)
        for place, kind in enumerate(kinds[1:]):
            color = COLORS.get(kind, MORE_COLORS[1])
            ax.plot(np.full(len(changes), place + 0.9), changes[:, place], "o", color=color, ms=4)
            ax.errorbar(place + 1.1, mean[place], deviation[place], color=color, marker="_", ms=14,
                        mew=2.0, capsize=4, lw=1.6)
        ax.set_xticks(places, kinds[1:])
        ax.set(xlim=(0.5, len(kinds) - 0.5), xlabel=name,
               ylabel=f"bits per byte against\n{kinds[0]} (%)")
        ax.grid(True, axis="y")
    for ax in axes[len(studies):]:
        ax.remove()
    verb = "exceeds" if found == 1 else "exceed"
    axes[0].set_title(f"{found} of {n_changes} changes {verb} two deviations of the seeds")
    return figure


@styled
def balance_cost(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """What the balance losses cure, and what they cost: each run a point, each seed a line.

    runs: records with `setting`, `seed`, `dead` (share of the experts), `fullest` (fair shares) and
    `bits_per_byte`, every seed with every setting; the first setting has all the losses.
    """
    kinds, _ = _changes("balance", runs)
    kinds, seeds = kinds[::-1], list(dict.fromkeys(run["seed"] for run in runs))
    table = {(run["seed"], run["setting"]): run for run in runs}
    figure = Picture(11.0, 3.9)
    axes = figure.subplots(1, 3)
    values = {name: np.array([[table[seed, kind][name] for kind in kinds] for seed in seeds])
              for name in ("dead", "fullest", "bits_per_byte")}
    for ax, (name, rows) in zip(axes, values.items(), strict=True):
        rows = 100 * rows if name == "dead" else rows
        for n, (marker, color, seed, row) in enumerate(zip("o^sD", SEED_COLORS, seeds, rows)):
            places = np.arange(len(kinds)) + 0.07 * (n - (len(seeds) - 1) / 2)   # side by side
            ax.plot(places, row, marker=marker, color=color, ms=8, lw=1.0, label=f"seed {seed}")
        ax.set_xticks(range(len(kinds)), kinds)
        ax.margins(x=0.15, y=0.15)
        ax.grid(True, axis="y")
        ax.set_xlabel("balance losses in training")
    dead, fullest = 100 * values["dead"], values["fullest"]
    axes[0].set(ylabel="experts that are dead (%)", ylim=(-0.06 * dead.max() - 0.01, None),
                title=f"Dead: up to {dead[:, 0].max():.3g} % → {dead[:, -1].max():.3g} %")
    axes[1].set(ylabel="fullest expert (fair shares)", ylim=(0, None),
                title=f"Fullest: up to {fullest[:, 0].max():.1f} → {fullest[:, -1].max():.1f}")
    cost = 100 * (values["bits_per_byte"][:, -1] / values["bits_per_byte"][:, 0] - 1)
    axes[2].set(ylabel="bits per byte",
                title=f"Cost: {cost.min():+.1f} to {cost.max():+.1f} % bits")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _changes(name: str, runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Settings in their order, and (seeds, settings - 1) per cent of change against the first."""
    kinds = list(dict.fromkeys(run["setting"] for run in runs))
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    bits = {(run["seed"], run["setting"]): run["bits_per_byte"] for run in runs}
    if len(kinds) < 2 or len(bits) != len(kinds) * len(seeds):
        raise ValueError(f"{name}: {len(bits)} runs of {len(kinds)} settings and {len(seeds)} "
                         "seeds, expected two settings at least, and each seed with each")
    table = np.array([[bits[seed, kind] for kind in kinds] for seed in seeds])
    return kinds, 100 * (table[:, 1:] / table[:, :1] - 1)

# SPDX-License-Identifier: MIT
"""A run from its log: gradient norm, rate and batch, load; `run_figures` draws all there is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dsv2_ref.figures.experts import expert_load
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled
from dsv2_ref.figures.training import loss_curve

Log = Sequence[Mapping[str, Any]]


def run_figures(log: Log, n_devices: int = 1, first_layer: int = 0) -> dict[str, Figure]:
    """Every figure of a run by name; those of the load if the log has any.

    log: entries of log.jsonl; `first_layer` is the number of the first layer with experts.
    """
    _columns(log, "step", "tokens", "language", "gradient_norm", "lr", "batch")
    drawn = {"loss": loss_curve(log), "gradient_norm": gradient_norm(log), "rate": rate_curve(log)}
    loads = [entry for entry in log if "expert_load" in entry]
    if loads:
        drawn["expert_load"] = expert_load(loads[-1]["expert_load"], n_devices, first_layer)
        drawn["balance"] = balance_curves(log, first_layer)
    return drawn


def _columns(log: Log, *names: str) -> list[np.ndarray]:
    if not log:
        raise ValueError("log: empty, expected at least one entry")
    for entry in log:
        if missing := [name for name in names if name not in entry]:
            raise ValueError(f"log: an entry has no {missing[0]!r}, expected {', '.join(names)}")
    return [np.array([entry[name] for entry in log], float) for name in names]


@styled
def gradient_norm(log: Log) -> Figure:
    """Norm of all gradients before clipping, by step; skipped steps are marked.

    log: entries with `step` and `gradient_norm`, `skipped` where the update was left out.
    """
    steps, norms = _columns(log, "step", "gradient_norm")
    skipped = np.array([bool(entry.get("skipped")) for entry in log])
    finite = np.isfinite(norms)
    if not finite.any():
        raise ValueError("log: no gradient norm is a number, expected one at least")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    ax.plot(steps, np.where(finite, norms, np.nan), color=COLORS["MLA"], lw=1.0)
    top = norms[finite].max()
    if skipped.any():                # what is no number stands at the top
        ax.plot(steps[skipped], np.where(finite, norms, top)[skipped], "x", color=COLORS["MHA"],
                ms=8, mew=2, label="skipped", clip_on=False)
        ax.legend(loc="best")
    left = f"{skipped.sum()} of {len(log)} steps skipped" if skipped.any() else "no step skipped"
    ax.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log",
           ylim=(norms[finite].min() / 1.5, top * 1.5),
           title=f"Gradient norm: {np.median(norms[finite]):.2g} in the median, {left}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, axis="y")
    return figure


@styled
def rate_curve(log: Log) -> Figure:
    """The rate by step, and the sequences of a step where they change.

    log: entries with `step`, `lr` and `batch`.
    """
    steps, rates, batches = _columns(log, "step", "lr", "batch")
    grows = batches.min() < batches.max()
    figure = Picture(10.0 if grows else 7.6, 3.6)
    axes = figure.subplots(1, 1 + grows, squeeze=False)[0]
    axes[0].plot(steps, rates, color=COLORS["MLA"])
    axes[0].set(ylabel="rate", ylim=(0, None),
                title=f"Rate: {rates.max():.2g} at step {steps[rates.argmax()]:.0f}, "
                      f"{rates[-1]:.2g} at the end")
    if grows:
        axes[1].step(steps, batches, where="mid", color=COLORS["GQA"])
        axes[1].set(ylabel="sequences a step", ylim=(0, None),
                    title=f"Batch: {batches[0]:.0f} to {batches[-1]:.0f} sequences")
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(True, axis="y")
    return figure


@styled
def balance_curves(log: Log, first_layer: int = 0) -> Figure:
    """By step, a line a layer: the fullest expert against its fair share, and the gates' entropy.

    log: entries, some with `expert_load` (layers, experts) and `gate_entropy` (layers).
    """
    loads = [entry for entry in log if "expert_load" in entry]
    if not loads:
        raise ValueError("log: no entry has 'expert_load', expected one at least")
    steps, load, entropy = _columns(loads, "step", "expert_load", "gate_entropy")
    fullest = load.max(2) / np.maximum(load.mean(2), 1e-12)                 # (records, layers)
    most = math.log(load.shape[2])
    figure = Picture(10.0, 4.0)
    axes = figure.subplots(1, 2)
    n_layers = load.shape[1]
    colors = (COLORS["MLA"], COLORS["GQA"], COLORS["MHA"], *MORE_COLORS)
    for i in range(n_layers):
        label = f"layer {first_layer + i}" if n_layers <= len(colors) else None
        for ax, values in zip(axes, (fullest, entropy)):
            ax.plot(steps, values[:, i], "o-", ms=3, color=colors[i % len(colors)], label=label)
    axes[0].axhline(1, color=INK, lw=1.2, ls="--")
    title = f"Fullest: up to {fullest.max():.1f} shares, {fullest[-1].max():.1f} at the end"
    axes[0].set(ylabel="fullest expert (fair share = 1)", ylim=(0, None), title=title)
    axes[1].axhline(most, color=INK, lw=1.2, ls="--")
    axes[1].set(ylabel="entropy of affinities (nats)", ylim=(0, most * 1.1),
                title=f"Entropy: {entropy[-1].mean():.2f} of at most {most:.2f} nats")
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(True, axis="y")
        if n_layers <= len(colors):
            ax.legend(loc="best")
    return figure

# SPDX-License-Identifier: MIT
"""How a training run went, from its log: loss, gradient norm, rate and batch, load; `run_figures`
draws all there is. And what became of a run that was stopped and went on."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dsv2_ref.figures.experts import expert_load
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled
from dsv2_ref.training.watching import fair_shares

Log = Sequence[Mapping[str, Any]]


def run_figures(log: Log, n_devices: int = 1, first_layer: int = 0) -> dict[str, Figure]:
    """Every figure of a run by name; those of the load if the log has any.

    log: entries of log.jsonl; `first_layer` is the number of the first layer with experts. Where
    the run was not for the next token, the loss is that of all its objective.
    """
    loss = "language" if not log or "language" in log[0] else "loss"
    _columns(log, "step", "tokens", loss, "gradient_norm", "lr", "batch")
    drawn = {"loss": loss_curve(log, loss=loss), "gradient_norm": gradient_norm(log),
             "rate": rate_curve(log)}
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
def loss_curve(
    log: Sequence[Mapping[str, float]], references: Mapping[str, float] | None = None,
    loss: str = "language",
) -> Figure:
    """Training loss, and held-out bits per byte where the log has any.

    log: records with `tokens` (read so far) and `loss` (nats per token), some of them with
    `bits_per_byte`. references: bits per byte of compressors, drawn as lines.
    """
    if not log:
        raise ValueError("log: empty, expected at least one record")
    held_out = [r for r in log if r.get("bits_per_byte") is not None]
    figure = Picture(10.0 if held_out else 6.4, 4.0)
    axes = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    x, y = (np.array([r[key] for r in log], float) for key in ("tokens", loss))
    if not (finite := np.isfinite(y)).any():
        raise ValueError("log: no loss is a number, expected one at least")
    x, y = x[finite], y[finite]
    window = np.ones(min(len(y) // 40 * 2 + 1, len(y)))
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    axes[0].plot(x / 1e6, y, color=COLORS["MLA"], alpha=0.35, lw=0.8, label="each step")
    axes[0].plot(x / 1e6, smooth, color=COLORS["MLA"], label="running mean")
    axes[0].set(ylabel="training loss (nats per token)",
                title=f"Training loss: {y[0]:.2f} to {smooth[-1]:.2f} nats per token")
    if held_out:
        x, bits = (np.array([r[k] for r in held_out], float) for k in ("tokens", "bits_per_byte"))
        axes[1].plot(x / 1e6, bits, "o-", color=COLORS["MLA"], ms=4, label="model")
        for line, (name, value) in zip(cycle(("--", ":", "-.")), (references or {}).items()):
            axes[1].axhline(value, color=INK, lw=1.4, ls=line, label=f"{name} ({value:.2f})")
        beaten = sorted((v, f", below {name}") for name, v in (references or {}).items()
                        if bits[-1] < v)
        axes[1].set(ylabel="held-out text (bits per byte)", ylim=(0, None),
                    title=f"Held-out: {bits[-1]:.2f} bits per byte{beaten[0][1] if beaten else ''}")
    for ax in axes:
        ax.set_xlabel("tokens read (millions)")
        ax.grid(True, axis="y")
        ax.legend(loc="best")
    return figure


@styled
def loss_floor(tokens: Sequence[float], bits: Sequence[float], floor: float) -> Figure:
    """Held-out bits per byte against tokens read, and what lies between them and the exact entropy.

    floor: the entropy rate in bits per byte, which no model can pass in expectation.
    """
    x, y = np.asarray(tokens, float) / 1e6, np.asarray(bits, float)
    if x.shape != y.shape or not len(x) or not y.min() > floor > 0:
        raise ValueError(f"bits: {len(y)} values for {len(x)} of tokens and a floor of {floor}, "
                         "expected as many of each, all above a positive floor")
    gap = y - floor
    figure = Picture(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    left.plot(x, y, "o-", color=COLORS["MLA"], ms=4, label="model")
    left.axhline(floor, color=INK, lw=1.4, ls="--", label=f"exact entropy rate ({floor:.3f})")
    left.set(ylabel="held-out stories (bits per byte)", ylim=(0, None),
             title=f"{y[-1]:.3f} bits per byte, the floor is {floor:.3f}")
    left.legend(loc="best")
    right.plot(x, gap, "o-", color=COLORS["MLA"], ms=4)
    right.set(ylabel="above the floor (bits per byte)", xscale="log", yscale="log",
              title=f"The gap: {gap[-1]:.3f} bits, {100 * gap[-1] / floor:.0f} % of the floor")
    for ax in (left, right):
        ax.set_xlabel("tokens read (millions)")
        ax.grid(True)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axis.set_minor_formatter(NullFormatter())
    return figure


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
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center")
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
        axes[1].set(ylabel="sequences per step", ylim=(0, None),
                    title=f"Batch: {batches[0]:.0f} to {batches[-1]:.0f} sequences")
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(True, axis="y")
    return figure


@styled
def balance_curves(log: Log, first_layer: int = 0) -> Figure:
    """By step, a line per layer: the fullest and the emptiest expert, against their fair share.

    log: entries, some with `expert_load` (layers, experts).
    """
    loads = [entry for entry in log if "expert_load" in entry]
    if not loads:
        raise ValueError("log: no entry has 'expert_load', expected one at least")
    steps, load = _columns(loads, "step", "expert_load")
    shares = fair_shares(load)                                              # (records, layers, E)
    fullest, emptiest = shares.max(2), shares.min(2)                        # (records, layers)
    figure = Picture(10.0, 4.0)
    axes = figure.subplots(1, 2)
    n_layers = load.shape[1]
    colors = (COLORS["MLA"], COLORS["GQA"], COLORS["MHA"], *MORE_COLORS)
    for i in range(n_layers):
        label = f"layer {first_layer + i}" if n_layers <= len(colors) else None
        for ax, values in zip(axes, (fullest, emptiest)):
            ax.plot(steps, values[:, i], "o-", ms=3, color=colors[i % len(colors)], label=label)
    axes[0].set(ylabel="fullest expert (fair share = 1)", ylim=(0, None),
                title=f"Fullest: up to {fullest.max():.1f} shares, "
                      f"{fullest[-1].max():.1f} at the end")
    axes[1].set(ylabel="emptiest expert (fair share = 1)", ylim=(-0.02, 1.05),
                title=f"Emptiest: {emptiest.min():.1f} shares, "
                      f"{emptiest[-1].min():.1f} at the end")
    for ax in axes:
        ax.axhline(1, color=INK, lw=1.2, ls="--")
        ax.set_xlabel("step")
        ax.grid(True, axis="y")
        if n_layers <= len(colors):
            ax.legend(loc="best")
    return figure


@styled
def run_lives(lives: Sequence[Mapping[str, Any]], steps: int) -> Figure:
    """A run of `steps` steps that was killed and went on: a bar per life, over its steps.

    lives: each with `first`, the step it began with, `last`, the last one in its log when it ended,
    and `states`, the steps that it saved a state after.
    """
    if not lives:
        raise ValueError("lives: none, expected one at least")
    again = sum(max(0, before["last"] - after["first"] + 1)
                for before, after in zip(lives, lives[1:]))
    figure = Picture(9.0, 0.5 * len(lives) + 2.0)
    ax = figure.subplots()
    for row, life in enumerate(lives):
        twice = 0
        if row + 1 < len(lives):
            twice = max(0, life["last"] - lives[row + 1]["first"] + 1)
        first, last = life["first"] - 0.5, life["last"] + 0.5
        ax.barh(row, last - twice - first, left=first, height=0.55, color=COLORS["MLA"],
                label="kept" if row == 0 else None)
        ax.barh(row, twice, left=last - twice, height=0.55, color=COLORS["MHA"],
                label="lost with the kill, done again" if row == 0 else None)
        ax.plot([step + 0.5 for step in life["states"]], [row] * len(life["states"]), "|",
                color=INK, ms=18, mew=1.6, label="a state is saved" if row == 0 else None)
    ax.set(xlim=(0.5, steps + 0.5), yticks=range(len(lives)), xlabel="step",
           yticklabels=[f"life {row + 1}" for row in range(len(lives))],
           title=f"{len(lives) - 1} kills: {again} of {steps} steps are done again")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def resume_gaps(steps: Sequence[float], gaps: Mapping[str, Sequence[float]]) -> Figure:
    """How far resumed runs are from the one that was not stopped, by what their state held.

    gaps: name -> differences of the loss, one per step.
    """
    if not gaps or any(len(values) != len(steps) or not len(values) for values in gaps.values()):
        raise ValueError(f"gaps: {[len(v) for v in gaps.values()]} values, expected {len(steps)} "
                         "each, one at least")
    figure = Picture(8.6, 4.0)
    ax = figure.subplots()
    told = []
    for (name, values), color in zip(gaps.items(), cycle((COLORS["MLA"], COLORS["MHA"],
                                                             COLORS["GQA"], *MORE_COLORS))):
        y = np.asarray(values, float)
        told.append(f"{name} {np.abs(y).max():.2g}")
        ax.plot(steps, y, "o-", ms=3, lw=1.6, color=color, label=name)
    ax.set(xlabel="step", ylabel="loss less the unbroken run's (nats)",
           title=f"At most: {', '.join(told)} nats")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True, axis="y")
    ax.legend(loc="best")
    return figure


@styled
def saving_cost(
    minutes: Sequence[float], predicted: Sequence[float], simulated: Mapping[float, float]
) -> Figure:
    """Share of the time that is lost, to saving and to kills, by the minutes between two states.

    simulated: minutes -> share.
    """
    x, y = np.asarray(minutes, float), np.asarray(predicted, float)
    if x.shape != y.shape or not len(x):
        raise ValueError(f"predicted: {len(y)} values, expected {len(x)}, one at least")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    ax.plot(x, 100 * y, color=COLORS["MLA"], label="formula")
    ax.plot(list(simulated), [100 * share for share in simulated.values()], "o",
            color=COLORS["MHA"], ms=6, label="simulated")
    ax.set(xscale="log", xlabel="minutes between two states", ylabel="time lost (%)",
           ylim=(0, None), title=f"Least is lost at a state every {x[y.argmin()]:.0f} minutes: "
                                 f"{100 * y.min():.1f} %")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, axis="y")
    ax.legend(loc="best")
    return figure

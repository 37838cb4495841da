# SPDX-License-Identifier: MIT
"""Balance and its absence: what the losses push, loads over training, slots that are dropped."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dsv2_ref.figures.experts import load_bar, load_colors
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled
from dsv2_ref.training.watching import fair_shares

UP, DOWN, SAFE = COLORS["MLA"], COLORS["MHA"], MORE_COLORS[1]
IDLE = 0.1             # of a fair share: an expert below it is called idle


def _device_borders(ax: Axes, n_experts: int, n_devices: int, draw: str = "axvline") -> None:
    size = n_experts // n_devices
    for border in range(size, n_experts, size):
        getattr(ax, draw)(border - 0.5, color=INK, lw=1.2)


@styled
def loss_arrows(before: Any, after: Mapping[str, Any], counts: Mapping[str, Any],
                n_devices: int) -> Figure:
    """Mean affinity of each expert before and after one step down each loss, a panel a loss.

    before (E,), after[name] (E,), counts[name]: what that loss counted, (E,) or (D,).
    """
    before = np.asarray(before, float)
    if before.ndim != 1 or len(before) % n_devices:
        raise ValueError(f"before: shape {before.shape} on {n_devices} devices, expected one "
                         "dimension, a multiple of the devices")
    if list(after) != list(counts):
        raise ValueError(f"counts: of {', '.join(counts)}, expected of {', '.join(after)}")
    figure, E = Picture(11.0, 3.9), len(before)
    axes = figure.subplots(1, len(after), sharey=True, squeeze=False)[0]
    everything = np.stack([before, *(np.asarray(a, float) for a in after.values())])
    low, high = everything.min(), everything.max()
    low, high = max(0.0, low - 0.2 * (high - low)), high + 0.3 * (high - low)
    for ax, (name, values) in zip(axes, after.items(), strict=True):
        moved, f = np.asarray(values, float) - before, np.asarray(counts[name], float)
        moves = np.abs(moved) > 1e-9
        ax.hlines(before, np.arange(E) - 0.3, np.arange(E) + 0.3, color=INK, lw=2)
        for i in np.flatnonzero(moves):
            ax.annotate("", (i, before[i] + moved[i]), (i, before[i]), arrowprops={
                "arrowstyle": "-|>", "lw": 2.0, "color": UP if moved[i] > 0 else DOWN,
                "shrinkA": 0, "shrinkB": 0,      # the head of a short arrow is small
                "mutation_scale": float(np.clip(150 * abs(moved[i]) / (high - low), 4, 14))})
        width = E // len(f)
        for i, value in enumerate(f):
            ax.text(i * width + (width - 1) / 2, 0.92, f"{value:.3g}", ha="center",
                    transform=ax.get_xaxis_transform(),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
        _device_borders(ax, E, n_devices)
        lowered = ", ".join(map(str, np.flatnonzero(moves & (moved < 0))))
        ax.set(xlabel="routed expert", xticks=range(E), xlim=(-0.5, E - 0.5), ylim=(low, high),
               title=f"{name.capitalize()} loss lowers {lowered or 'none'}")
        ax.grid(True, axis="y")
    axes[0].set_ylabel("mean affinity (numbers on top: f)")
    return figure


def _shares(loads: Mapping[str, Any], n_devices: int) -> dict[str, np.ndarray]:
    """Counts (steps, layers, E) of each run as shares of an equal load."""
    shares = {}
    for name, load in loads.items():
        load = np.asarray(load, float)
        if load.ndim != 3 or load.shape[2] % n_devices:
            raise ValueError(f"loads: {name!r} has shape {load.shape} on {n_devices} devices, "
                             "expected (steps, layers, a multiple of the devices)")
        shares[name] = fair_shares(load)
    if len({s.shape for s in shares.values()}) != 1:
        raise ValueError("loads: runs of different sizes, expected at least one, all of one shape")
    return shares


def _idle(share: np.ndarray) -> str:
    """How many experts of a run (steps, layers, E) end nearly without tokens."""
    end = share[-max(len(share) // 10, 1):].mean(0)
    return f"{(end < IDLE).sum()} of {end.size} experts end idle"


@styled
def load_over_training(loads: Mapping[str, Any], n_devices: int = 1,
                       first_layer: int = 0) -> Figure:
    """Heat map of each expert's load over the steps: a column per run, a row per layer.

    loads[name] (steps, layers, experts) counts. Idle: less than a tenth of a fair share, in the
    mean of the last tenth of the steps.
    """
    shares = _shares(loads, n_devices)
    n_steps, n_layers, E = next(iter(shares.values())).shape
    everything = np.stack(list(shares.values()))
    colors, bar = load_colors(everything), load_bar(everything)
    figure = Picture(10.0, 2.1 * n_layers + 1.0)
    axes = figure.subplots(n_layers, len(shares), sharex=True, sharey=True, squeeze=False)
    for column, (name, share) in zip(axes.T, shares.items(), strict=True):
        for layer, ax in enumerate(column):
            image = ax.imshow(share[:, layer].T, aspect="auto", interpolation="none",
                              extent=(0.5, n_steps + 0.5, E - 0.5, -0.5), **colors)
            _device_borders(ax, E, n_devices, "axhline")
            ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        column[0].set_title(f"{name}: {_idle(share)}")
        column[-1].set_xlabel("training step")
    for layer, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(f"expert, layer {first_layer + layer}")
    figure.colorbar(image, ax=axes, pad=0.02, **bar)
    return figure


@styled
def load_animation(loads: Mapping[str, Any], n_devices: int = 1, first_layer: int = 0,
                   frames: int = 30) -> bytes:
    """The same as bars that move: a GIF, at most `frames` pictures, the last held for 2 seconds.

    Show it with `IPython.display.Image(data, format="gif")`.
    """
    shares = _shares(loads, n_devices)
    n_steps, n_layers, E = next(iter(shares.values())).shape
    figure = Picture(8.0, 1.7 * n_layers + 0.7)
    axes = figure.subplots(n_layers, len(shares), sharex=True, sharey=True, squeeze=False)
    highest = max(s.max() for s in shares.values())
    bars = {}
    for column, name in zip(axes.T, shares, strict=True):
        for layer, ax in enumerate(column):
            bars[name, layer] = ax.bar(range(E), shares[name][0, layer], color=COLORS["MLA"])
            ax.axhline(1.0, color=INK, lw=1.2, ls="--")
            _device_borders(ax, E, n_devices)
            ax.set(xticks=range(E), ylim=(0, 1.05 * highest))
        column[-1].set_xlabel("routed expert")
    for layer, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(f"load, layer {first_layer + layer}")
    pictures = []
    steps = np.unique(np.linspace(0, n_steps - 1, min(frames, n_steps)).round().astype(int))
    for step in steps:
        for (name, layer), rectangles in bars.items():
            for bar, height in zip(rectangles, shares[name][step, layer], strict=True):
                bar.set_height(height)
        for column, name in zip(axes.T, shares, strict=True):
            column[0].set_title(f"{name}, step {step + 1}")
        if not pictures:                 # laid out once: faster, and nothing jumps
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=80)
        pictures.append(Image.open(buffer).convert("RGB").quantize(32, dither=Image.Dither.NONE))
    film = io.BytesIO()
    pictures[0].save(film, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[170] * (len(pictures) - 1) + [2000])
    return film.getvalue()


@styled
def slots_by_device(indices: Any, affinity: Any, keep: Any, n_routed: int, n_devices: int,
                    budget: int, protected: Any = None) -> Figure:
    """Every slot of each device, ranked as it is when some must go; what is dropped is hollow.

    indices, affinity, keep (N, K); protected (N,) tokens, ranked first; a panel per device.
    """
    indices, affinity, keep = np.asarray(indices), np.asarray(affinity, float), np.asarray(keep)
    if not indices.shape == affinity.shape == keep.shape or indices.ndim != 2:
        raise ValueError(f"keep: shapes {indices.shape}, {affinity.shape} and {keep.shape}, "
                         "expected one (tokens, slots) for indices, affinity and keep")
    N, K = indices.shape
    safe = np.zeros(N, bool) if protected is None else np.asarray(protected)
    token, expert = np.repeat(np.arange(N), K), indices.ravel()
    s, kept, device = affinity.ravel(), keep.ravel(), expert // (n_routed // n_devices)
    figure = Picture(11.0, 3.7)
    most = np.bincount(device, minlength=n_devices).max()
    axes = figure.subplots(1, n_devices, sharey=True, squeeze=False)[0]
    for d, ax in enumerate(axes):
        here = np.flatnonzero(device == d)
        here = here[np.lexsort((here, -s[here], ~safe[token[here]]))]
        for x, slot in enumerate(here, 1):
            color = SAFE if safe[token[slot]] else UP if kept[slot] else DOWN
            style = {} if kept[slot] else {"fill": False, "hatch": "///", "linewidth": 1.6}
            ax.bar(x, s[slot], width=0.8, edgecolor=color, facecolor=color, **style)
            ax.annotate(f"t{token[slot]}", (x, s[slot]), (0, 3), textcoords="offset points",
                        ha="center")
        ax.axvline(budget + 0.5, color=INK, lw=1.4, ls="--")
        ax.annotate(f"budget: {budget} slots", (budget + 0.5, 1.0), (4, -12),
                    xycoords=("data", "axes fraction"), textcoords="offset points")
        gone = (~kept[here]).sum()
        ax.set(xlim=(0.3, max(most, budget + 3) + 0.7), xlabel="slot, by rank",
               ylim=(0, 1.25 * s.max()),
               title=f"Device {d} drops {gone if gone else 'none'} of {len(here)} slots")
        ax.set_xticks(range(1, len(here) + 1), [f"e{expert[slot]}" for slot in here])
    axes[0].set_ylabel("affinity of the slot")
    return figure


@styled
def dropped_against_capacity(capacity: Sequence[float],
                             dropped: Mapping[str, Sequence[float]]) -> Figure:
    """Share of slots dropped against the capacity factor, a line per routing; the paper has 1.0."""
    x = np.asarray(capacity, float)
    if not dropped or any(len(y) != len(x) for y in dropped.values()) or not (x == 1.0).any():
        raise ValueError(f"dropped: {len(dropped)} lines over {len(x)} capacities, expected at "
                         "least one, each with a value a capacity, 1.0 among them")
    figure = Picture(7.6, 4.2)
    ax = figure.subplots()
    colors = [UP, DOWN, *MORE_COLORS]
    at_one = {name: 100 * float(np.asarray(y)[x == 1.0][0]) for name, y in dropped.items()}
    for color, (name, y) in zip(colors, dropped.items()):
        ax.plot(x, 100 * np.asarray(y, float), color=color, label=name)
        ax.plot(1.0, at_one[name], "o", color=color)
    ax.axvline(1.0, color=INK, lw=1.2, ls="--")
    told = ", ".join(f"{name} {value:.0f} %" for name, value in at_one.items())
    ax.set(xlabel="capacity factor (1 = average load)", ylabel="slots dropped (%)",
           ylim=(0, None), title=f"Dropped at capacity 1: {told}")
    ax.grid(True)
    ax.legend(loc="best")
    return figure


@styled
def dropped_over_training(dropped: Mapping[str, Sequence[float]]) -> Figure:
    """Share of slots dropped at each training step, a line per run."""
    if not dropped or not all(len(y) for y in dropped.values()):
        raise ValueError(f"dropped: {len(dropped)} runs, expected at least one, none of it empty")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    ends = {}
    for color, (name, y) in zip([DOWN, UP, *MORE_COLORS], dropped.items()):
        y = 100 * np.asarray(y, float)
        ends[name] = y[-max(len(y) // 10, 1):].mean()
        ax.plot(np.arange(len(y)) + 1, y, color=color, label=name)
    told = ", ".join(f"{name} {value:.0f} %" for name, value in ends.items())
    ax.set(xlabel="training step", ylabel="slots dropped (%)", ylim=(0, None),
           title=f"Dropped at the end: {told}")
    ax.grid(True, axis="y")
    ax.legend(loc="best")
    return figure

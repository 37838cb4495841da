# SPDX-License-Identifier: MIT
"""What experts are for, and what a limit on devices changes: tables, dots, bars, a slider.

Colours: an expert that was chosen is green, one in reach light green, one out of reach grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import INK, MORE_COLORS, Picture, png, styled
from dsv2_ref.moe.routing import select_device_limited

CHOSEN, IN_REACH, OUT_OF_REACH = MORE_COLORS[1], "#A6DCCB", "#CCCCCC"
SEED_COLORS = (MORE_COLORS[1], MORE_COLORS[0], INK, MORE_COLORS[3])
GREENS = LinearSegmentedColormap.from_list("greens", ["white", IN_REACH, CHOSEN])


def _matrix(name: str, values: Any, n_rows: int | None = None) -> np.ndarray:
    values = np.asarray(values, float)
    rows = "some" if n_rows is None else n_rows
    if values.ndim != 2 or not values.size or n_rows not in (None, len(values)):
        raise ValueError(f"{name}: shape {values.shape}, expected two dimensions, {rows} rows")
    return values


def _write_cells(ax: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], low: float,
                 high: float) -> None:
    """A text in each cell, white on the dark ends of a colour map between low and high."""
    for (i, j), value in np.ndenumerate(values):
        color = ax.images[0].cmap((value - low) / (high - low))
        dark = np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.5
        ax.text(j, i, texts[i][j], ha="center", va="center", size=9.5,
                color="white" if dark else INK)


@styled
def expert_shares(shares: Mapping[str, Any], kinds: Sequence[str]) -> Figure:
    """How each kind of token spreads over the experts: panels in two columns, if they fill them.

    shares[name] (kinds, experts): each row sums to 1.
    """
    tables = {name: _matrix(name, table, len(kinds)) for name, table in shares.items()}
    if not tables or any(not np.allclose(table.sum(1), 1) for table in tables.values()):
        raise ValueError(f"shares: {len(tables)} tables, expected at least one, whose rows sum to "
                         "1")
    n_rows = len(tables) // 2 if len(tables) % 2 == 0 else len(tables)
    figure = Picture(11.0, n_rows * (0.4 * len(kinds) + 0.9) + 0.4)
    axes = figure.subplots(n_rows, len(tables) // n_rows, sharex=True, sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes.flat, tables.items(), strict=True):
        percent = 100 * table
        image = ax.imshow(percent, aspect="auto", cmap=GREENS, vmin=0, vmax=100)
        _write_cells(ax, percent, [[f"{v:.0f}" for v in row] for row in percent], 0, 100)
        ax.set_xticks(range(table.shape[1]))
        ax.set_yticks(range(len(kinds)), kinds)
        ax.tick_params(length=0)
        ax.set_title(f"{name}: at most {percent.max():.0f} %")
    for ax in axes[-1]:
        ax.set_xlabel("routed expert")
    for ax in axes[:, 0]:
        ax.set_ylabel("kind of token")
    figure.colorbar(image, ax=axes, label="share of each expert (%)", pad=0.02)
    return figure


@styled
def information_dots(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """What a label tells of a token's expert: trained, beside several untrained and chance.

    panels[name][row]: `trained` and `shuffled`, a number of bits each, and `untrained`, several.
    At the right of a row: trained over the best untrained.
    """
    if not panels or len({tuple(rows) for rows in panels.values()}) != 1:
        raise ValueError("panels: expected at least one, and the same rows in each")
    n_rows = len(next(iter(panels.values())))
    figure = Picture(11.0, 0.42 * n_rows + 1.7)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        times = {row: told["trained"] / max(told["untrained"]) for row, told in rows.items()}
        for y, (row, told) in enumerate(rows.items()):
            random = list(told["untrained"])
            ax.plot(told["shuffled"], y, "x", color=INK, ms=7, mew=1.6)
            ax.plot(random, [y] * len(random), "o", mfc="none", mec="#777777", ms=8, mew=1.4)
            ax.plot(told["trained"], y, "o", color=CHOSEN, ms=9)
            ax.text(1.02, y, f"{times[row]:.1f} times", va="center",
                    transform=ax.get_yaxis_transform())
        best = max(times, key=times.__getitem__)
        ax.set(xlabel="bits", title=f"{name}: {times[best]:.1f} times untrained, {best}")
        ax.set_xlim(left=-0.03 * ax.get_xlim()[1])
        ax.grid(True)
    axes[0].set_yticks(range(n_rows), rows)
    axes[0].set_ylim(n_rows - 0.5, -0.5)
    marks = [Line2D([], [], ls="", marker="o", ms=9, color=CHOSEN, label="trained"),
             Line2D([], [], ls="", marker="o", ms=8, mfc="none", mec="#777777", label="untrained"),
             Line2D([], [], ls="", marker="x", ms=7, mew=1.6, color=INK, label="shuffled")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


@styled
def ablation_cost(cost: Any, kinds: Sequence[str]) -> Figure:
    """What the loss gains, on tokens of each kind, when one expert is removed.

    cost (kinds, experts) in nats per token.
    """
    cost = _matrix("cost", cost, len(kinds))
    kind, expert = np.unravel_index(cost.argmax(), cost.shape)
    shown, high = np.where(np.abs(cost) < 0.005, 0.0, cost), max(cost.max(), 1e-9)
    figure = Picture(9.0, 0.42 * len(kinds) + 1.7)
    ax = figure.subplots()
    image = ax.imshow(shown, aspect="auto", cmap="YlOrBr", vmin=0, vmax=high)
    figure.colorbar(image, ax=ax, label="more loss (nats per token)", pad=0.02)
    _write_cells(ax, shown, [[f"{v:.2f}" for v in row] for row in shown], 0, high)
    ax.set_xticks(range(shown.shape[1]))
    ax.set_yticks(range(len(kinds)), kinds)
    ax.tick_params(length=0)
    ax.set(xlabel="routed expert", ylabel="kind of token",
           title=f"Without expert {expert} a token after “{kinds[kind]}” costs "
                 f"{cost.max():.2f} nats more")
    return figure


@styled
def device_messages(reached: Mapping[int, float], limit: int) -> Figure:
    """Devices that a token reaches, on average, for each limit M; `limit` is the one meant."""
    if limit not in reached:
        raise ValueError(f"limit: {limit}, expected one of {list(reached)}")
    figure = Picture(7.6, 3.8)
    ax = figure.subplots()
    free = max(reached.values())
    ax.bar(list(reached), list(reached.values()), width=0.7,
           color=[CHOSEN if m == limit else IN_REACH for m in reached])
    for m, n in reached.items():
        ax.annotate(f"{n:.2f}", (m, n), (0, 4), textcoords="offset points", ha="center")
    ax.set_xticks(list(reached))
    ax.set(xlabel="limit M (devices a token may reach)", ylabel="devices reached (mean)",
           ylim=(0, free * 1.15),
           title=f"M = {limit}: {reached[limit]:.2f} messages per token; without a limit "
                 f"{free:.2f}")
    return figure


@styled
def device_traffic(traffic: Any) -> Figure:
    """Messages between devices: from the device a token lives on to those of its experts.

    traffic (D, D) counts, rows senders, columns receivers.
    """
    traffic = _matrix("traffic", traffic)
    D = len(traffic)
    if traffic.shape != (D, D) or traffic.sum() <= 0:
        raise ValueError(f"traffic: shape {traffic.shape} with {traffic.sum():g} messages, "
                         "expected as many rows as columns, and some messages")
    away = 1 - np.trace(traffic) / traffic.sum()
    figure = Picture(0.95 * D + 2.6, 0.75 * D + 1.6)
    ax = figure.subplots()
    image = ax.imshow(traffic, aspect="auto", cmap=GREENS, vmin=0)
    figure.colorbar(image, ax=ax, label="messages", pad=0.03)
    _write_cells(ax, traffic, [[f"{n:,.0f}" for n in row] for row in traffic], 0, traffic.max())
    for i in range(D):      # what stays at home crosses no wire
        ax.add_patch(Rectangle((i - 0.48, i - 0.48), 0.96, 0.96, fill=False, ec=INK, lw=1.6))
    ax.set_xticks(range(D))
    ax.set_yticks(range(D))
    ax.tick_params(length=0)
    ax.set(xlabel="to device", ylabel="from device",
           title=f"{100 * away:.0f} % of the messages leave their device")
    return figure


@styled
def token_routing(scores: Any, top_k: int, n_devices: int, max_devices: int) -> Figure:
    """One token's affinities, and what V2's device-limited routing makes of them.

    scores (E,) positive; the K best experts on the M devices whose best expert is best.
    """
    s = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if len(s) % n_devices or not 1 <= top_k <= len(s) // n_devices * max_devices:
        raise ValueError(f"scores: {len(s)} on {n_devices} devices, expected a multiple, and at "
                         f"most {top_k} = top_k experts on {max_devices} of them")
    size = len(s) // n_devices
    chosen = select_device_limited(s, top_k, n_devices, max_devices).tolist()
    best = s.view(n_devices, size).amax(-1)
    allowed = set(best.topk(max_devices).indices.tolist())
    figure = Picture(8.4, 3.9)
    ax = figure.subplots()
    ax.bar(range(len(s)), s.tolist(), width=0.75,
           color=[CHOSEN if e in chosen else IN_REACH if e // size in allowed else OUT_OF_REACH
                  for e in range(len(s))])
    top = s.max().item()
    for e, value in enumerate(s.tolist()):
        ax.annotate(f"{value:.2f}", (e, value), (0, 3), textcoords="offset points", ha="center")
    for border in range(size, len(s), size):
        ax.axvline(border - 0.5, color=INK, lw=1.2)
    for device in range(n_devices):
        ax.text(device * size + size / 2 - 0.5, top * 1.17, f"device {device}", ha="center")
    ax.set_xticks(range(len(s)))
    ax.set(xlabel="routed expert", ylabel="affinity", ylim=(0, top * 1.28),
           xlim=(-0.6, len(s) - 0.4),
           title=f"M = {max_devices}: experts {', '.join(map(str, chosen))}, "
                 f"gates {s[chosen].sum().item():.2f} in all")
    ax.legend(handles=[Patch(color=color, label=label) for color, label in (
        (CHOSEN, "chosen"), (IN_REACH, "in reach"), (OUT_OF_REACH, "out of reach"))],
        loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def device_limit_slider(scores: Any, top_k: int, n_devices: int) -> Any:
    """A slider over M and, below it, `token_routing` with that limit.

    The lowest M is the first that has top_k experts in reach.
    """
    lowest = -(-top_k * n_devices // len(scores))

    def draw(limit: int) -> bytes:
        return png(token_routing(scores, top_k, n_devices, limit))

    return slider("M", range(lowest, n_devices + 1), n_devices, draw)


@styled
def limit_quality(runs: Sequence[Mapping[str, float]]) -> Figure:
    """What each limit M changes against the largest, which is none: all runs, then within a seed.

    runs: records with `max_devices`, `seed` and `bits_per_byte`, every seed with every M.
    """
    limits = sorted({run["max_devices"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    table = {(run["max_devices"], run["seed"]): run["bits_per_byte"] for run in runs}
    if len(limits) < 2 or len(table) != len(limits) * len(seeds):
        raise ValueError(f"runs: {len(table)} for {len(limits)} limits and {len(seeds)} seeds, "
                         "expected each seed with each of at least two limits")
    bits = np.array([[table[m, seed] for m in limits] for seed in seeds])        # (seeds, limits)
    change = 100 * (bits / bits[:, -1:] - 1)
    between = 100 * (bits.max(0) / bits.min(0) - 1)
    figure = Picture(11.0, 4.0)
    axes = figure.subplots(1, 2)
    for ax, rows in zip(axes, (bits, change), strict=True):
        for marker, color, seed, row in zip("o^sD", SEED_COLORS, seeds, rows):
            ax.plot(limits, row, marker=marker, color=color, ms=8, lw=1.2, label=f"seed {seed}")
        ax.set_xticks(limits, [*map(str, limits[:-1]), "none"])
        ax.margins(x=0.12, y=0.15)
        ax.grid(True, axis="y")
        ax.set_xlabel("limit M (devices a token may reach)")
    axes[0].set(ylabel="bits per byte",
                title=f"Another seed changes {between.min():.1f} to {between.max():.1f} %")
    axes[1].axhline(0, color=INK, lw=1.0)
    axes[1].set(ylabel="against no limit, same seed (%)",
                title=f"Same seed, a limit: {change[:, :-1].min():+.1f} to "
                      f"{change[:, :-1].max():+.1f} %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure

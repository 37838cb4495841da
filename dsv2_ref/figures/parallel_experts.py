# SPDX-License-Identifier: MIT
"""Experts on several ranks: which rows travel, how many between whom, what hides the journey."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv2_ref.figures.routing import GREENS
from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, png, styled
from dsv2_ref.moe.routing import select_device_limited
from dsv2_ref.parallel.expert import sort_rows

LINK, SHARED, LAYER = COLORS["MQA"], MORE_COLORS[1], "#E4E4E4"
LANES = {"counts": 1, "rows": 1, "all_to_all": 1, "shared": 0, "shared, backward": 0,
         "layer": 0}


@styled
def rows_by_hand(indices: Any, homes: Sequence[int], held: int) -> Figure:
    """Tokens, ranks, and a line for each row that goes from a token's home to a rank.

    indices (N, K) of the tokens' experts, homes (N,) the rank each token lives on, ascending,
    `held` experts on each rank.
    """
    ranks = np.asarray(indices) // held
    if ranks.ndim != 2 or len(ranks) != len(homes) or list(homes) != sorted(homes):
        raise ValueError(f"homes: {list(homes)} for indices of shape {ranks.shape}, expected one "
                         "for each token, ascending")
    D = max(int(ranks.max()), *homes) + 1
    place = np.arange(len(ranks)) + 0.6 * np.asarray(homes)          # a gap between two homes
    width = max(place[-1] + 1, 1.6 * D)
    place = place + (width - place[-1] - 1) / 2
    middle = [(d + 0.5) * width / D - 0.5 for d in range(D)]
    figure, rows = Picture(1.05 * width + 3.0, 3.7), 0
    ax = figure.subplots()
    for n, row in enumerate(ranks):
        for rank in sorted(set(row)):
            slots, rows = int((row == rank).sum()), rows + 1
            ax.plot([place[n], middle[rank]], [0.93, 0.13], lw=2.2 if slots == 1 else 4.5,
                    color=LINK if rank != homes[n] else MORE_COLORS[3])
        ax.text(place[n], 1.0, f"token {n}\nexperts {', '.join(map(str, indices[n]))}",
                ha="center", va="bottom")
    for rank in range(D):
        first = rank * held
        ax.text(middle[rank], 0.06, f"rank {rank}\nexperts {first} to {first + held - 1}",
                ha="center", va="top", weight="bold")
        own = place[np.asarray(homes) == rank]
        if len(own):
            ax.text(own.mean(), 1.33, f"live on rank {rank}", ha="center", color="#666666")
    ax.set(xlim=(-0.7, width - 0.3), ylim=(-0.2, 1.42), xticks=[], yticks=[],
           title=f"{rows} rows, one per rank; one per slot they would be {ranks.size}")
    for side in ax.spines.values():
        side.set_visible(False)
    handles = [ax.plot([], [], color=color, lw=width, label=name)[0] for name, color, width in (
        ("to another rank", LINK, 2.2), ("stays at home", MORE_COLORS[3], 2.2),
        ("thick: two slots or more", INK, 4.5))]
    figure.legend(handles=handles, loc="outside right center")
    return figure


def _square(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.any():
        raise ValueError(f"{name}: shape {values.shape} with {values.sum():g} rows, expected as "
                         "many rows as columns, and some rows sent")
    return values


@styled
def rank_traffic(tables: Mapping[str, Any], tokens: int) -> Figure:
    """Rows from each rank to each, for several routers side by side.

    tables: name -> (D, D) rows, from a rank (down) to a rank (across); `tokens` of each rank, in
    all the layers that were counted.
    """
    tables = {name: _square(name, table) for name, table in tables.items()}
    top = max(table.max() for table in tables.values())
    D = len(next(iter(tables.values())))
    per_token = [table.sum() / (D * tokens) for table in tables.values()]
    figure = Picture(1.2 + len(tables) * (0.72 * D + 1.2), 0.55 * D + 2.2)
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for ax, (name, table), mean in zip(axes, tables.items(), per_token):
        ax.imshow(table, cmap=GREENS, vmin=0, vmax=top, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            ax.text(j, i, f"{value:,.0f}", ha="center", va="center", size=9.5,
                    color="white" if value > 0.8 * top else INK)
            if i == j:                                   # what stays at home crosses no wire
                ax.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, ec=INK,
                                       lw=1.6))
        ax.set_yticks(range(D), [f"{i}: {n / tokens:.2f}" for i, n in enumerate(table.sum(1))])
        ax.set_xticks(range(D))
        ax.tick_params(length=0)
        ax.set_xlabel("to rank")
        ax.set_title(f"{name}: {mean:.2f} rows per token", size=10.5, weight="normal")
    axes[0].set_ylabel("from rank: rows per token")
    words = [f"{n:.2f}" for n in per_token]
    figure.suptitle(f"Rows per token: {' against '.join(words)}", x=0.01, ha="left",
                    weight="bold", size=12)
    return figure


def rank_traffic_slider(scores: Any, top_k: int, n_ranks: int) -> Any:
    """A slider over M and, below it, `rank_traffic` under that limit beside no limit.

    scores (N, E) affinities; the tokens live on the ranks in order, as many on each.
    """
    s = torch.as_tensor(scores)
    if len(s) % n_ranks or s.shape[1] % n_ranks:
        raise ValueError(f"scores: shape {tuple(s.shape)} on {n_ranks} ranks, expected multiples")
    lowest, held = -(-top_k * n_ranks // s.shape[1]), s.shape[1] // n_ranks

    def table(limit: int) -> list[list[int]]:
        chosen = select_device_limited(s, top_k, n_ranks, limit)
        return [sort_rows(part, n_ranks, held)[2].tolist() for part in chosen.chunk(n_ranks)]

    def draw(limit: int) -> bytes:
        tables = {f"M = {limit}": table(limit), "no limit": table(n_ranks)}
        return png(rank_traffic(tables, len(s) // n_ranks))

    return slider("M", range(lowest, n_ranks + 1), n_ranks, draw)


def _lanes(ax: Axes, spans: Sequence[tuple[str, float, float]], end: float) -> None:
    for what, start, stop in spans:
        color = LAYER if what == "layer" else LINK if LANES[what] else SHARED
        height, width = 0.86 if what == "layer" else 0.6, 1e3 * (stop - start)
        ax.add_patch(Rectangle((1e3 * start, LANES[what] - height / 2), width, height,
                               facecolor=color, edgecolor="white", lw=0.8))
    ax.set(xlim=(0, 1e3 * end), ylim=(-0.55, 1.55))
    ax.set_yticks([0, 1], ["rank", "link"])
    ax.tick_params(axis="y", length=0)


@styled
def overlap_spans(runs: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """What the link and one rank did, over time: a layer forward and backward.

    runs: name -> spans (what, from, to) in seconds, as `parallel.demo_expert.overlap` and `trace`
    give them. The title of several says what the fastest saves, of one what overlaps.
    """
    ends = {}
    for name, spans in runs.items():
        unknown = {what for what, *_ in spans} - LANES.keys()
        if unknown or not spans:
            raise ValueError(f"{name}: spans of {sorted(unknown)}, expected some of {list(LANES)}")
        ends[name] = max(stop for _, _, stop in spans)
    slow, fast = max(ends.values()), min(ends.values())
    figure = Picture(9.0, 1.35 * len(runs) + 1.5)
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, spans) in zip(axes, runs.items()):
        _lanes(ax, sorted(spans, key=lambda span: span[0] != "layer"), 1.02 * slow)
        ax.set_title(f"{name}: {1e3 * ends[name]:.0f} ms", size=10.5, weight="normal")
    axes[-1].set_xlabel("time (ms)")
    whole = any(what == "layer" for spans in runs.values() for what, _, _ in spans)
    figure.legend(handles=[Patch(color=LINK, label="rows on their way"),
                           Patch(color=SHARED, label="shared experts"),
                           *[Patch(color=LAYER, label="the layer, all in all")] * whole],
                  loc="outside right center")
    title = f"{1e3 * (slow - fast):.0f} of {1e3 * slow:.0f} ms are saved"
    if len(runs) == 1:
        spans = next(iter(runs.values()))
        shared = [(a, b) for what, a, b in spans if what.startswith("shared")]
        links = [(a, b) for what, a, b in spans if LANES[what]]
        met = sum(any(a < end and start < b for a, b in links) for start, end in shared)
        title = f"{met} of {len(shared)} passes of the shared experts while rows are on their way"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
    return figure

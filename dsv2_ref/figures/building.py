# SPDX-License-Identifier: MIT
"""Which parts of the model are built, and which of them call which."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dsv2_ref.figures.style import INK, Picture, styled

WIDTH, HEIGHT = 2.3, 0.62


def levels(calls: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Part -> how many parts stand one behind the other in what it calls."""
    found: dict[int, int] = {}

    def level(part: int) -> int:
        if part not in found:
            found[part] = 1 + max((level(p) for p in calls.get(part, ())), default=-1)
        return found[part]

    for part in calls:
        level(part)
    return dict(sorted(found.items()))


@styled
def building_order(
    names: Mapping[int, str], calls: Mapping[int, Sequence[int]], groups: Mapping[str, str],
    colours: Mapping[str, str],
) -> Figure:
    """Boxes, one per part; an arrow leads from a part to each one that needs it.

    An arrow that others imply is left out. names: number -> what is written in its box, in each
    column from the top. calls: number -> the parts that it calls. groups: name of a group -> its
    parts, "1 2 3". colours: of the groups.
    """
    level = levels({n: calls.get(n, ()) for n in names})
    group = {int(n): g for g, parts in groups.items() for n in parts.split()}
    rows: dict[int, float] = {}
    for column in range(max(level.values()) + 1):
        free = 0.0
        for n in (n for n in names if level[n] == column):
            called = [rows[p] for p in calls.get(n, ())]
            rows[n] = max(free, sum(called) / len(called)) if called else free
            beside = sum(n in calls.get(q, ()) and level[q] == column + 1 for q in names)
            free = rows[n] + max(1, beside)                # room for those that need it alone
    figure = Picture(11.0, 0.62 * (max(rows.values()) + 1) + 1.2)
    ax = figure.subplots()
    last = max(level.values())
    ax.set(xlim=(-0.1, 3.15 * last + WIDTH + 0.1), ylim=(max(rows.values()) + 0.6, -0.6))
    ax.axis("off")
    for n, parts in calls.items():
        implied = {q for p in parts for q in calls.get(p, ())}
        for p in set(parts) - implied:
            start, end = (3.15 * level[p] + WIDTH, rows[p]), (3.15 * level[n], rows[n])
            ax.annotate("", end, start, arrowprops={
                "arrowstyle": "-|>", "color": "#888888", "lw": 1.1, "shrinkA": 0, "shrinkB": 0})
    for n, name in names.items():
        x, y = 3.15 * level[n], rows[n]
        ax.add_patch(FancyBboxPatch((x, y - HEIGHT / 2), WIDTH, HEIGHT, zorder=3, ec=INK, lw=1.1,
                                    boxstyle="round,pad=0,rounding_size=0.12",
                                    fc=colours[group[n]]))
        ax.text(x + WIDTH / 2, y, f"{n} {name}", ha="center", va="center", fontsize=9, zorder=4)
    for i, (name, colour) in enumerate(colours.items()):
        ax.text(0.99, 0.01 + 0.07 * (len(colours) - 1 - i), f" {name} ", ha="right", va="bottom",
                transform=ax.transAxes, fontsize=9,
                bbox={"fc": colour, "ec": INK, "lw": 0.6, "boxstyle": "round,pad=0.2"})
    first = sum(not calls.get(n) for n in names)
    ax.set_title(f"{len(names)} parts; {first} of them call no other: begin with any of these")
    return figure

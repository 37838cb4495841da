# SPDX-License-Identifier: MIT
"""Numbers kept in few bits: where the bits go, how codes lie in words, what is lost."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled

PALETTE = (COLORS["MLA"], COLORS["MQA"], COLORS["GQA"], MORE_COLORS[3], *MORE_COLORS[:2])


@styled
def bit_budget(ways: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bits per number of a row, a bar for each way to keep it; way -> {part: bits per number}."""
    if not ways or min(min(parts.values(), default=-1) for parts in ways.values()) < 0:
        raise ValueError(f"ways: {dict(ways)}, expected parts of one at least, none negative")
    names = list(dict.fromkeys(part for parts in ways.values() for part in parts))
    figure = Picture(8.6, 0.7 * len(ways) + 1.9)
    ax = figure.subplots()
    left = np.zeros(len(ways))
    for i, name in enumerate(names):
        sizes = np.array([parts.get(name, 0.0) for parts in ways.values()])
        ax.barh(list(ways), sizes, left=left, height=0.62, label=name, edgecolor="white", lw=1.2,
                color=PALETTE[i % 6])
        for row, (x, size) in enumerate(zip(left, sizes)):
            if size > 0.45:
                ax.annotate(f"{size:.2f}", (x + size / 2, row), ha="center", va="center",
                            fontsize=9.5, color="white" if i == 0 else INK)
        left += sizes
    for row, total in enumerate(left):
        ax.annotate(f"{total:.2f}", (total, row), (5, 0), textcoords="offset points", va="center",
                    fontweight="bold")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, max(left) * 1.1), xlabel="bits per number of the row",
           title="Bits per number in all: " + ", ".join(f"{total:.2f}" for total in left))
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9.5)
    return figure


@styled
def word_layout(words: Mapping[str, Sequence[tuple[str, int]]]) -> Figure:
    """What each bit of some words holds; word -> (text, bits) from the highest bit down.

    A text with a ":" is part of a code that is cut.
    """
    widths = {word: sum(width for _, width in cells) for word, cells in words.items()}
    if not words or len(set(widths.values())) != 1:
        raise ValueError(f"words: {widths} bits, expected words of one width")
    top = max(widths.values())
    figure = Picture(8.4, 0.55 * len(words) + 1.3)
    ax = figure.subplots()
    edges = {0, top}
    for row, cells in enumerate(words.values()):
        at = top
        for text, width in cells:
            at -= width
            edges.add(at)
            color = COLORS["GQA"] if ":" in text else COLORS["MQA"]
            ax.barh(row, width, left=at, color=color, edgecolor=INK, height=0.7)
            ax.annotate(text, (at + width / 2, row), ha="center", va="center", fontsize=9.5)
    whole = sum(":" not in text for cells in words.values() for text, _ in cells)
    cut = {text.partition(":")[0] for cells in words.values() for text, _ in cells if ":" in text}
    ax.set(xlim=(top, 0), yticks=range(len(words)), yticklabels=list(words), xticks=sorted(edges),
           xlabel="bit", title=f"{len(words)} words of {top} bits hold {whole + len(cut)} codes; "
                               f"{len(cut)} of these are cut")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return figure


@styled
def error_by_bits(percent: Mapping[int, float]) -> Figure:
    """Error of a row, in per cent of its size, against the bits of a code."""
    if len(percent) < 2 or min(percent.values()) <= 0:
        raise ValueError(f"percent: {dict(percent)}, expected two positive numbers at least")
    figure = Picture(6.8, 3.5)
    ax = figure.subplots()
    ax.semilogy(list(percent), list(percent.values()), "o-", color=COLORS["MLA"])
    for bits, value in percent.items():
        ax.annotate(f"{value:.1f}", (bits, value), (6, 5), textcoords="offset points", fontsize=9.5)
    factors = [a / b for a, b in zip(percent.values(), list(percent.values())[1:])]
    ax.set(xlabel="bits per code", ylabel="error (% of the row's size)", yticks=[0.1, 1, 10, 100],
           yticklabels=["0.1", "1", "10", "100"],
           title=f"Each bit more divides the error by {min(factors):.1f} to {max(factors):.1f}")
    ax.grid(True)
    return figure


@styled
def harm_bars(values: Mapping[str, float], xlabel: str, title: str) -> Figure:
    """One bar for each way, its number beside it."""
    if not values or min(values.values()) < 0:
        raise ValueError(f"values: {dict(values)}, expected one at least, none negative")
    figure = Picture(8.2, 0.48 * len(values) + 1.3)
    ax = figure.subplots()
    ax.barh(list(values), list(values.values()), height=0.62,
            color=[PALETTE[i % 6] for i in range(len(values))])
    for row, value in enumerate(values.values()):
        ax.annotate(f"{value:.2g}", (value, row), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, max(values.values()) * 1.12), xlabel=xlabel, title=title)
    return figure


@styled
def curves_by_position(
    panels: Mapping[str, Mapping[str, Sequence[float]]], positions: Sequence[float],
    ylabels: Sequence[str], trained: float | None = None, bands: Sequence[float] | None = None,
) -> Figure:
    """Panels beside one another, logarithmic; panel's title -> {name: a value > 0 per position}.

    trained: a line where the trained length ends. bands: of the last panel, the standard errors of
    its curves, one after the other.
    """
    if not panels or any(len(y) != len(positions) for c in panels.values() for y in c.values()):
        raise ValueError(f"panels: {list(panels)}, expected a value for each of "
                         f"{len(positions)} positions in every curve")
    figure = Picture(4.9 * max(len(panels), 1.6), 4.1)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, object] = {}
    for ax, (title, curves), ylabel in zip(axes, panels.items(), ylabels, strict=True):
        for i, (name, y) in enumerate(curves.items()):
            handles[name] = ax.semilogy(positions, y, "o-", color=PALETTE[i % 6], ms=5)[0]
            if bands is not None and ax is axes[-1]:
                error = np.asarray(bands[i * len(positions) : (i + 1) * len(positions)])
                ax.fill_between(positions, np.maximum(np.asarray(y) - error, min(y) / 3),
                                np.asarray(y) + error, color=PALETTE[i % 6], alpha=0.2, lw=0)
        if trained is not None:
            ax.axvline(trained, color=INK, ls=":", lw=1.2)
            ax.annotate("trained\nto here", (trained, 0.97), (-5, 0), fontsize=9, ha="right",
                        va="top", xycoords=("data", "axes fraction"), textcoords="offset points")
        low, high = min(map(min, curves.values())), max(map(max, curves.values()))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="position", ylabel=ylabel, title=title)
        ax.grid(True)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 3),
                  fontsize=9.5)
    return figure


def _row(ax: Axes, row: Sequence[float], step: float, title: str, color: str) -> None:
    """The numbers of one row, and how coarse its codes are."""
    ax.bar(range(len(row)), row, color=color, width=0.8)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set(xlabel="channel", title=f"{title}\nlargest {max(map(abs, row)):.1f}, step {step:.2f}")


@styled
def rotated_row(before: Sequence[float], after: Sequence[float],
                steps: tuple[float, float]) -> Figure:
    """One row as it is and turned, and the distance of neighbouring codes in each."""
    if len(before) != len(after) or min(steps) <= 0:
        raise ValueError(f"before, after, steps: {len(before)}, {len(after)}, {steps}, expected "
                         "rows of one length and positive steps")
    figure = Picture(9.0, 3.3)
    left, right = figure.subplots(1, 2)
    _row(left, before, steps[0], "as it is", COLORS["MHA"])
    _row(right, after, steps[1], "turned", COLORS["MLA"])
    left.set_ylabel("latent number")
    figure.suptitle(f"Turned, the same row has steps {steps[0] / steps[1]:.1f} times finer",
                    fontweight="bold", fontsize=12)
    return figure


@styled
def format_error(
    numbers: Sequence[float], errors: Sequence[float], limit: float, parts: Mapping[str, float]
) -> Figure:
    """Relative error of a cast against the number; parts: name -> where this part begins."""
    if len(numbers) != len(errors) or not len(numbers):
        raise ValueError(f"numbers, errors: {len(numbers)}, {len(errors)}, expected as many")
    figure = Picture(8.4, 3.9)
    ax = figure.subplots()
    ax.plot(numbers, errors, color=COLORS["MLA"], lw=1.0)
    ax.axhline(limit, color=COLORS["MHA"], ls="--", lw=1.4)
    ax.set_xscale("log", base=2)
    starts = [*parts.values(), max(numbers)]
    for i, name in enumerate(parts):
        if i:
            ax.axvline(starts[i], color=MORE_COLORS[3], lw=1.0, ls=":")
        ax.annotate(name, ((starts[i] * starts[i + 1]) ** 0.5, 1.02), ha="center", va="bottom",
                    fontsize=10, xycoords=("data", "axes fraction"))
    ax.annotate(f"1/{1 / limit:.0f}", (1.01, limit), xycoords=("axes fraction", "data"),
                va="center", color=COLORS["MHA"], annotation_clip=False)
    ax.set(xlabel="number before the cast", ylabel="error, as a part of the number")
    ax.set_title(f"At most 1/{1 / limit:.0f} off, where numbers are {list(parts)[-1]}", pad=24)
    return figure


@styled
def scale_map(scales: np.ndarray, block: int) -> Figure:
    """log2 of the scale that each number (rows, columns) has; lines where blocks end."""
    scales = np.asarray(scales, float)
    if scales.ndim != 2 or scales.min() <= 0:
        raise ValueError(f"scales: shape {scales.shape}, expected a matrix of positive numbers")
    rows, columns = scales.shape
    R, C = -(-rows // block), -(-columns // block)
    figure = Picture(6.6, 4.6)
    ax = figure.subplots()
    image = ax.imshow(np.log2(scales), cmap="cividis", aspect="auto")
    figure.colorbar(image, ax=ax, label="log2 of the scale")
    for i in range(block, rows, block):
        ax.axhline(i - 0.5, color="w")
    for j in range(block, columns, block):
        ax.axvline(j - 0.5, color="w")
    smaller = R * C - (rows // block) * (columns // block)
    ax.set(xlabel="column", ylabel="row",
           title=f"{rows}×{columns} numbers: {R * C} blocks, {smaller} of them smaller")
    return figure


@styled
def outlier_errors(sizes: Sequence[float], errors: Mapping[str, Sequence[float]],
                   limit: float = 0.05) -> Figure:
    """Mean error of other blocks against the size of one outlier, for each way to scale."""
    if any(len(y) != len(sizes) for y in errors.values()) or not errors:
        raise ValueError(f"errors: {list(errors)}, expected {len(sizes)} numbers each")
    figure = Picture(8.0, 4.2)
    ax = figure.subplots()
    for (name, y), color in zip(errors.items(), (COLORS["MHA"], COLORS["MLA"], MORE_COLORS[3])):
        ax.loglog(sizes, y, "o-", color=color, label=name)
    held = {name: max((s for s, e in zip(sizes, y) if e < limit), default=0)
            for name, y in errors.items()}
    last = max(sizes)
    told = [f"{name}: {'all' if most == last else f'up to {most:,.0f}'}"
            for name, most in held.items()]
    ax.set(xlabel="outlier (standard deviations)", ylabel="mean error of other blocks",
           title=f"Outliers that cost the others less than {limit:.0%}\n" + "; ".join(told))
    ax.grid(True)
    figure.legend(loc="outside lower center", ncols=len(errors), fontsize=9.5)
    return figure

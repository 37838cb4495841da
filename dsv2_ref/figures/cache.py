# SPDX-License-Identifier: MIT
"""What the kinds of attention keep: bars, lines over context, steps of saving, and sliders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2_ref.figures.sliders import slider
from dsv2_ref.figures.style import (
    COLORS,
    GIB,
    INK,
    LENGTHS,
    Picture,
    color_of,
    png,
    styled,
    tokens_label,
)


def _compared(bytes_per_token: Mapping[str, float]) -> tuple[list[str], str, str]:
    """The kinds, MHA (or the first), and a sentence on MLA (or the last) against it."""
    kinds = list(bytes_per_token)
    if not kinds or min(bytes_per_token.values()) <= 0:
        raise ValueError(f"bytes_per_token: {dict(bytes_per_token)}, expected positive numbers")
    base, told = "MHA" if "MHA" in kinds else kinds[0], "MLA" if "MLA" in kinds else kinds[-1]
    ratio = bytes_per_token[base] / bytes_per_token[told]
    return kinds, base, f"{told} caches {ratio:.3g} times less than {base}"


def _bars(values: Mapping[str, float], texts: Sequence[str], longest: float, xlabel: str,
          title: str) -> Picture:
    """Horizontal bars, the first on top, with their texts behind them."""
    figure = Picture(7.6, 0.6 * len(values) + 1.3)
    ax = figure.subplots()
    colors = [color_of(kind, list(values)) for kind in values]
    ax.barh(list(values), list(values.values()), color=colors, height=0.65)
    for i, (value, text) in enumerate(zip(values.values(), texts, strict=True)):
        ax.annotate(text, (value, i), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.9g}"))
    ax.set(xlabel=xlabel, title=title, xlim=(0, longest * 1.22))
    return figure


@styled
def cache_bars(bytes_per_token: Mapping[str, float]) -> Figure:
    """Cache of one token by kind of attention, in bytes, with its share of MHA's."""
    _, base, title = _compared(bytes_per_token)
    texts = [f"{size:,.0f}" + ("" if kind == base else
                               f"  (1/{bytes_per_token[base] / size:.3g} of {base})")
             for kind, size in bytes_per_token.items()]
    return _bars(bytes_per_token, texts, max(bytes_per_token.values()),
                 "cache of one token, all layers (bytes)", title)


@styled
def cache_against_context(bytes_per_token: Mapping[str, float], context: Sequence[int],
                          memory_bytes: float | None = None) -> Figure:
    """Cache of one sequence in GiB against its length, both axes logarithmic.

    context: lengths in tokens, ascending; `memory_bytes` draws the line that must not be crossed.
    """
    kinds, _, title = _compared(bytes_per_token)
    x = np.asarray(context, float)
    figure = Picture(7.6, 4.6)
    ax = figure.subplots()
    lowest, spread = 0.0, max(bytes_per_token.values()) / min(bytes_per_token.values())
    for kind in sorted(kinds, key=bytes_per_token.__getitem__):
        y = x * bytes_per_token[kind] / GIB
        ax.plot(x, y, color=color_of(kind, kinds), marker="o", ms=4)
        lowest = max(y[-1], lowest)      # where lines end close together the names are kept apart
        ax.annotate(f"{kind}  {y[-1]:.3g} GiB", (x[-1], lowest), (7, 0), va="center",
                    textcoords="offset points", annotation_clip=False)
        lowest *= (spread * x[-1] / x[0]) ** 0.055
    if memory_bytes is not None:
        ax.axhline(memory_bytes / GIB, color=INK, lw=1.4, ls="--")
        ax.annotate(f"memory, {memory_bytes / GIB:.3g} GiB", (x[0], memory_bytes / GIB), (0, 4),
                    textcoords="offset points")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: tokens_label(n)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.minorticks_off()
    ax.set(xlabel="context length (tokens)", ylabel="cache of one sequence (GiB)",
           title=f"At every length {title}")
    ax.grid(True)
    return figure


@styled
def cache_growth(tokens: Sequence[int], filled: Mapping[str, Sequence[float]],
                 prompt: int = 0) -> Figure:
    """Bytes that hold something, after every step of a run, by kind of cache.

    tokens: how many have been read after each step; filled: kind -> bytes at each of them;
    `prompt`: how many of the tokens were the prompt.
    """
    if not filled or any(len(sizes) != len(tokens) for sizes in filled.values()):
        raise ValueError(f"filled: {[len(s) for s in filled.values()]} sizes, expected "
                         f"{len(tokens)} for each kind, one per step")
    figure = Picture(7.6, 4.0)
    ax = figure.subplots()
    kinds, last = list(filled), {kind: sizes[-1] / tokens[-1] for kind, sizes in filled.items()}
    for kind in kinds:
        sizes = [n / 1024 for n in filled[kind]]
        ax.plot([0, *tokens], [0, *sizes], color=color_of(kind, kinds), marker=".", ms=4)
        ax.annotate(f"{kind}: {last[kind]:,.0f} bytes per token", (tokens[-1], sizes[-1]), (6, 0),
                    textcoords="offset points", va="center", annotation_clip=False)
    if prompt:
        ax.axvspan(0, prompt, color="#EEEEEE", lw=0)
        ax.annotate("prompt, in chunks", (prompt / 2, 0.97), xycoords=("data", "axes fraction"),
                    ha="center", va="top")
        ax.annotate("one by one", ((prompt + tokens[-1]) / 2, 0.97), ha="center", va="top",
                    xycoords=("data", "axes fraction"))
    most, least = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    ax.set(xlabel="tokens read", ylabel="filled part of the cache (KiB)", xlim=(0, tokens[-1]),
           ylim=(0, None), title=f"{least} fills {last[most] / last[least]:.3g} times less than "
                                 f"{most}, token by token")
    ax.grid(True)
    return figure


@styled
def saving_steps(bytes_per_token: Mapping[str, float], steps: Sequence[str]) -> Figure:
    """From the first cache to the last, step by step: the factor of each step.

    bytes_per_token: label -> bytes of one token, from largest to smallest; steps: a word or two
    for each step between them. Factors and not differences, which depend on the order.
    """
    sizes = list(bytes_per_token.values())
    if len(sizes) < 2 or min(sizes) <= 0 or sorted(sizes, reverse=True) != sizes:
        raise ValueError(f"bytes_per_token: {sizes}, expected positive numbers that fall, "
                         "two at least")
    if len(steps) != len(sizes) - 1:
        raise ValueError(f"steps: {list(steps)}, expected {len(sizes) - 1} for {len(sizes)} sizes")
    figure = Picture(8.6, 0.85 * len(sizes) + 1.2)
    ax = figure.subplots()
    factors = [f"× {new / old:.3f}" for old, new in zip(sizes, sizes[1:])]
    kinds = (COLORS["GQA"], *[COLORS["MLA"]] * len(sizes))
    for i, (size, color) in enumerate(zip(sizes, kinds)):
        ax.barh(i, size, color=color, height=0.62)
        before = sizes[max(i - 1, 0)]        # texts stand behind what is taken away
        ax.annotate(f"{size:,.0f}" + (f"   {factors[i - 1]}" if i else ""), (before, i), (5, 0),
                    textcoords="offset points", va="center")
        if i:
            ax.barh(i, before - size, left=size, color="none", edgecolor=INK, height=0.62,
                    ls=":", lw=1.2)
    ax.set_yticks(range(len(sizes)), list(bytes_per_token))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.9g}"))
    ax.set(xlim=(0, sizes[0] * 1.35), xlabel="cache of one token, all layers (bytes)",
           title=f"{100 * (1 - sizes[-1] / sizes[0]):.1f} % saved: "
                 + " ".join(f"{f} ({name})" for f, name in zip(factors, steps)))
    return figure


def _batches(bytes_per_token: Mapping[str, float], context: int, memory_bytes: float,
             most: float) -> Picture:
    """Bars of how many sequences' caches fit; the axis ends behind `most` sequences."""
    counts = {kind: int(memory_bytes // (size * context))
              for kind, size in bytes_per_token.items()}
    return _bars(counts, [f"{n:,}" for n in counts.values()], most,
                 f"sequences of {tokens_label(context)} tokens",
                 f"Sequences whose caches fit in {memory_bytes / GIB:.4g} GiB")


def _most(bytes_per_token: Mapping[str, float], context: int, memory_bytes: float) -> float:
    _compared(bytes_per_token)
    if context < 1 or memory_bytes <= 0:
        raise ValueError(f"context, memory_bytes: {context}, {memory_bytes}, expected positive")
    return max(memory_bytes / (context * min(bytes_per_token.values())), 1)


@styled
def batch_bars(
    bytes_per_token: Mapping[str, float], context: int, memory_bytes: float
) -> Figure:
    """How many sequences of `context` tokens have caches that fit in `memory_bytes`, by kind."""
    most = _most(bytes_per_token, context, memory_bytes)
    figure = _batches(bytes_per_token, context, memory_bytes, most)
    kinds, base, _ = _compared(bytes_per_token)
    told = "MLA" if "MLA" in kinds else kinds[-1]
    counts = {kind: int(memory_bytes // (bytes_per_token[kind] * context)) for kind in (base, told)}
    figure.axes[0].set_title(f"In {memory_bytes / GIB:.4g} GiB fit {counts[told]:,} sequences with "
                             f"{told}, {counts[base]:,} with {base}")
    return figure


def batch_slider(
    bytes_per_token: Mapping[str, float], context: int,
    memory_gib: Sequence[float] = (10, 20, 40, 80, 160, 320, 640),
) -> Any:
    """A slider over memory sizes (GiB) and, below it, how many sequences fit; as `cache_slider`."""
    most = _most(bytes_per_token, context, max(memory_gib) * GIB)

    def draw(gib: float) -> bytes:
        return png(styled(_batches)(bytes_per_token, context, gib * GIB, most))

    options = [(f"{gib:g} GiB", gib) for gib in memory_gib]
    return slider("memory", options, options[-1][1], draw)


def cache_slider(
    bytes_per_token: Mapping[str, float], context: Sequence[int] = LENGTHS
) -> Any:
    """A slider over context lengths (tokens) and, below it, each kind's cache at that length."""
    longest = max(bytes_per_token.values()) * max(context) / GIB

    def draw(length: int) -> bytes:      # the axis stays, so that the bars are seen to grow
        sizes = {kind: size * length / GIB for kind, size in bytes_per_token.items()}
        texts = [f"{size:.3g} GiB" for size in sizes.values()]
        return png(styled(_bars)(sizes, texts, longest, "cache of one sequence (GiB)",
                                   f"Cache at {tokens_label(length)} tokens"))

    return slider("context", [(tokens_label(n), n) for n in context], context[-1], draw)

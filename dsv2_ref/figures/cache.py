# SPDX-License-Identifier: MIT
"""What the kinds of attention keep: bars, lines over context, and a slider."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2_ref.figures.style import GIB, INK, LENGTHS, Picture, color_of, png, styled, tokens_label


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


def cache_slider(
    bytes_per_token: Mapping[str, float], context: Sequence[int] = LENGTHS
) -> Any:
    """A slider over context lengths (tokens) and, below it, each kind's cache at that length.

    An ipywidgets.VBox of a SelectionSlider and an Image; moving one redraws the other. Nothing is
    printed or displayed on the way, so a cell's stored output stays the same.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("cache_slider needs ipywidgets: install dsv2-ref[notebooks]") from error
    longest = max(bytes_per_token.values()) * max(context) / GIB

    def draw(length: int) -> bytes:      # the axis stays, so that the bars are seen to grow
        sizes = {kind: size * length / GIB for kind, size in bytes_per_token.items()}
        texts = [f"{size:.3g} GiB" for size in sizes.values()]
        return png(styled(_bars)(sizes, texts, longest, "cache of one sequence (GiB)",
                                   f"Cache at {tokens_label(length)} tokens"))

    slider = ipywidgets.SelectionSlider(options=[(tokens_label(n), n) for n in context],
                                        value=context[-1], description="context")
    image = ipywidgets.Image(value=draw(context[-1]), format="png", width=760)
    slider.observe(lambda change: setattr(image, "value", draw(change["new"])), names="value")
    return ipywidgets.VBox([slider, image])

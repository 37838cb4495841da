# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style.

A function takes plain numbers (lists, dictionaries, arrays or tensors on the CPU) and returns a
figure that nothing else knows of: no `pyplot`, so no figure stays behind and no window opens.
A notebook cell shows it when it is the last line; `save` writes it.

One message a figure, and the title says it, computed from the data. Colours are Okabe and Ito's,
which survive colour blindness, and a kind of attention has the same one everywhere (`COLORS`).

Needs: matplotlib, numpy; `cache_slider` alone needs ipywidgets.
"""

import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = {"MHA": "#D55E00", "GQA": "#E69F00", "MQA": "#56B4E9", "MLA": "#0072B2"}
_MORE_COLORS = ("#CC79A7", "#009E73", "#F0E442", "#999999")
_INK = "#222222"
_STYLE = {
    "font.size": 11.0, "axes.titlesize": 12.0, "axes.titleweight": "bold", "axes.titlepad": 10.0,
    "axes.titlelocation": "left", "axes.labelsize": 11.0, "axes.edgecolor": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "lines.linewidth": 2.0, "legend.frameon": False, "text.color": _INK,
}
GIB = 2**30
LENGTHS = tuple(2**i for i in range(10, 18))      # 1K to 128K tokens


class Picture(Figure):
    """A figure that shows itself as the last line of a cell, with or without pyplot."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> bytes:
        return _png(self)


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run `draw` in the one style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with style.context(_STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return wrapped


@_styled
def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # without the version of matplotlib, so that the same figure is the same bytes
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG at 150 dpi, whole or not at all; makes the folder. Returns the path."""
    path = Path(path)
    png = _png(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(png)
    return part.replace(path)


def _tokens(n: float) -> str:
    """1024 -> 1K, in the binary K that context lengths are given in."""
    return f"{n / 1024:.4g}K" if n >= 1024 else f"{n:.0f}"


@_styled
def loss_curve(
    log: Sequence[Mapping[str, float]], references: Mapping[str, float] | None = None
) -> Figure:
    """Training loss, and held-out bits a byte where the log has any.

    log: records with `tokens` (read so far) and `language` (nats a token), some of them with
    `bits_per_byte`. references: bits a byte of compressors, drawn as lines.
    """
    if not log:
        raise ValueError("log: empty, expected at least one record")
    held_out = [r for r in log if r.get("bits_per_byte") is not None]
    figure = Picture(10.0 if held_out else 6.4, 4.0)
    axes = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    x, y = (np.array([r[key] for r in log], float) for key in ("tokens", "language"))
    window = np.ones(min(len(y) // 40 * 2 + 1, len(y)))
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    axes[0].plot(x / 1e6, y, color=COLORS["MLA"], alpha=0.35, lw=0.8, label="each step")
    axes[0].plot(x / 1e6, smooth, color=COLORS["MLA"], label="running mean")
    axes[0].set(ylabel="training loss (nats a token)",
                title=f"Training loss: {y[0]:.2f} to {smooth[-1]:.2f} nats a token")
    if held_out:
        x, bits = (np.array([r[k] for r in held_out], float) for k in ("tokens", "bits_per_byte"))
        axes[1].plot(x / 1e6, bits, "o-", color=COLORS["MLA"], ms=4, label="model")
        for line, (name, value) in zip(cycle(("--", ":", "-.")), (references or {}).items()):
            axes[1].axhline(value, color=_INK, lw=1.4, ls=line, label=f"{name} ({value:.2f})")
        beaten = sorted((v, f", below {name}") for name, v in (references or {}).items()
                        if bits[-1] < v)
        axes[1].set(ylabel="held-out text (bits a byte)", ylim=(0, None),
                    title=f"Held-out: {bits[-1]:.2f} bits a byte{beaten[0][1] if beaten else ''}")
    for ax in axes:
        ax.set_xlabel("tokens read (millions)")
        ax.grid(True, axis="y")
        ax.legend(loc="best")
    return figure


def _color(kind: str, kinds: Sequence[str]) -> str:
    others = [k for k in kinds if k not in COLORS]
    return COLORS.get(kind) or _MORE_COLORS[others.index(kind) % len(_MORE_COLORS)]


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
    colors = [_color(kind, list(values)) for kind in values]
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


@_styled
def cache_bars(bytes_per_token: Mapping[str, float]) -> Figure:
    """Cache of one token by kind of attention, in bytes, with its share of MHA's."""
    _, base, title = _compared(bytes_per_token)
    texts = [f"{size:,.0f}" + ("" if kind == base else
                               f"  (1/{bytes_per_token[base] / size:.3g} of {base})")
             for kind, size in bytes_per_token.items()]
    return _bars(bytes_per_token, texts, max(bytes_per_token.values()),
                 "cache of one token, all layers (bytes)", title)


@_styled
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
        ax.plot(x, y, color=_color(kind, kinds), marker="o", ms=4)
        lowest = max(y[-1], lowest)      # where lines end close together the names are kept apart
        ax.annotate(f"{kind}  {y[-1]:.3g} GiB", (x[-1], lowest), (7, 0), va="center",
                    textcoords="offset points", annotation_clip=False)
        lowest *= (spread * x[-1] / x[0]) ** 0.055
    if memory_bytes is not None:
        ax.axhline(memory_bytes / GIB, color=_INK, lw=1.4, ls="--")
        ax.annotate(f"memory, {memory_bytes / GIB:.3g} GiB", (x[0], memory_bytes / GIB), (0, 4),
                    textcoords="offset points")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(n)))
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
        return _png(_styled(_bars)(sizes, texts, longest, "cache of one sequence (GiB)",
                                   f"Cache at {_tokens(length)} tokens"))

    slider = ipywidgets.SelectionSlider(options=[(_tokens(n), n) for n in context],
                                        value=context[-1], description="context")
    image = ipywidgets.Image(value=draw(context[-1]), format="png", width=760)
    slider.observe(lambda change: setattr(image, "value", draw(change["new"])), names="value")
    return ipywidgets.VBox([slider, image])


def _heat_map(values: np.ndarray, n_devices: int, first: int, height: float, label: str,
              **colors: Any) -> tuple[Picture, Axes]:
    """Rows × experts, with a line between the experts of one device and of the next."""
    (n_rows, n_experts), size = values.shape, values.shape[1] // n_devices
    figure = Picture(9.0, height)
    ax = figure.subplots()
    image = ax.imshow(values, aspect="auto", interpolation="none", **colors,
                      extent=(-0.5, n_experts - 0.5, first + n_rows - 0.5, first - 0.5))
    extend = "max" if "vmax" in colors else "neither"
    figure.colorbar(image, ax=ax, label=label, pad=0.02, extend=extend)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    if n_devices > 1:
        for border in range(size, n_experts, size):
            ax.axvline(border - 0.5, color=_INK, lw=1.4)
        top = ax.secondary_xaxis("top")
        top.set_xticks(np.arange(n_devices) * size + size / 2 - 0.5, range(n_devices))
        top.tick_params(length=0)
        top.set_xlabel("device")
    ax.set_xlabel("routed expert")
    return figure, ax


def _rows(name: str, values: Any, n_devices: int) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[1] % n_devices:
        raise ValueError(f"{name}: shape {values.shape} on {n_devices} devices, expected two "
                         "dimensions, the second a multiple of the devices")
    return values


@_styled
def expert_load(load: Any, n_devices: int = 1, first_layer: int = 0) -> Figure:
    """Heat map of the slots each expert got, relative to a fair share of its layer.

    load (layers, experts) counts; `first_layer` is the number of the first row's layer.
    """
    load = _rows("load", load, n_devices)
    shares = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    figure, ax = _heat_map(shares, n_devices, first_layer, min(0.3 * len(load) + 2.2, 8.0),
                           "load (fair share = 1)", cmap="PuOr_r", vmin=0, vmax=2)
    ax.set(ylabel="layer", title=f"The fullest expert has {shares.max():.1f} times its fair share, "
                                 f"the emptiest {shares.min():.1f}")
    return figure


def _printable(text: str) -> str:
    """A token as a label: spaces and line ends made visible, what the font lacks as a box."""
    text = text.replace(" ", "\u00b7").replace("\n", "\\n").replace("\t", "\\t")
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else "\u25a1" for c in text)


@_styled
def router_heat_map(gates: Any, token_texts: Sequence[str], n_devices: int = 1) -> Figure:
    """Which experts each token is sent to, and with what weight.

    gates (tokens, experts), 0 where an expert was not chosen; one text for each token.
    """
    gates = _rows("gates", gates, n_devices)
    if len(gates) != len(token_texts):
        raise ValueError(f"token_texts: {len(token_texts)} given, expected {len(gates)}")
    (n_tokens, n_experts), chosen = gates.shape, (gates > 0).sum(1)
    figure, ax = _heat_map(np.where(gates > 0, gates, np.nan), n_devices, 0,
                           min(0.27 * n_tokens + 1.9, 12.0), "gate (weight of the expert)",
                           cmap="viridis_r", vmin=0)
    ax.hlines(np.arange(0.5, n_tokens - 1), -0.5, n_experts - 0.5, color="#DDDDDD", lw=0.6)
    ax.set_yticks(range(n_tokens), [_printable(t) for t in token_texts], parse_math=False)
    ax.tick_params(axis="y", length=0)
    count = "-".join(str(n) for n in sorted({chosen.min(), chosen.max()}))
    ax.set(ylabel="token", title=f"Each token is sent to {count} of {n_experts} experts")
    return figure

# SPDX-License-Identifier: MIT
"""Where tokens go: the load of experts, and the router's choices."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from dsv2_ref.figures.style import INK, Picture, styled
from dsv2_ref.training.watching import fair_shares


def load_colors(shares: np.ndarray) -> dict[str, Any]:
    """Colours of loads in fair shares for `imshow`: white at 1, and dark where the fullest is."""
    return {"cmap": "PuOr_r", "norm": TwoSlopeNorm(1.0, 0.0, max(2.0, float(shares.max())))}


def load_bar(shares: np.ndarray) -> dict[str, Any]:
    """The label and the marks of their colour bar, which has half its length for less than 1."""
    high = max(2.0, float(shares.max()))
    marks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(1, high)
    above = (tick for tick in marks if 1 < tick <= high)
    return {"label": "load (fair share = 1)", "ticks": [0, 0.5, 1, *above], "format": "%g"}


def _heat_map(values: np.ndarray, n_devices: int, first: int, height: float, bar: dict[str, Any],
              **colors: Any) -> tuple[Picture, Axes]:
    """Rows × experts, with a line between the experts of one device and of the next."""
    (n_rows, n_experts), size = values.shape, values.shape[1] // n_devices
    figure = Picture(9.0, height)
    ax = figure.subplots()
    image = ax.imshow(values, aspect="auto", interpolation="none", **colors,
                      extent=(-0.5, n_experts - 0.5, first + n_rows - 0.5, first - 0.5))
    figure.colorbar(image, ax=ax, pad=0.02, **bar)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    if n_devices > 1:
        for border in range(size, n_experts, size):
            ax.axvline(border - 0.5, color=INK, lw=1.4)
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


@styled
def expert_load(load: Any, n_devices: int = 1, first_layer: int = 0) -> Figure:
    """Heat map of the slots each expert got, relative to a fair share of its layer.

    load (layers, experts) counts; `first_layer` is the number of the first row's layer.
    """
    load = _rows("load", load, n_devices)
    shares = fair_shares(load)
    figure, ax = _heat_map(shares, n_devices, first_layer, min(0.3 * len(load) + 2.2, 8.0),
                           load_bar(shares), **load_colors(shares))
    ax.set(ylabel="layer", title=f"The fullest expert has {shares.max():.1f} times its fair share, "
                                 f"the emptiest {shares.min():.1f}")
    return figure


def _printable(text: str) -> str:
    """A token as a label: spaces and line ends made visible, what the font lacks as a box."""
    text = text.replace(" ", "\u00b7").replace("\n", "\\n").replace("\t", "\\t")
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else "\u25a1" for c in text)


@styled
def router_heat_map(gates: Any, token_texts: Sequence[str], n_devices: int = 1) -> Figure:
    """Which experts each token is sent to, and with what weight.

    gates (tokens, experts), 0 where an expert was not chosen; one text for each token.
    """
    gates = _rows("gates", gates, n_devices)
    if len(gates) != len(token_texts):
        raise ValueError(f"token_texts: {len(token_texts)} given, expected {len(gates)}")
    (n_tokens, n_experts), chosen = gates.shape, (gates > 0).sum(1)
    bar = {"label": "gate (weight of the expert)"}
    figure, ax = _heat_map(np.where(gates > 0, gates, np.nan), n_devices, 0,
                           min(0.27 * n_tokens + 1.9, 12.0), bar, cmap="viridis_r", vmin=0)
    ax.hlines(np.arange(0.5, n_tokens - 1), -0.5, n_experts - 0.5, color="#DDDDDD", lw=0.6)
    ax.set_yticks(range(n_tokens), [_printable(t) for t in token_texts], parse_math=False)
    ax.tick_params(axis="y", length=0)
    count = "-".join(str(n) for n in sorted({chosen.min(), chosen.max()}))
    ax.set(ylabel="token", title=f"Each token is sent to {count} of {n_experts} experts")
    return figure

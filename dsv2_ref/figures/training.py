# SPDX-License-Identifier: MIT
"""How a training run went."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dsv2_ref.figures.style import COLORS, INK, Picture, styled


@styled
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
    if not (finite := np.isfinite(y)).any():
        raise ValueError("log: no loss is a number, expected one at least")
    x, y = x[finite], y[finite]
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
            axes[1].axhline(value, color=INK, lw=1.4, ls=line, label=f"{name} ({value:.2f})")
        beaten = sorted((v, f", below {name}") for name, v in (references or {}).items()
                        if bits[-1] < v)
        axes[1].set(ylabel="held-out text (bits a byte)", ylim=(0, None),
                    title=f"Held-out: {bits[-1]:.2f} bits a byte{beaten[0][1] if beaten else ''}")
    for ax in axes:
        ax.set_xlabel("tokens read (millions)")
        ax.grid(True, axis="y")
        ax.legend(loc="best")
    return figure


@styled
def loss_floor(tokens: Sequence[float], bits: Sequence[float], floor: float) -> Figure:
    """Held-out bits a byte against tokens read, and what lies between them and the exact entropy.

    floor: the entropy rate in bits a byte, which no model can pass in expectation.
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
    left.set(ylabel="held-out stories (bits a byte)", ylim=(0, None),
             title=f"{y[-1]:.3f} bits a byte, the floor is {floor:.3f}")
    left.legend(loc="best")
    right.plot(x, gap, "o-", color=COLORS["MLA"], ms=4)
    right.set(ylabel="above the floor (bits a byte)", xscale="log", yscale="log",
              title=f"The gap: {gap[-1]:.3f} bits, {100 * gap[-1] / floor:.0f} % of the floor")
    for ax in (left, right):
        ax.set_xlabel("tokens read (millions)")
        ax.grid(True)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axis.set_minor_formatter(NullFormatter())
    return figure

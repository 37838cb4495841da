# SPDX-License-Identifier: MIT
"""The one style of every figure: colours, sizes, a figure that shows itself, and saving.

A drawing function takes plain numbers (lists, dictionaries, arrays or tensors on the CPU) and
returns a `Picture` that nothing else knows of: no `pyplot`, so no figure stays behind and no window
opens. A notebook cell shows it when it is the last line; `save` writes it.

One message a figure, and the title says it, computed from the data. Colours are Okabe and Ito's,
which survive colour blindness, and a kind of attention has the same one everywhere (`COLORS`).

Needs: matplotlib, numpy, and Pillow, which matplotlib brings.
"""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from dsv2_ref.files.whole import whole_file

COLORS = {"MHA": "#D55E00", "GQA": "#E69F00", "MQA": "#56B4E9", "MLA": "#0072B2"}
MORE_COLORS = ("#CC79A7", "#009E73", "#F0E442", "#999999")
INK = "#222222"
_STYLE = {
    "font.size": 11.0, "axes.titlesize": 12.0, "axes.titleweight": "bold", "axes.titlepad": 10.0,
    "axes.titlelocation": "left", "axes.labelsize": 11.0, "axes.edgecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "lines.linewidth": 2.0, "legend.frameon": False, "text.color": INK,
}
GIB = 2**30
LENGTHS = tuple(2**i for i in range(10, 18))      # 1K to 128K tokens


class Picture(Figure):
    """A figure that shows itself as the last line of a cell, with or without pyplot."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> bytes:
        return png(self)


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run `draw` in the one style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with style.context(_STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return wrapped


@styled
def png(figure: Figure) -> bytes:
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    # 256 colours, spread so that none is off by more than a few of 255 steps: a third of the
    # bytes; and the version of matplotlib is not in them: the same figure is the same bytes
    image = Image.open(drawn).convert("RGB").quantize(
        256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(packed, format="png", dpi=(150, 150), optimize=True)
    return packed.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG at 150 dpi, whole or not at all; makes the folder. Returns the path."""
    image = png(figure)
    with whole_file(path) as scratch:
        scratch.write_bytes(image)
    return Path(path)


def tokens_label(n: float) -> str:
    """1024 -> 1K, in the binary K that context lengths are given in."""
    return f"{n / 1024:.4g}K" if n >= 1024 else f"{n:.0f}"


def color_of(kind: str, kinds: Sequence[str]) -> str:
    """A kind's colour; "GQA, 8 groups" is GQA, while any other addition makes another kind."""
    kind, *kinds = ("GQA" if k.startswith("GQA,") else k for k in (kind, *kinds))
    others = [k for k in kinds if k not in COLORS]
    return COLORS.get(kind) or MORE_COLORS[others.index(kind) % len(MORE_COLORS)]

# SPDX-License-Identifier: MIT
"""A picture under a slider, and one that changes while a cell runs.

Both are ipywidgets. Where those are not installed the same code runs on stand-ins that show the
picture as it is, so that a notebook reads on to its end.
"""

from collections.abc import Callable, Sequence
from typing import Any


class Still:
    """In place of ipywidgets.Image: the bytes of a PNG as `value`."""

    def __init__(self, value: bytes = b"") -> None:
        self.value = value

    def _repr_png_(self) -> bytes | None:
        return self.value or None

    def __repr__(self) -> str:
        return "a picture that does not move: ipywidgets are not installed"


class Knob:
    """In place of a slider: `value` is one of some values, and a change of it redraws."""

    def __init__(self, values: Sequence[Any], value: Any, redraw: Callable[[Any], None]) -> None:
        self._values, self._value, self._redraw = values, value, redraw

    @property
    def value(self) -> Any:
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        if new not in self._values:
            raise ValueError(f"value: {new!r}, expected one of {list(self._values)}")
        self._value = new
        self._redraw(new)


class Both(Still):
    """In place of ipywidgets.VBox: its children are a knob and a picture, of which one is seen."""

    def __init__(self, values: Sequence[Any], value: Any, draw: Callable[[Any], bytes]) -> None:
        image = Still(draw(value))
        self.children = Knob(values, value, lambda new: setattr(image, "value", draw(new))), image

    def _repr_png_(self) -> bytes | None:
        return self.children[1]._repr_png_()


def _widgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


def live_image(width: int = 760) -> Any:
    """An ipywidgets.Image, or a stand-in: what is put into `value`, the bytes of a PNG, is seen."""
    widgets = _widgets()
    return widgets.Image(format="png", width=width) if widgets else Still()


def slider(
    name: str, options: Sequence[Any], value: Any, draw: Callable[[Any], bytes], width: int = 760,
) -> Any:
    """An ipywidgets.VBox of a slider at `value` and an Image, or a stand-in with such children.

    `options` are a range of integers, values, or pairs (label, value); `draw` makes a PNG of one.
    Nothing is printed or displayed on the way, so a cell's stored output stays the same.
    """
    widgets = _widgets()
    if widgets is None:
        return Both([o[1] if isinstance(o, tuple) else o for o in options], value, draw)
    if isinstance(options, range):
        knob = widgets.IntSlider(min=options[0], max=options[-1], value=value, description=name)
    else:
        knob = widgets.SelectionSlider(options=options, value=value, description=name)
    image = widgets.Image(value=draw(value), format="png", width=width)
    knob.observe(lambda change: setattr(image, "value", draw(change["new"])), names="value")
    return widgets.VBox([knob, image])

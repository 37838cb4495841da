# SPDX-License-Identifier: MIT
"""Sliders without ipywidgets: the same pictures at the same settings, shown as they are."""

import sys

import pytest
import torch
from refusals import refused

from dsv2_ref import figures

BYTES = {"MHA": 32768.0, "MLA": 1152.0}
SCORES = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.25, 0.1])
FREQUENCIES = torch.logspace(0, -3, 8).tolist()
SLIDERS = [
    (lambda: figures.cache_slider(BYTES), 2**14), (lambda: figures.batch_slider(BYTES, 2**15), 80),
    (lambda: figures.group_slider(16, 128, 576), 2),
    (lambda: figures.position_slider(FREQUENCIES, [0, 5], 200), 25),
    (lambda: figures.device_limit_slider(SCORES, 3, 3), 2),
    (lambda: figures.rank_traffic_slider(SCORES.view(2, 3).repeat(3, 2), 2, 3), 1),
]


@pytest.mark.parametrize(("make", "moved"), SLIDERS)
def test_without_widgets_the_same_pictures_are_shown(make, moved, monkeypatch):
    pytest.importorskip("ipywidgets")
    knob, picture = make().children
    start, before = knob.value, bytes(picture.value)
    knob.value = moved
    after = bytes(picture.value)

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    slider = make()
    knob, picture = slider.children
    assert knob.value == start and picture.value == before == slider._repr_png_()
    knob.value = moved
    assert knob.value == moved and picture.value == after == slider._repr_png_() != before
    refused(lambda: setattr(knob, "value", -1), "-1", "expected one of")
    assert knob.value == moved and picture.value == after
    assert "ipywidgets" in repr(slider)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_live_image_takes_pictures(widgets, monkeypatch):
    if widgets:
        pytest.importorskip("ipywidgets")
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    image = figures.live_image()
    assert bytes(image.value) == b""
    image.value = figures.cache_bars(BYTES)._repr_png_()
    assert bytes(image.value).startswith(b"\x89PNG")
    assert widgets or image._repr_png_() == image.value

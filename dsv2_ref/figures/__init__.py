# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; cache: what is kept; experts: where tokens go; balance: losses,
loads and dropped slots; training: runs.
"""

from dsv2_ref.figures.balance import (
    dropped_against_capacity,
    dropped_over_training,
    load_animation,
    load_over_training,
    loss_arrows,
    slots_by_device,
)
from dsv2_ref.figures.cache import cache_against_context, cache_bars, cache_slider
from dsv2_ref.figures.experts import expert_load, router_heat_map
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve, loss_floor

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "cache_against_context",
    "cache_bars", "cache_slider", "dropped_against_capacity", "dropped_over_training",
    "expert_load", "load_animation", "load_over_training", "loss_arrows", "loss_curve",
    "loss_floor", "router_heat_map", "save", "slots_by_device", "styled",
]

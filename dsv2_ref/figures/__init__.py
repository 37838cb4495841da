# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; cache: what is kept; experts: where tokens go; routing: what
experts are for, and the limit on devices; training: runs.
"""

from dsv2_ref.figures.cache import cache_against_context, cache_bars, cache_slider
from dsv2_ref.figures.experts import expert_load, router_heat_map
from dsv2_ref.figures.routing import (
    ablation_cost,
    device_limit_slider,
    device_messages,
    device_traffic,
    expert_lift,
    limit_quality,
    token_routing,
)
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "ablation_cost",
    "cache_against_context", "cache_bars", "cache_slider", "device_limit_slider", "device_messages",
    "device_traffic", "expert_lift", "expert_load", "limit_quality", "loss_curve",
    "router_heat_map", "save", "styled", "token_routing",
]

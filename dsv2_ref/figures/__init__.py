# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; attention: small matrices, shared heads, MLA's data flow;
cache: what is kept; experts: where tokens go; positions: RoPE and YaRN; training: runs.
"""

from dsv2_ref.figures.attention import (
    group_slider,
    grouped_heads,
    groups_like_mla,
    matrices,
    mla_flow,
    shared_heads,
)
from dsv2_ref.figures.cache import cache_against_context, cache_bars, cache_slider
from dsv2_ref.figures.experts import expert_load, router_heat_map
from dsv2_ref.figures.positions import (
    angle_errors,
    errors_by_position,
    losses_by_position,
    pair_clocks,
    position_slider,
    turned_pair,
    yarn_pairs,
)
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "angle_errors",
    "cache_against_context", "cache_bars", "cache_slider", "errors_by_position", "expert_load",
    "group_slider", "grouped_heads", "groups_like_mla", "loss_curve", "losses_by_position",
    "matrices", "mla_flow", "pair_clocks", "position_slider", "router_heat_map", "save",
    "shared_heads", "styled", "turned_pair", "yarn_pairs",
]

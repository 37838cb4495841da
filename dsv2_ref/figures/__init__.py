# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; cache: what is kept; experts: where tokens go; training: runs;
kernels: tiles, a softmax in pieces, rooflines.
"""

from dsv2_ref.figures.cache import cache_against_context, cache_bars, cache_slider
from dsv2_ref.figures.experts import expert_load, router_heat_map
from dsv2_ref.figures.kernels import (
    attention_tiles,
    bytes_moved,
    decode_floors,
    decode_roofline,
    softmax_in_pieces,
)
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "attention_tiles", "bytes_moved",
    "cache_against_context", "cache_bars", "cache_slider", "decode_floors", "decode_roofline",
    "expert_load", "loss_curve", "router_heat_map", "save", "softmax_in_pieces", "styled",
]

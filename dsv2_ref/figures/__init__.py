# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; absorption: two orders of one attention; architecture: the whole
model; cache: what is kept; experts: where tokens go; routing: what experts are for, and the limit
on devices; studies: what one change does; training: runs.
"""

from dsv2_ref.figures.absorption import absorption_crossover, absorption_flops, absorption_regions
from dsv2_ref.figures.architecture import architecture, flops_against_context, parameter_shares
from dsv2_ref.figures.cache import (
    batch_bars,
    batch_slider,
    cache_against_context,
    cache_bars,
    cache_growth,
    cache_slider,
    saving_steps,
)
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
from dsv2_ref.figures.studies import study_changes
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "ablation_cost",
    "absorption_crossover", "absorption_flops", "absorption_regions", "architecture",
    "batch_bars", "batch_slider", "cache_against_context", "cache_bars", "cache_growth",
    "cache_slider", "device_limit_slider", "device_messages", "device_traffic", "expert_lift",
    "expert_load", "flops_against_context", "limit_quality", "loss_curve", "parameter_shares",
    "router_heat_map", "save", "saving_steps", "study_changes", "styled", "token_routing",
]

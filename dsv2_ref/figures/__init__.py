# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

style: colours, `Picture`, `save`; absorption: two orders of one attention; architecture: the
whole model; cache: what is kept; experts: where tokens go; pretraining: how a run works; routing:
what experts are for, and the limit on devices; run: a run from its log; training: losses.
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
from dsv2_ref.figures.pretraining import (
    code_steps,
    live_picture,
    memory_bars,
    rounding_paths,
    schedule_curves,
)
from dsv2_ref.figures.routing import (
    ablation_cost,
    device_limit_slider,
    device_messages,
    device_traffic,
    expert_lift,
    limit_quality,
    token_routing,
)
from dsv2_ref.figures.run import balance_curves, gradient_norm, rate_curve, run_figures
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled
from dsv2_ref.figures.training import loss_curve

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "ablation_cost",
    "absorption_crossover", "absorption_flops", "absorption_regions", "architecture",
    "balance_curves", "batch_bars", "batch_slider", "cache_against_context", "cache_bars",
    "cache_growth", "cache_slider", "code_steps", "device_limit_slider", "device_messages",
    "device_traffic", "expert_lift", "expert_load", "flops_against_context", "gradient_norm",
    "limit_quality", "live_picture", "loss_curve", "memory_bars", "parameter_shares", "rate_curve",
    "rounding_paths", "router_heat_map", "run_figures", "save", "saving_steps", "schedule_curves",
    "styled", "token_routing",
]

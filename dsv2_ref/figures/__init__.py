# SPDX-License-Identifier: MIT
"""Every plot and widget, in one style: `figures.cache_bars(...)`, `figures.save(...)`.

  style         colours, `Picture`, `save`
  absorption    two orders of one attention
  architecture  the whole model
  attention     matrices in numbers, heads
  attention_study   kinds of attention at equal parameters, and what so many seeds see
  balance       losses, load, dropping
  building      the parts of a model in the order in which one builds them
  cache         what is kept
  evaluation    a question judged in several ways, Pass@k, a question that was seen
  experts       where tokens go
  kernels       programs, tiles, rooflines
  kinds         MHA, GQA, MQA, MLA compared
  low_bits      six bits and FP8: where bits go, what is lost
  parallel_experts  rows between ranks, and what is computed meanwhile
  needle        long contexts: what is found, where it looks, what a length costs
  pipeline      who works when on several ranks, and what waits
  positions     RoPE
  rewards       a group of answers, the clip, how a policy learned, calibration
  routing       what experts are for, and the limit on devices
  scale_out     a cluster on paper: memory, hours, growth
  serving       pages, passes, and what a larger batch brings
  sliders       what moves, with ipywidgets and without
  studies       ablations
  pretraining   schedules, memory and rounding; a run as it goes on
  run           how a run went
"""

from dsv2_ref.figures.absorption import absorption_crossover, absorption_flops, absorption_regions
from dsv2_ref.figures.architecture import (
    architecture,
    flops_against_context,
    flops_by_part,
    parameter_shares,
)
from dsv2_ref.figures.attention import (
    group_slider,
    grouped_heads,
    matrices,
    mla_flow,
    shared_heads,
)
from dsv2_ref.figures.attention_study import attention_study, seeds_and_differences
from dsv2_ref.figures.balance import (
    dropped_against_capacity,
    dropped_over_training,
    load_animation,
    load_over_training,
    loss_arrows,
    slots_by_device,
)
from dsv2_ref.figures.building import building_order
from dsv2_ref.figures.cache import (
    batch_bars,
    batch_slider,
    cache_against_context,
    cache_bars,
    cache_growth,
    cache_slider,
    saving_steps,
)
from dsv2_ref.figures.evaluation import (
    choice_bars,
    pass_curves,
    seen_and_unseen,
    tokens_and_bytes,
)
from dsv2_ref.figures.experts import expert_load, router_heat_map
from dsv2_ref.figures.kernels import (
    attention_tiles,
    bytes_moved,
    decode_floors,
    decode_roofline,
    launch_bars,
    program_grid,
    softmax_in_pieces,
)
from dsv2_ref.figures.kinds import benchmark_scores, groups_like_mla, kept_to_scale
from dsv2_ref.figures.low_bits import (
    bit_budget,
    curves_by_position,
    error_by_bits,
    format_error,
    harm_bars,
    outlier_errors,
    rotated_row,
    scale_map,
    word_layout,
)
from dsv2_ref.figures.needle import (
    found_by_length,
    length_costs,
    mistakes_by_factor,
    needle_attention,
    needle_grid,
    needle_grids,
    pair_wavelengths,
)
from dsv2_ref.figures.parallel_experts import (
    overlap_spans,
    rank_traffic,
    rank_traffic_slider,
    rows_by_hand,
)
from dsv2_ref.figures.pipeline import (
    bubble_curves,
    in_flight_bars,
    phase_bars,
    pipeline_slider,
    schedule_gantt,
)
from dsv2_ref.figures.positions import (
    angle_errors,
    errors_by_position,
    losses_by_position,
    pair_clocks,
    position_slider,
    turned_pair,
    yarn_pairs,
)
from dsv2_ref.figures.pretraining import (
    code_steps,
    live_picture,
    memory_bars,
    memory_over_step,
    optimizer_paths,
    packed_windows,
    rounding_paths,
    schedule_curves,
    step_seconds,
)
from dsv2_ref.figures.rewards import (
    answer_tokens,
    calibration_curves,
    clipped_gain,
    exam_table,
    learning_ways,
    reward_curves,
    reward_loop,
)
from dsv2_ref.figures.routing import (
    ablation_cost,
    device_limit_slider,
    device_messages,
    device_traffic,
    expert_shares,
    information_dots,
    limit_quality,
    token_routing,
)
from dsv2_ref.figures.run import (
    balance_curves,
    gradient_norm,
    loss_curve,
    loss_floor,
    rate_curve,
    resume_gaps,
    run_figures,
    run_lives,
    saving_cost,
)
from dsv2_ref.figures.scale_out import hour_ranges, hours_by_devices, stage_memory
from dsv2_ref.figures.serving import page_pool, serving_timeline, throughput_curves
from dsv2_ref.figures.sliders import live_image
from dsv2_ref.figures.studies import balance_cost, study_changes
from dsv2_ref.figures.style import COLORS, GIB, INK, LENGTHS, MORE_COLORS, Picture, save, styled

__all__ = [
    "COLORS", "GIB", "INK", "LENGTHS", "MORE_COLORS", "Picture", "ablation_cost",
    "absorption_crossover", "absorption_flops", "absorption_regions", "angle_errors",
    "answer_tokens", "architecture", "attention_study", "attention_tiles", "balance_cost",
    "balance_curves", "batch_bars", "batch_slider", "benchmark_scores", "bit_budget",
    "bubble_curves", "building_order", "bytes_moved", "cache_against_context", "cache_bars",
    "cache_growth", "cache_slider", "calibration_curves", "choice_bars", "clipped_gain",
    "code_steps", "curves_by_position", "decode_floors", "decode_roofline", "device_limit_slider",
    "device_messages", "device_traffic", "dropped_against_capacity", "dropped_over_training",
    "error_by_bits", "errors_by_position", "exam_table", "expert_load", "expert_shares",
    "flops_against_context", "flops_by_part", "format_error", "found_by_length", "gradient_norm",
    "group_slider", "grouped_heads", "groups_like_mla", "harm_bars", "hour_ranges",
    "hours_by_devices", "in_flight_bars", "information_dots", "kept_to_scale", "launch_bars",
    "learning_ways", "length_costs", "limit_quality", "live_image", "live_picture",
    "load_animation", "load_over_training", "loss_arrows", "loss_curve", "loss_floor",
    "losses_by_position", "matrices", "memory_bars", "memory_over_step", "mistakes_by_factor",
    "mla_flow", "needle_attention", "needle_grid", "needle_grids", "optimizer_paths",
    "outlier_errors", "overlap_spans", "packed_windows", "page_pool", "pair_clocks",
    "pair_wavelengths", "parameter_shares", "pass_curves", "phase_bars", "pipeline_slider",
    "position_slider", "program_grid", "rank_traffic", "rank_traffic_slider", "rate_curve",
    "resume_gaps", "reward_curves", "reward_loop", "rotated_row", "rounding_paths",
    "router_heat_map", "rows_by_hand", "run_figures", "run_lives", "save", "saving_cost",
    "saving_steps", "scale_map", "schedule_curves", "schedule_gantt", "seeds_and_differences",
    "seen_and_unseen", "serving_timeline", "shared_heads", "slots_by_device", "softmax_in_pieces",
    "stage_memory", "step_seconds", "study_changes", "styled", "throughput_curves", "token_routing",
    "tokens_and_bytes", "turned_pair", "word_layout", "yarn_pairs",
]

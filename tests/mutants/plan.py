# SPDX-License-Identifier: MIT
"""Wrong variants of a cluster on paper: parallel/plan.py, parallel/hours.py."""

from mutants import Mutant

PLAN = "parallel/plan.py"
HOURS = "parallel/hours.py"
_held = "test_plan.py::test_a_rank_holds_what_is_built"
_kept = "test_plan.py::test_kept_numbers_are_those_that_autograd_keeps"
_less = "test_plan.py::test_less_is_kept_the_more_is_computed_again"
_flops = "test_plan.py::test_flops_of_all_stages_are_those_of_the_model"
_again = "test_plan.py::test_what_is_computed_again_is_those_matrices"
_rows = "test_hours.py::test_rows_sent_are_those_of_routed_tokens"
_sent = "test_hours.py::test_bytes_exchanged_are_those_of_the_tensors_sent"
_zero = "test_hours.py::test_zero_bytes_are_those_of_rings_in_the_node_and_between_nodes"
_stage = "test_hours.py::test_a_stage_by_hand"
_step = "test_hours.py::test_a_step_is_the_sum_of_its_parts"
_growth = "test_hours.py::test_growth_breaks_at_the_batch"

MUTANTS = [
    Mutant("embedding_in_every_stage", "plan", PLAN,
           'p["embedding"] if first or (last and c.tie_embeddings) else 0', 'p["embedding"]',
           _held),
    Mutant("tied_matrix_with_one_owner", "plan", PLAN,
           "first or (last and c.tie_embeddings)", "first", _held),
    Mutant("last_norm_in_every_stage", "plan", PLAN,
           'p["norms"] if last else p["norms"] - c.d', 'p["norms"]', _held),
    Mutant("dense_layers_forgotten", "plan", PLAN,
           "min(max(c.n_dense - layers.start, 0), len(layers))", "0", _held),
    Mutant("all_experts_on_each_rank", "plan", PLAN,
           "p.routed // c.n_routed * experts_each(c, lay.ep)", "p.routed", _held),
    Mutant("experts_have_as_many_copies_as_the_rest", "plan", PLAN,
           "-(-experts // copies[0])", "-(-experts // copies[1])", _held),
    Mutant("the_rest_has_dp_copies", "plan", PLAN,
           "-(-others // copies[1])", "-(-others // copies[0])", _held),
    Mutant("gradients_sharded_by_zero1", "plan", PLAN,
           "gradients=(experts + others) * size.gradient,",
           "gradients=(experts + others) * size.gradient // lay.dp,", _held),
    Mutant("scores_forgotten", "plan", PLAN,
           "pairs * len(layers) / c.n_layers", "0.0", _flops),
    Mutant("all_experts_compute_every_token", "plan", PLAN,
           "2.0 * p.routed * c.top_k / c.n_routed", "2.0 * p.routed", _flops),
    Mutant("rope_key_not_made_again", "plan", PLAN,
           " + c.d * c.d_r\n    attention", "\n    attention", _again),
    Mutant("output_matrix_made_again", "plan", PLAN,
           " - len(layers) * c.n_h * c.d_v * c.d ", " ", _again),
    Mutant("rows_kept_once_a_token", "plan", PLAN, '"rows": slots * c.d', '"rows": c.d', _kept),
    Mutant("one_norm_a_layer", "plan", PLAN,
           '"norms": 2 * c.d + (c.d_cq or 0)', '"norms": c.d + (c.d_cq or 0)', _kept),
    Mutant("shared_experts_keep_nothing", "plan", PLAN,
           "hidden = c.n_shared * c.expert_width if moe", "hidden = 0 if moe", _kept),
    Mutant("received_rows_forgotten", "plan", PLAN,
           "return sum(numbers.values()) + came", "return sum(numbers.values())", _less),
    Mutant("sharded_without_zero1", "plan", PLAN,
           "(lay.dp, lay.rows) if lay.zero1 else (1, 1)", "(lay.dp, lay.rows)",
           "test_plan.py::test_what_one_changed_assumption_does"),
    Mutant("every_stage_holds_what_the_last_does", "plan", PLAN,
           "kept=in_flight[stage]", "kept=in_flight[-1]",
           "test_plan.py::test_each_stage_keeps_what_its_schedule_starts"),
    Mutant("logits_in_every_stage", "plan", PLAN,
           "        if layers.stop == c.n_layers:\n            working",
           "        if True:\n            working",
           "test_plan.py::test_the_last_stage_has_the_logits"),
    Mutant("own_rows_sent_too", "plan", HOURS,
           " * (ep - 1) / ep\n\n\ndef exchange", "\n\n\ndef exchange", _rows),
    Mutant("a_row_per_slot", "plan", HOURS,
           "min(config.reach if ep == config.n_devices else ep, config.top_k)", "config.top_k",
           _rows),
    Mutant("never_combined", "plan", HOURS,
           "return 2 * tokens * rows_sent", "return tokens * rows_sent", _sent),
    Mutant("everything_leaves_the_node", "plan", HOURS,
           "(experts + others / lay.ep) * outside", "(experts + others) * outside", _zero),
    Mutant("gathered_and_not_reduced", "plan", HOURS,
           "size.gradient + size.weight", "size.weight", _zero),
    Mutant("seconds_of_scores_with_weights", "plan", HOURS,
           "linear + experts + 2 * attention, linear + experts\n",
           "linear + experts + attention, linear + experts + attention\n", _stage),
    Mutant("traffic_never_hidden", "plan", HOURS,
           "max(traffic - a.hidden * shared, 0.0)", "traffic", _stage),
    Mutant("traffic_hidden_below_zero", "plan", HOURS,
           "max(traffic - a.hidden * shared, 0.0)", "traffic - a.hidden * shared", _stage),
    Mutant("nodes_of_any_size", "plan", HOURS,
           "a.nvlink if ep <= NODE else a.ib", "a.nvlink", _stage),
    Mutant("the_mean_stage_sets_the_pace", "plan", HOURS,
           '"uneven": slowest - sum(mean.values())', '"uneven": 0.0', _step),
    Mutant("idle_until_all_have_ended", "plan", HOURS,
           "times).longest", "times).makespan",
           "test_hours.py::test_without_bubbles_stages_end_one_after_the_other"),
    Mutant("hours_of_one_device", "plan", HOURS,
           "self.seconds * steps * self.layout.size / 3600", "self.seconds * steps / 3600",
           _step),
    Mutant("a_part_of_a_sequence", "plan", HOURS,
           "m = math.ceil(batch / lay.rows)", "m = batch // lay.rows", _growth),
]

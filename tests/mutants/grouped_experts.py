# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of grouped_experts.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/grouped_experts.py"
_twin = "test_grouped_experts.py::test_equals_the_loop"
_idle = "test_grouped_experts.py::test_an_expert_without_tokens_has_a_gradient_of_zeros"


def _wrong(name: str, old: str, new: str, node: str = _twin) -> Mutant:
    return Mutant(name, "experts", FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("last_row_of_a_tile_lost", "end - 1), rows < end", "end - 1), rows < end - 1"),
    _wrong("tile_of_the_expert_before", "e = tl.sum((ends <= tile)", "e = tl.sum((ends < tile)"),
    _wrong("tiles_before_not_counted", "(tile - before) * BM", "(tile - before * 0) % 2 * BM"),
    _wrong("slot_taken_for_a_token", "token = tl.load(order + rows) // K\n",
           "token = tl.load(order + rows) % K\n"),
    _wrong("silu_on_the_wrong_half", "tl.sigmoid(gate.to(tl.float32))",
           "tl.sigmoid(up.to(tl.float32))"),
    _wrong("last_block_of_a_product_missed", "for k in range(0, inner, BK):",
           "for k in range(0, inner - BK + 1, BK):"),
    _wrong("last_column_not_stored", "(columns < outer)[None]", "(columns < outer - 1)[None]"),
    _wrong("without_gates", "if BACK else acc * tl.load(gates + slot).to(tl.float32)[:, None])",
           "if BACK else acc)"),
    _wrong("gate_of_the_sorted_row", "tl.load(gates + slot).to(tl.float32)[:, None]",
           "tl.load(gates + rows).to(tl.float32)[:, None]"),
    _wrong("dx_of_up_alone", "_multiply(acc, B,", "_multiply(acc * 0, B,"),
    _wrong("silu_gradient_is_the_sigmoid", "dh * b * s * (1 + a * (1 - s))", "dh * b * s"),
    _wrong("gate_in_its_own_gradient", "tl.sum(dh * h, 1)", "tl.sum(dh * g[:, None] * h, 1)"),
    _wrong("gate_missing_in_dW_down", "(g[:, None] * h).to(", "h.to("),
    _wrong("gate_missing_in_dgate_and_dup", "dh *= g[:, None]", "dh *= 1.0"),
    _wrong("right_half_of_dg_lost", "share += _back_half(right", "_back_half(right"),
    _wrong("last_rows_of_an_expert_missed_in_dW", "for _ in range(start, end, BK):",
           "for _ in range(start, end - BK + 1, BK):"),
    _wrong("later_rows_of_token_0", "// K   # ahead of its use", "* 0   # ahead of its use"),
    _wrong("dW_down_transposed", "((d, 1), (d, 1), (1, w))", "((d, 1), (d, 1), (d, 1))"),
    _wrong("gates_of_dropped_slots_learn", "dg.masked_fill(~keep, 0.0)", "dg"),
    _wrong("idle_experts_not_written", "mask=(i < w)[:, None] & (j < d)[None])\n\n\nclass Plan",
           "mask=(i < w)[:, None] & (j < d)[None] & (start < end))\n\n\nclass Plan", _idle),
    _wrong("saved_numbers_overwritten",
           "dgate, dup, gated_h = (torch.empty_like(gate) for _ in range(3))",
           "dgate, dup, gated_h = gate, up, torch.empty_like(gate)",
           "test_grouped_experts.py::test_the_backward_may_run_twice_and_gives_the_same_bits"),
    _wrong("too_few_programs_counted", "(slots // BM + min(E, slots))", "(slots // BM)",
           "test_grouped_experts.py::"
           "test_a_plan_never_starts_more_programs_than_there_can_be_tiles"),
]

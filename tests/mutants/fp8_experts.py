# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of fp8_experts.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/fp8_experts.py"
_loop = "test_fp8_experts.py::test_equals_the_loop"


def _wrong(name: str, old: str, new: str, node: str = _loop) -> Mutant:
    return Mutant(name, "fp8", FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("scales_of_the_first_expert", "at = (e * R + i // 128) * C\n        s_gate",
           "at = (i // 128) * C\n        s_gate"),
    _wrong("scales_of_the_first_rows", "at = (e * R + i // 128) * C\n        s = ",
           "at = e * R * C\n        s = "),
    _wrong("scale_of_the_first_columns", "scale + at + tl.minimum(k + BK, w - 1) // 128",
           "scale + at"),
    _wrong("scale_of_gate_for_up", "up += s_up *", "up += s_gate *"),
    _wrong("codes_of_the_first_expert", "inside = e.to(tl.int64) * d +", "inside = e * 0 +"),
    _wrong("slot_taken_for_a_token", "mask=real, other=0) // K", "mask=real, other=0) % K"),
    _wrong("tile_of_the_expert_before", "tl.sum((ends <= tile)", "tl.sum((ends < tile)"),
    _wrong("tiles_before_not_counted", "(tile - before) * BM", "(tile - before) * 0"),
    _wrong("silu_on_the_wrong_half", "gate * tl.sigmoid(gate) * up", "gate * tl.sigmoid(up) * up"),
    _wrong("without_gates", "acc *= tl.load(gates", "acc *= 1.0 + 0 * tl.load(gates"),
    _wrong("gate_of_the_sorted_row", "tl.load(gates + slot, mask", "tl.load(gates + rows, mask"),
    _wrong("dropped_slots_not_zeros", "x.new_zeros(slots, d)", "x.new_empty(slots, d)"),
    _wrong("sum_of_one_slot", ".sum(1, dtype=torch.float32)", "[:, 0]"),
]

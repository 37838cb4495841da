# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of between_products.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/between_products.py"
_turned = "test_between_products.py::test_pairs_are_turned_as_complex_numbers"
_back = "test_between_products.py::test_the_gradient_is_turned_back"
_norm = "test_between_products.py::test_a_sum_and_its_norm"


def _wrong(name: str, catches: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, catches, FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("turned_backwards", "(39)", "tl.join(a * c - b * s, a * s + b * c)",
           "tl.join(a * c + b * s, b * c - a * s)", _turned),
    _wrong("gradient_turned_forwards", "(39)", "s = -s if BACK else s", "s = s", _back),
    _wrong("halves_for_pairs", "half-split", "(ROWS, WIDTH // 2, 2)))\n    token",
           "(ROWS, 2, WIDTH // 2)).permute(0, 2, 1))\n    token", _turned),
    _wrong("one_angle_for_each_head", "(39)", "token = row // n_h", "token = row", _turned),
    _wrong("tables_of_the_first_sequence", "(39)", "token // T * cos_b + ", "", _turned),
    _wrong("key_taken_for_heads", "(43)", "tokens, T, 1, cos_b", "tokens, T, N_H, cos_b", _turned),
    _wrong("silu_of_up", "(20)", "(g * tl.sigmoid(g))", "tl.sigmoid(g)",
           "test_between_products.py::test_the_gate_meets_up"),
    _wrong("norm_of_the_padded_row", "(20)", "tl.sum(row * row, 0) / D",
           "tl.sum(row * row, 0) / WIDTH", _norm),
    _wrong("epsilon_after_the_root", "(20)", "tl.rsqrt(tl.sum(row * row, 0) / D + eps)",
           "(tl.rsqrt(tl.sum(row * row, 0) / D) + eps)", _norm),
    _wrong("norm_of_the_old_stream", "(20)", "tl.store(total + at, row, mask=inside)",
           "tl.store(total + at, tl.load(h + at, mask=inside), mask=inside)", _norm),
]

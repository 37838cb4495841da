# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of write_rows.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/write_rows.py"
_words = "test_write_rows.py::test_words_and_scales_are_the_twins"
_places = "test_write_rows.py::test_rows_stand_where_the_twin_puts_them"
_ends = "test_write_rows.py::test_codes_half_way_and_at_the_ends"
_finite = "test_write_rows.py::test_a_row_that_is_not_finite_has_no_finite_scale"


def _wrong(name: str, old: str, new: str, node: str = _words) -> Mutant:
    return Mutant(name, "quantised", FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("padding_written_for_rows",
           "row = tl.load(real + tl.program_id(0)) if REAL else tl.program_id(0).to(tl.int64)\n"
           "    to =", "row = tl.program_id(0).to(tl.int64)\n    to =",
           f"{_places}[lengths2-None-latent]"),
    _wrong("key_before_the_latent", "tl.store(to + D_C + j, r", "tl.store(to + j, r",
           "test_write_rows.py::test_a_latent_row_is_the_latent_and_the_key"),
    _wrong("packed_side_by_side", "words + place * 3 * (W + W_R)", "words + row * 3 * (W + W_R)",
           f"{_places}[lengths0-None-six_bit]"),
    _wrong("scales_side_by_side", "tl.store(scales + place * 2 + 1,",
           "tl.store(scales + row * 2 + 1,", f"{_places}[lengths0-None-six_bit]"),
    _wrong("scale_rounded_down", "bitcast=True) + 0xFFFF) >> 16", "bitcast=True)) >> 16"),
    _wrong("halves_rounded_up", "+ 12582912.0 - 12582912.0\n", "+ 0.5\n    n = tl.floor(n)\n",
           _ends),
    _wrong("ends_not_clipped", "tl.minimum(n, half / step - 1)", "tl.minimum(n, half / step)",
           _ends),
    _wrong("nan_ignored", "tl.where(tl.sum(tl.sum((x != x)", "tl.where(0 * tl.sum(tl.sum((x != x)",
           _finite),
    _wrong("lenders_keep_their_step", "step = tl.where(lends, 2.0, 1.0)",
           "step = tl.where(lends, 1.0, 1.0)"),
    _wrong("lent_bits_of_the_latents", "_codes(lent, s_r,", "_codes(lent, s_c,"),
    _wrong("lent_bits_swapped", "(t // 5) * W + j[None]", "(1 - t // 5) * W + j[None]"),
    _wrong("second_bit_lent_twice", ">> bit // D_R & 1", ">> 0 & 1"),
    _wrong("padding_is_a_zero_not_a_code", "tl.where(in_c, _codes(latents, s_c, step, 32), 0)",
           "_codes(latents, s_c, step, 32)"),
    _wrong("upper_bits_exchanged", "tl.where(t == 2, codes >> 4 << 6, "
           "tl.where(t == 5, codes >> 4 << 8, 0))", "tl.where(t == 5, codes >> 4 << 6, "
           "tl.where(t == 2, codes >> 4 << 8, 0))"),
    _wrong("rope_codes_not_shifted", "half), 0) >> LENT", "half), 0)"),
]

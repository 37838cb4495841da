# SPDX-License-Identifier: MIT
"""Wrong variants of six_bit_decode.py, and the test that must fail for each."""

from mutants import Mutant

TESTS = "test_six_bit_decode.py::test_"
LENGTH, SIZES = TESTS + "equals_the_twin[1-97]", TESTS + "any_sizes"
HOPPER, WORDS = TESTS + "the_form_for_hopper[64-16]", TESTS + "every_word_becomes_its_codes"
RAGGED = TESTS + "ragged_and_empty_sequences_in_any_number_of_pieces"
PAGES, RANGE = TESTS + "pages_in_any_order", TESTS + "weights_stay_in_the_range_of_half_precision"


def mutant(name: str, catches: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, catches, "kernels/six_bit_decode.py", old, new, node)


KERNEL_MUTANTS = [
    mutant("pair_leaks", "bits of the neighbour in a register",
           "lop3.b32 s, s, {MASK * pair}", "lop3.b32 s, s, {MASK * pair | 0x8000}",
           WORDS + "[False-hopper]"),
    mutant("truth_table", "the exponent of 1024 left out", "{MASK * pair}, 0x64006400, 0xEA;",
           "{MASK * pair}, 0x64006400, 0xC0;", HOPPER),
    mutant("upper_half_unmasked", "the second number of a pair not masked",
           "{MASK_Y * pair}, s, 0xEA", "{MASK_Y | 0x3F0000}, s, 0xEA", WORDS + "[True-hopper]"),
    mutant("lenders_swapped", "the high bits of v2 and v5 taken for each other",
           "2 if t == 2 else 4", "4 if t == 2 else 2", WORDS + "[False-plain]"),
    mutant("lent_bit_kept", "a lent bit read as one of the latent's",
           "2 * HALF - 16,", "48,", WORDS + "[True-plain]"),
    mutant("half_of_a_lender", "a lender's zero at 32",
           "1024 + HALF if SUBTRACT", "1056 if SUBTRACT", LENGTH),
    mutant("values_with_offsets", "codes instead of numbers as values",
           "v = field(words, t, HALF, True, PTX)", "v = field(words, t, HALF, not PTX, PTX)",
           TESTS + "a_flat_average_does_not_drown_in_offsets"),
    mutant("nothing_folded", "offsets of keys left in the score",
           "    if PTX:\n        fold_c", "    if PTX and LENT > 2:\n        fold_c", HOPPER),
    mutant("fold_of_a_lender", "lenders folded as others are", "* (1024 + HALF)\n", "* 1056\n",
           HOPPER),
    mutant("step_of_a_lender", "a lender's codes one scale apart for keys",
           "_parts(q_c, row, real, 1 / unit, TWO,", "_parts(q_c, row, real, 1 / unit, 1,", LENGTH),
    mutant("step_of_a_lenders_value", "a lender's codes one scale apart for values",
           "D_C, W, BW, 2 if LENT else 1)", "D_C, W, BW, 1)", LENGTH),
    mutant("rope_without_lent_bits", "RoPE codes without their lowest bits",
           "            s_r = tl.dot(lent[L], tl.trans(bit), s_r, input_precision=DOT)\n",
           "            s_r += 1024 * _sum(lent[L])[:, None]\n", LENGTH),
    mutant("second_bit_alike", "bit 1 of a RoPE code counted as bit 0",
           "tl.where(i < D, 1.0, 2.0)", "1.0", SIZES + "[128-16]"),
    mutant("rope_not_shifted", "the upper six bits of a RoPE code not moved up",
           "(1 << LENT) / unit, 1,", "1 / unit, 1,", LENGTH),
    mutant("scales_swapped", "the latent's scale for the RoPE key and the other way round",
           "return s * first[None, :] + s_r * second[None, :], first",
           "return s * second[None, :] + s_r * first[None, :], first", LENGTH),
    mutant("weights_without_scale", "values summed without their token's scale",
           "(p * (s_c * power)[None, :])", "p", LENGTH),
    mutant("sum_of_scaled_weights", "the sum of weights with scales in it",
           "l = l * shrink + p * power[None, :]", "l = l * shrink + p", LENGTH),
    mutant("no_range", "weights times scales as they are, in fp16",
           "e = tl.minimum(tl.maximum(both >> 7 & 0xFF, 27), 253)", "e = (both & 0) + 127",
           RANGE + "[hopper-1e-30]"),
    mutant("no_rescale", "sums of earlier tiles keep their old maximum",
           "tl.dot(p, v, acc[t] * shrink,", "tl.dot(p, v, acc[t],", LENGTH),
    mutant("wrong_plane", "RoPE words read one plane too early",
           "_planes(base + 3 * W, rows", "_planes(base + 2 * W, rows", LENGTH),
    mutant("last_key_again", "the last row, read again behind the end, is seen there",
           "(start + tl.arange(0, BN))[None, :] < seen[:, None]", "seen[:, None] > -1", LENGTH),
    mutant("reads_behind_the_end", "what lies behind a sequence is read",
           "first + tl.minimum(tl.arange(0, BN), end - 1 - start)", "first + tl.arange(0, BN)",
           RAGGED + "[1-2]"),
    mutant("this_page_again", "the page of the tile before",
           "tl.minimum(start + BN, end - 1) // PAGE", "start // PAGE", PAGES + "[1]"),
    mutant("scales_of_another_page", "scales read as if there were no pages",
           "scales + page * stride_sb", "scales + b * stride_sb", PAGES + "[1]"),
    mutant("lent_by_one", "one bit lent where two are",
           "min(2, 2 * w // d_r), w, w_r", "min(1, 2 * w // d_r), w, w_r",
           TESTS + "bits_lent_are_those_of_the_cache"),
]

# SPDX-License-Identifier: MIT
"""Wrong variants of latent_decode.py, and the test that must fail for each."""

from mutants import Mutant

TESTS = "test_latent_decode.py::test_"
RAGGED = TESTS + "ragged_and_empty_sequences_in_any_number_of_pieces"
PLAIN, SWAPPED, WHOLE = RAGGED + "[plain-1-3]", RAGGED + "[swapped-1-3]", RAGGED + "[plain-1-1]"
LENGTH, LARGE = TESTS + "equals_the_twin[1-97]", TESTS + "large_scores_do_not_overflow"
PAGES = TESTS + "pages_in_any_order[1-64]"
COMBINE = TESTS + "combining_is_an_average_weighted_by_the_sums"


def mutant(name: str, catches: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, catches, "kernels/latent_decode.py", old, new, node)


KERNEL_MUTANTS = [
    mutant("no_rescale", "sums of earlier tiles keep their old maximum",
           "acc = tl.dot(p.to(c.dtype), c, acc * shrink,", "acc = tl.dot(p.to(c.dtype), c, acc,",
           LENGTH),
    mutant("no_rescale_swapped", "the same with rows first",
           "p.to(c.dtype), acc * shrink,", "p.to(c.dtype), acc,", SWAPPED),
    mutant("weights_not_rescaled", "the sum of weights keeps its old maximum",
           "return m, l * shrink + p, acc", "return m, l + p, acc", LENGTH),
    mutant("no_maximum", "exp of scores as they are",
           "new = tl.maximum(m, tl.max(s, AXIS))", "new = tl.maximum(m * 0, 0.0)", LARGE),
    mutant("nothing_seen", "rows that have seen nothing become NaN",
           'finite = tl.where(new == float("-inf"), 0.0, new)', "finite = new",
           RAGGED + "[plain-3-1]"),
    mutant("divided_by_nothing", "an empty sequence is divided by a sum of 0",
           "some = tl.where(l == 0.0, 1.0, l)", "some = l * 1.0", WHOLE),
    mutant("base_e", "scores in base e taken for base 2",
           "scale * 1.4426950408889634, S", "scale, S", LENGTH),
    mutant("no_position_part", "scores without q_r·k_r",
           "        s = tl.dot(q_r, tl.trans(r), s, input_precision=DOT) * scale",
           "        s = s * scale", LENGTH),
    mutant("sees_the_next", "mask off by one",
           ".to(tl.int32) + 1, S)", ".to(tl.int32) + 2, S)", WHOLE),
    mutant("last_key_again", "the last row, read again behind the end, is seen there",
           's = tl.where(keys[None, :] < seen[:, None], s, float("-inf"))\n', "\n", LENGTH),
    mutant("reads_behind_the_end", "what lies behind a sequence is read",
           "rows = first + tl.minimum(tl.arange(0, BN), end - 1 - start)",
           "rows = first + tl.arange(0, BN)", PLAIN),
    mutant("length_of_the_batch", "every sequence as long as the longest",
           "end = tl.max(seen, 0)", "end = tl.max(seen, 0) + 1", WHOLE),
    mutant("piece_rounded_down", "keys that no piece reads",
           "piece = tl.cdiv(tl.cdiv(end, BN), tl.num_programs(1)) * BN",
           "piece = tl.cdiv(end, BN) // tl.num_programs(1) * BN", PLAIN),
    mutant("heads_as_tokens", "rows of queries ordered by head",
           "i // n_h * stride_pt", "i % n_h % 3 * stride_pt",
           TESTS + "positions_as_the_twin_takes_them"),
    mutant("this_page_again", "the page of the tile before",
           "tl.minimum(start + BN, end - 1) // PAGE", "start // PAGE", PAGES),
    mutant("first_page", "each piece begins with the sequence's first page",
           "page = tl.load(table + lo // PAGE,", "page = tl.load(table,",
           TESTS + "pages_in_any_order[5-64]"),
    mutant("pages_of_the_first_sequence", "one block table for all",
           "table += b * stride_tb", "table += 0 * b", PAGES),
    mutant("row_of_the_sequence", "a place in the sequence taken for one in the page",
           "first = start % PAGE if PAGE else start",
           "first = start % (2 * PAGE) if PAGE else start", PAGES),
    mutant("plain_mean", "pieces averaged without their sums",
           "weights = tl.exp2(part - tl.where(m == float(\"-inf\"), 0.0, m))",
           "weights = tl.where(part == float(\"-inf\"), 0.0, 1.0)", COMBINE),
    mutant("lse_without_sum", "lse is only the maximum",
           "m + tl.log2(some), mask", "m, mask", PLAIN),
    mutant("wrong_piece", "pieces of the next row combined",
           "at = (row // n * splits + s) * n + row % n",
           "at = (row // n * splits + s) * n + row % 2", COMBINE),
]

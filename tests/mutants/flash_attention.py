# SPDX-License-Identifier: MIT
"""Wrong variants of flash_attention.py, and the test that must fail for each."""

from mutants import Mutant

TESTS = "test_flash_attention.py::test_"
LENGTH, CACHED = TESTS + "equals_the_twin_at_any_length", TESTS + "new_tokens_after_cached_ones"
PACKED, HUNDREDS = TESTS + "packed_sequences", TESTS + "scores_of_hundreds"
ORDER = TESTS + "positions_in_any_order"


def mutant(name: str, catches: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, catches, "kernels/flash_attention.py", old, new, node)


KERNEL_MUTANTS = [
    mutant("no_rescale", "values of earlier tiles keep their old maximum",
           "v, acc * shrink[:, None]", "v, acc", LENGTH + "[97]"),
    mutant("sum_not_rescaled", "the sum of earlier tiles keeps its old maximum",
           "l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", LENGTH + "[97]"),
    mutant("no_maximum", "exp of scores as they are",
           "m_new = tl.maximum(m, tl.max(s, 1) * scale_2)", "m_new = tl.zeros_like(m)",
           HUNDREDS + "[rising]"),
    mutant("base_e", "scores in base 2 taken as natural ones",
           "p = tl.exp2(s * scale_2 - top[:, None])", "p = tl.exp(s * scale_2 - top[:, None])",
           LENGTH + "[31]"),
    mutant("sees_the_next", "mask off by one", "at = rows + shift\n", "at = rows + shift + 1\n",
           TESTS + "no_token_sees_the_future"),
    mutant("diagonal_unmasked", "tiles on the diagonal counted as whole",
           "tl.minimum(tl.min(at, 0) + 1, S)", "tl.minimum(tl.max(at, 0) + 1, S)",
           LENGTH + "[64]"),
    mutant("last_key_again", "the last key, loaded for rows past the end, is seen there",
           "& (n + j[None, :] < S)\n                s = tl.where(seen, s, -float(\"inf\"))\n"
           "            m_new", "\n                s = tl.where(seen, s, -float(\"inf\"))\n"
           "            m_new", ORDER),
    mutant("last_query_again", "the last query, loaded for rows past the end, gives gradients",
           " & (m + i[None, :] < T)", "", LENGTH + "[97]"),
    mutant("blind_nan", "a query that has seen nothing yet divides by nothing",
           "l = tl.where(something, l, 1.0)", "l = l * 1.0", PACKED + "[blind]"),
    mutant("lse_without_sum", "lse is only the maximum", "m + tl.log2(l), float", "m, float",
           LENGTH + "[31]"),
    mutant("no_delta", "the softmax's backward pass without its row sum",
           "ds = (p * (dp - delta[:, None]))", "ds = (p * dp)", LENGTH + "[31]"),
    mutant("delta_of_the_wrong_sign", "dS with the row sum added",
           "ds = (p * (dp - delta[None, :]))", "ds = (p * (dp + delta[None, :]))",
           LENGTH + "[31]"),
    mutant("scale_lost", "the gradient of k_r without the softmax scale",
           "_store(dK_r, dk_r * scale,", "_store(dK_r, dk_r,", LENGTH + "[31]"),
    mutant("no_position_part", "scores made again without q_r·k_r",
           "            s = tl.dot(k_r, tl.trans(q_r), s, input_precision=\"ieee\")\n", "",
           LENGTH + "[31]"),
    mutant("one_head", "the gradient of the shared key from one head alone",
           "parts.sum(1)", "parts[:, 0]", LENGTH + "[31]"),
    mutant("aligned_to_the_first_key", "query i taken to stand at position i of the keys",
           "a = tl.maximum(n0 - (S - T), 0) // BM", "a = n0 // BM", CACHED + "[40-131]"),
    mutant("tiles_lost", "the last, partial query tile is not visited",
           "tl.where(tile < whole, 0, edge - whole)", "0", LENGTH + "[130]"),
    mutant("order_assumed", "queries at given positions taken to be in order",
           "a, whole, edge = 0, z, z", "a, whole, edge = tl.minimum(n0 // BM, z), z, z", ORDER),
    mutant("gradient_not_written", "keys that no query sees keep what memory held",
           "    if n0 >= S:\n", "    if (n0 >= S) | (T == 0):\n", PACKED + "[empty]"),
]

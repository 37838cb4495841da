# SPDX-License-Identifier: MIT
"""Wrong variants of the kernels of route_tokens.py, and the test that must fail for each."""

from mutants import Mutant

FILE = "kernels/route_tokens.py"
_greedy = "test_route_tokens.py::test_greedy_takes_the_twins_experts"
_limited = "test_route_tokens.py::test_device_limited_takes_the_twins_experts"
_few = "test_route_tokens.py::test_few_tokens_are_routed_at_once"
_sorted = "test_route_tokens.py::test_slots_are_sorted_as_the_twin_sorts_them"


def _wrong(name: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, "routing", FILE, old, new, node)


KERNEL_MUTANTS = [
    _wrong("sorted_backwards_in_a_block", "tl.cumsum(table, 0) - table ",
           "tl.sum(table, 0)[None] - tl.cumsum(table, 0) ", _sorted),
    _wrong("places_within_a_block_ignored", "(first[None] + earlier)",
           "(first[None] + 0 * earlier)", _sorted),
    _wrong("dropped_slots_sorted_in", "(tl.load(keep + slot, mask=kept, other=0) != 0)",
           "(tl.load(keep + slot, mask=kept, other=0) >= 0)", _sorted),
    _wrong("offsets_of_the_last_block", "edges[::blocks]", "edges[blocks - 1 :: blocks]", _sorted),
    _wrong("device_worth_all_its_experts", "best = tl.max(values, 2)",
           "best = tl.sum(tl.maximum(values, 0.0), 2)",
           "test_route_tokens.py::test_a_device_is_worth_its_best_expert_and_not_its_two_best"),
    _wrong("forbidden_experts_masked_with_0",
           'tl.where(allowed[:, :, None], values, -float("inf"))',
           "tl.where(allowed[:, :, None], values, 0.0)",
           "test_route_tokens.py::test_an_underflowed_affinity_does_not_escape_its_device"),
    _wrong("one_device_too_many", "for _ in tl.static_range(M):",
           "for _ in tl.static_range(M + 1):", _limited),
    _wrong("padded_place_taken_for_an_expert", "winner // EACH * each + winner % EACH",
           "winner % (each * D)", _limited),
    _wrong("an_expert_chosen_twice",
           'tl.where(column[None] == winner[:, None], -float("inf"), values)', "values * 1.0",
           _greedy),
    _wrong("worst_experts_first", "winner = tl.argmax(values, 1)                               # "
           "(BLOCK,)\n        chosen",
           "winner = tl.argmin(values, 1)                               # (BLOCK,)\n        chosen",
           _greedy),
    Mutant("dropped_slots_summed", "experts", FILE,
           "mask = mask & (tl.load(keep + n * K + k) != 0)",
           "mask = mask & (tl.load(keep + n * K + k) >= 0)",
           "test_grouped_experts.py::test_equals_the_loop"),
    _wrong("few_products_of_the_first_block", "tl.range(0, d, BLOCK)", "tl.range(0, BLOCK, BLOCK)",
           _few),
    _wrong("few_products_in_half_precision", "other=0.0).to(tl.float32)\n        acc += x *",
           "other=0.0).to(tl.float16).to(tl.float32)\n        acc += x *", _few),
    _wrong("few_products_with_the_next_row", "tl.load(centroids + e * d + column, mask=column < d",
           "tl.load(centroids + e * d + column, mask=column < d + 1", _few),
    _wrong("few_gates_without_the_factor", "tl.sum(tl.where(hit, s, 0.0), 1) * factor",
           "tl.sum(tl.where(hit, s, 0.0), 1) + 0 * factor", _few),
    _wrong("few_softmax_over_padding", "tl.load(z + at, mask=inside, other=0.0), -float(\"inf\"))",
           "tl.load(z + at, mask=inside, other=0.0), 0.0)", _few),
    _wrong("few_last_token_not_sorted", "tl.where((n < N)[:, None], taken, 0)",
           "tl.where((n < N - 1)[:, None], taken, 0)", _few),
    _wrong("few_slots_by_rank", "n[:, None] * K + k, slot)", "n[:, None] + k * N, slot)", _few),
    _wrong("few_sorted_backwards", "earlier = tl.cumsum(taken, 0) - taken ",
           "earlier = counts[None] - tl.cumsum(taken, 0) ", _few),
    _wrong("few_offsets_of_the_ends", "tl.store(offsets + expert, first,",
           "tl.store(offsets + expert, first + counts,", _few),
    _wrong("sum_without_the_stream", "acc += tl.load(u + n * d + column, mask=column < d",
           "acc += tl.load(u + n * d + column, mask=column < 0",
           "test_route_tokens.py::test_rows_join_the_stream"),
]

# SPDX-License-Identifier: MIT
"""Exercises of 16_expert_parallel."""

import torch

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.parallel.expert import sort_rows

WANTED = [[0, 4, 1], [5, 3, 4], [2, 1, 0], [3, 0, 5], [4, 5, 3]]
CASES = [([[0, 1], [2, 3], [1, 3], [0, 2]], 2, 2), ([[0, 1, 2], [5, 3, 4]], 3, 4),
         ([[7, 1], [6, 5]], 2, 4), ([[0, 4, 8], [1, 2, 3], [11, 10, 0]], 4, 3), ([], 2, 3)]


def rows(indices: list[list[int]], held: int, n_ranks: int) -> list[int]:
    """Rows that go to each rank."""
    slots = torch.tensor(indices, dtype=torch.int64).view(len(indices), -1 if indices else 1)
    return sort_rows(slots, n_ranks, held)[2].tolist()


def sent_bytes(rows: int, numbers: int, layers: int) -> float:
    """Of 4,096 tokens: rows per token, each of d numbers and some numbers of 4 bytes."""
    return float(rows * (2 * V2.d + 4 * numbers) * 4096 * layers)


LAYERS = V2.n_layers - V2.n_dense

exercises = Exercises({
    1: Value(rows(WANTED, 3, 2), "For each token take the set of e // 3, the ranks of its "
             "experts. How many of these sets hold rank 0, how many rank 1?",
             known=[([6, 9], "these are slots, and a row may stand for several"),
                    ([4, 3], "rank 0 has the experts 0, 1, 2")]),
    2: Value(sent_bytes(V2.max_devices, 2 * V2.top_k, LAYERS),
             "At most M rows per token and layer; a row is d numbers of 2 bytes, K gates and K "
             "numbers of 4.", tolerance=1e-3,
             known=[(sent_bytes(V2.top_k, 2 * V2.top_k, LAYERS), "this is one row per slot"),
                    (sent_bytes(V2.max_devices, 0, LAYERS), "gates and numbers are missing"),
                    (sent_bytes(V2.max_devices, 2 * V2.top_k, 1), "this is one layer")]),
    3: Function(rows, CASES, "A token counts once for each rank that holds at least one of its "
                "experts; a rank that gets nothing has a 0."),
    4: Function(lambda delay, forward, backward: min(delay, forward) + min(delay, backward),
                [(5.0, 3.0, 4.0), (2.0, 3.0, 4.0), (4.5, 6.0, 2.0), (3.0, 2.5, 7.0),
                 (0.0, 1.0, 1.0)],
                "Two journeys are hidden. Of each is saved what lasts less: the journey or the "
                "shared experts meanwhile."),
    5: Value(8, "A mean over N / D tokens divides by D times less than a mean over N. Who divides "
             "by D afterwards, and what is never divided?",
             known=[(1 / 8, "which of the two is larger?"),
                    (64, "the rows that come from other ranks are counted once, not D times")]),
})

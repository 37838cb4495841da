# SPDX-License-Identifier: MIT
"""Exercises of 03_rope."""

import math

import torch
from torch import Tensor

from dsv2_ref.attention.rope import rope_frequencies, rope_tables, rotate
from dsv2_ref.exercises import Exercises, Function, Value

MATRICES = torch.tensor([[[3, 0], [0, 3]], [[3, 0], [0, 1]], [[0, -2], [2, 0]],
                         [[0, 1], [1, 0]]]).double()


def score() -> float:
    """One pair (1, 0), speed 0.1, as a query at position 70 and as a key at position 30."""
    tables = rope_tables(torch.tensor([70, 30]), torch.tensor([0.1]).double())
    query, key = rotate(torch.tensor([[[1.0, 0.0]] * 2]).double(), *tables)[0]
    return (query @ key).item()


def pairs_that_turn(positions: int) -> int:
    """Of V2's 32 pairs, those that make a whole turn at least."""
    return int((rope_frequencies(64) * positions >= 2 * math.pi).sum())


def change_places() -> list[bool]:
    """Which matrices give the same after a turn and before it, tried on turns of one pair."""
    cos, sin = rope_tables(torch.arange(1, 8), torch.tensor([0.3]).double())
    turns = torch.stack((cos, -sin, sin, cos), -1).view(-1, 2, 2)
    return [torch.allclose(turns @ W, W @ turns) for W in MATRICES]


def to_adjacent(W: Tensor, d_r: int) -> Tensor:
    """Rows of each head from half-split to adjacent pairs, row by row: (n_h * d_r, n), the same."""
    rows = []
    for head in range(len(W) // d_r):
        for i in range(d_r // 2):
            rows += [W[head * d_r + i], W[head * d_r + d_r // 2 + i]]
    return torch.stack(rows)


def cases() -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(heads * d_r, 5, generator=g, dtype=torch.float64), d_r)
            for heads, d_r in ((1, 4), (3, 6), (2, 8))]


exercises = Exercises({
    1: Value(score(), "Only the distance of the two positions counts: how many radians is it?",
             tolerance=0.01,
             known=[(math.cos(10), "that is the angle of the sum of the positions"),
                    (math.cos(40), "the speed is missing"),
                    (math.cos(math.radians(4)), "so the arrows would hardly have parted; is your "
                     "angle in radians?"),
                    (math.sin(4), "two equal arrows that are not turned have score 1")]),
    2: Value(pairs_that_turn(1000), "A pair turns whole if 1000 times its speed is 2π or more. "
             "Count these in `frequencies`; pairs count from 0.",
             known=[(pairs_that_turn(1000) - 1, "is it the number of the last such pair? Pairs "
                     "count from 0"),
                    (32 - pairs_that_turn(1000), "so many do not make a whole turn"),
                    (pairs_that_turn(4096), "that is for 4096 positions")]),
    3: Value(change_places, "Multiply each with a quarter turn from the left and from the right. "
             "Only matrices that turn and stretch every arrow alike can change places.",
             known=[([True, False, False, False], "is a turn itself changed by another turn?"),
                    ([True, True, False, False], "does a diagonal always change places?"),
                    ([True, False, True, True], "swapping the two numbers mirrors an arrow")]),
    4: Function(to_adjacent, cases, "Head by head: a row of the first half, then the row that "
                "stands d_r / 2 below it, and so on."),
})

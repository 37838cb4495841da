# SPDX-License-Identifier: MIT
"""Exercises of 01_attention."""

import torch
from torch import Tensor

from dsv2_ref.config import LITE, V2
from dsv2_ref.exercises import Exercises, Function, Value


def mha_gib(tokens: int) -> float:
    """GiB of MHA's keys and values in bf16, V2's sizes."""
    return 2 * V2.n_h * V2.d_h * V2.n_layers * 2 * tokens / 2**30


def groups_at_most() -> int:
    """The most groups of V2-Lite's heads that keep no more than MLA's row."""
    allowed = [n for n in range(1, LITE.n_h + 1) if LITE.n_h % n == 0]
    return max(n for n in allowed if 2 * n * LITE.d_h <= LITE.d_c + LITE.d_r)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation (7), token by token: q, k (T, d_h), v (T, d_v) -> (T, d_v)."""
    rows = []
    for t in range(len(q)):
        powers = [torch.exp(q[t] @ k[j] / q.shape[1] ** 0.5) for j in range(t + 1)]
        rows.append(sum(p * v[j] for j, p in enumerate(powers)) / sum(powers))
    return torch.stack(rows)


def cases() -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(T, size, generator=g, dtype=torch.float64)
                  for size in (d_h, d_h, d_v)) for T, d_h, d_v in ((1, 4, 3), (2, 3, 5), (5, 4, 3))]


exercises = Exercises({
    1: Value(mha_gib(2**17), "Take section 7's bytes per token times the tokens; a GiB is 2**30 "
             "bytes.",
             known=[(mha_gib(2**17) / 2, "a value is kept beside each key, and bf16 has two bytes "
                     "per number"),
                    (mha_gib(2**17) / V2.n_layers, "one layer's part; every layer keeps its own"),
                    (mha_gib(2**17) * 2**30 / 1e9, "in GB, of 10**9 bytes; asked in GiB")]),
    2: Value([j >= 1 for j in range(4)], "A row of u depends on its own token and on everything "
             "before it. In which rows is \"cat\" among these?",
             known=[([False, True, False, False], "who else reads the second token?"),
                    ([True, True, False, False], "this is the other direction in time"),
                    ([True] * 4, "can every token see the second one?")]),
    3: Value(groups_at_most(), "Keys and values of n_g groups are 2 * n_g * 128 numbers. Compare "
             "with the row, and remember that all groups have equally many heads.",
             known=[(2.25, "no model has a part of a group"),
                    (3, "can 16 heads be cut into so many equal groups?")]),
    4: Function(one_head, cases, "All scores are q @ k.T / sqrt(d_h). Later keys get -inf, then "
                "comes the softmax over keys (the last dimension), then the values."),
})

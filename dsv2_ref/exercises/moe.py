# SPDX-License-Identifier: MIT
"""Exercises of 06_moe."""

import math

import torch
from torch import Tensor

from dsv2_ref.config import LITE, V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.moe.experts import experts_loop
from dsv2_ref.moe.routing import select_greedy

ONE_EXPERT = 3 * V2.d * V2.expert_width


def gates(s: Tensor, top_k: int) -> Tensor:
    """(21): affinities (N, E) -> gates (N, E), 0 where an expert was not chosen."""
    indices = select_greedy(s, top_k)
    return torch.zeros_like(s).scatter(1, indices, s.gather(1, indices))


def affinity_cases() -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, e, dtype=torch.float64, generator=g).softmax(-1), k)
            for n, e, k in ((1, 4, 2), (3, 5, 2), (4, 8, 3))]


def routed_cases() -> list[tuple[Tensor, ...]]:
    """Tokens, their experts and gates, three weights; in the last one expert 3 gets no token."""
    g = torch.Generator().manual_seed(0)
    cases = []
    for n, d, w, experts in ((1, 2, 3, 4), (5, 2, 3, 4), (4, 3, 2, 3)):
        indices = torch.stack([torch.randperm(experts, generator=g)[:2] for _ in range(n)])
        cases.append((torch.randn(n, d, dtype=torch.float64, generator=g), indices,
                      torch.rand(n, 2, dtype=torch.float64, generator=g),
                      *(torch.randn(size, dtype=torch.float64, generator=g)
                        for size in ((4, w, d), (4, w, d), (4, d, w)))))
    return cases


exercises = Exercises({
    1: Value(math.comb(LITE.n_routed, LITE.top_k),
             "How many ways are there to choose 6 of 64, if the order does not matter? Section 4 "
             "has the function that knows.",
             tolerance=0.0,
             known=[(math.perm(64, 6), "this counts one choice once for each order of its experts"),
                    (64**6, "this lets a token choose the same expert twice, and counts orders")]),
    2: Value(LITE.routed_scaling_factor * LITE.top_k / LITE.n_routed,
             "If all 64 are liked equally, how large is one affinity? Add up the six that are "
             "chosen, then multiply by V2-Lite's own factor; section 2 printed it.",
             known=[(V2.routed_scaling_factor * 6 / 64, "this is with V2's factor"),
                    (1.0, "V2 and V2-Lite do not divide the gates by their sum"),
                    (6 / 160, "V2 has 160 experts, V2-Lite has not")]),
    3: Value(ONE_EXPERT * (V2.n_shared + V2.top_k),
             "An expert has three matrices of 5120 x 1536. How many experts does a token pass, the "
             "shared ones included?",
             tolerance=0.0,
             known=[(ONE_EXPERT * V2.top_k, "the shared experts are missing"),
                    (ONE_EXPERT * (V2.n_shared + V2.n_routed), "these are all of the layer"),
                    (ONE_EXPERT // 3 * (V2.n_shared + V2.top_k),
                     "this counts one matrix per expert")]),
    4: Function(gates, affinity_cases, "Look at (21): what happens to a chosen affinity, and what "
                "to one that is not chosen? The shape stays (N, E)."),
    5: Function(experts_loop, routed_cases, "It is the last sum of (20): for each token and each "
                "of its experts, the FFN of section 1 with that expert's matrices, times the gate "
                "of this slot. No residual stream, no shared expert."),
})

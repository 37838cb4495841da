# SPDX-License-Identifier: MIT
"""Exercises of 07_routing."""

import math

import torch
from torch import Tensor

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.moe.balance import device_reach
from dsv2_ref.moe.routing import select_device_limited

ASKED = torch.tensor([0.05, 0.28, 0.20, 0.19, 0.26, 0.02])       # of exercise 2


def expected_devices(n_routed: int, n_devices: int, top_k: int) -> float:
    """Devices that a token reaches on average, if all choices of experts are equally likely."""
    elsewhere = math.comb(n_routed - n_routed // n_devices, top_k)
    return n_devices * (1 - elsewhere / math.comb(n_routed, top_k))


def chosen(s: Tensor, top_k: int, n_devices: int, max_devices: int) -> list[int]:
    """(E,) -> K experts, best first."""
    return select_device_limited(s, top_k, n_devices, max_devices).tolist()


def choices() -> list[tuple]:
    """The last one has affinities that have underflowed to 0."""
    g = torch.Generator().manual_seed(0)
    return [(torch.tensor([0.26, 0.04, 0.05, 0.19, 0.17, 0.14, 0.12, 0.03]), 3, 4, 2),
            (ASKED, 3, 3, 2), (torch.tensor([0.40, 0.02, 0.25, 0.24, 0.05, 0.04]), 2, 3, 1),
            *((torch.rand(24, generator=g).softmax(-1), 4, 6, 3) for _ in range(8)),
            (torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0]), 2, 3, 1)]


def messages(indices: Tensor, n_routed: int, n_devices: int) -> Tensor:
    """(N, K) experts -> (N,) numbers of different devices."""
    return device_reach(indices[None], n_routed, n_devices)[0].sum(-1)


def message_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    indices = torch.stack([torch.randperm(24, generator=g)[:5] for _ in range(7)])
    return [(torch.tensor([[0, 3, 2], [0, 3, 4]]), 8, 4), (indices, 24, 4), (indices, 24, 6)]


exercises = Exercises({
    1: Value(expected_devices(64, 8, 6),
             "Section 5's formula, with new numbers: how many experts lie on one device, and how "
             "many are left if a device is missed?",
             known=[(expected_devices(160, 8, 6), "this is V2, with its 160 experts"),
                    (6, "experts that lie together need one message"),
                    (8 - expected_devices(64, 8, 6), "these are the devices that are missed")]),
    2: Value(chosen(ASKED, 3, 3, 2),
             "First the devices: how good is the best expert of each? Two devices are in reach. "
             "Then the three best experts on those, best first.",
             known=[([1, 2, 3], "this is V3's rule, the sum of the two best of a device"),
                    ([1, 4, 2], "expert 2 lies on a device that is out of reach"),
                    ([0, 1, 4], "the right experts; asked for is the best one first")]),
    3: Value(min(V2.top_k, V2.n_devices),
             "Section 5 shows on how many devices the best K experts can lie at most, seen from "
             "the ranks of the devices.",
             known=[(8, "with this M all devices are in reach, but a smaller one is enough"),
                    (3, "this is V2's limit, and it does change the choice of most tokens")]),
    4: Function(chosen, choices,
                "A device counts by its one best expert. Devices out of reach must lose against "
                "every affinity, 0 included. Then the top K of what is left, best first."),
    5: Function(messages, message_cases,
                "Each device holds n_routed / n_devices experts, in order. How many different "
                "devices does a row name?"),
})

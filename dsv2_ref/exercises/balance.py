# SPDX-License-Identifier: MIT
"""Exercises of 08_balance."""

import torch
from torch import Tensor

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    device_reach,
    expert_balance_loss,
)

ROUTINGS = [torch.tensor(rows) for rows in (         # of exercise 2
    [[0, 1, 3], [0, 1, 4], [0, 3, 4], [2, 3, 5]], [[0, 1, 2], [0, 3, 4], [1, 4, 5], [2, 3, 5]],
    [[0, 1, 3], [1, 2, 4], [0, 2, 5], [1, 2, 3]])]


def worst() -> list[float]:
    """The three losses over their alpha when all tokens choose the first six of V2's experts."""
    s = torch.zeros(1, 1, V2.n_routed, dtype=torch.float64)
    s[..., :V2.top_k] = 1 / V2.top_k
    indices = torch.arange(V2.top_k)[None, None]
    return [expert_balance_loss(s, indices, 1.0).item(),
            device_balance_loss(s, indices, 1.0, V2.n_devices).item(),
            communication_balance_loss(s, indices, 1.0, V2.n_devices, V2.max_devices).item()]


def who_sees() -> list[str]:
    """For each routing the loss with uneven counts; of the third, the one of devices."""
    found = []
    for rows, asked in zip(ROUTINGS, (3, 3, 2), strict=True):
        counts = {"communication": device_reach(rows[None], 6, 2)[0].sum(0),
                  "device": torch.bincount(rows.flatten() // 3, minlength=2),
                  "expert": torch.bincount(rows.flatten(), minlength=6)}
        (name,) = (n for n in list(counts)[:asked] if len(set(counts[n].tolist())) > 1)
        found.append(name)
    return found


def heaps() -> list[float]:
    """The device loss over its alpha of two opposite sequences: apart, and as one heap."""
    s = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 4, 2)
    indices = torch.tensor([0, 1])[:, None, None].expand(2, 4, 1)
    return [device_balance_loss(s, indices, 1.0, 2).item(),
            device_balance_loss(s.reshape(1, 8, 2), indices.reshape(1, 8, 1), 1.0, 2).item()]


def message_share(indices: Tensor, n_routed: int, n_devices: int, max_devices: int) -> Tensor:
    """(30): (T, K) -> (D,)."""
    reach = device_reach(indices[None], n_routed, n_devices)[0]
    return reach.double().mean(0) * n_devices / max_devices


exercises = Exercises({
    1: Value(worst, "Take them one after the other. What is f of a chosen expert, if T tokens "
             "choose it and an equal share is 6 T / 160 slots? What is the mean f of its device, "
             "over 20 experts? What is f'' of a device that hears from all tokens?",
             known=[([6.0, 8.0, 8 / 3], "f measures an expert against an equal share of all 160"),
                    ([160 / 6, 160 / 6, 8 / 3], "f' is the mean of f over all experts of a device"),
                    ([160 / 6, 8.0, 8.0], "in (30) an equal share is M T / D tokens, not T / D"),
                    ([160 / 6, 160.0, 8 / 3], "f' is a mean, not a sum")]),
    2: Value(who_sees, "For each routing make three counts: slots of each expert, slots of each "
             "device, tokens that reach each device. A loss sees something if its counts differ.",
             known=[(["expert", "device", "communication"],
                     "communication counts tokens, each once per device; device counts slots")]),
    3: Value(heaps, "Alone, a sequence has all of f' and of P' on one device. Together, each "
             "device has half of the slots and half of the affinity.",
             known=[([1.0, 2.0], "the other way round"),
                    ([4.0, 1.0], "the batch's loss is the mean over its sequences, not the sum")]),
    4: Function(message_share,
                lambda: [(torch.tensor([[0, 1, 2], [0, 3, 4], [0, 3, 5], [1, 3, 4]]), 6, 2, 2),
                         (torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]), 6, 2, 1),
                         (torch.tensor([[0, 1, 3], [1, 2, 4], [0, 2, 5], [0, 1, 4]]), 6, 3, 2),
                         (torch.tensor([[0, 1], [0, 5]]), 8, 4, 2)],
                "Equation (30): for each device the tokens that reach it, each of them once, "
                "times D / (M T). A device that nobody reaches has 0."),
})

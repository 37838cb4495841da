# SPDX-License-Identifier: MIT
"""Exercises of 09_dropping."""

import torch

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.moe.dropping import keep_within_budget

SLOTS = 2 * 4096 * V2.top_k


def dropped(load: list[int], capacity: float) -> float:
    """Share of all slots that is dropped, with nothing protected, as the module drops them."""
    device = torch.arange(len(load)).repeat_interleave(torch.tensor(load))[:, None]
    kept = keep_within_budget(device, torch.rand(device.shape), len(load), len(load),
                              capacity=capacity)
    return 1 - kept.double().mean().item()


def kept_on_device(affinity: list[float], protected: list[bool], budget: int) -> list[bool]:
    """Which slots one device keeps."""
    ranked = sorted(range(len(affinity)), key=lambda i: (not protected[i], -affinity[i], i))
    return [protected[i] or ranked.index(i) < budget for i in range(len(affinity))]


exercises = Exercises({
    1: Value(SLOTS // V2.n_devices,
             "The budget is in slots. How many slots do all tokens of the two sequences have "
             "together? Each device may keep an equal share.",
             tolerance=0.0,
             known=[(SLOTS, "these are the slots of all devices together"),
                    (2 * 4096 // V2.n_devices, "this counts tokens; a token has six slots"),
                    (SLOTS // 2 // V2.n_devices, "the micro-batch has two sequences")]),
    2: Value(lambda: [dropped([1200] * 8, 0.75), dropped([8 * 1200] + [0] * 7, 1.0)],
             "Section 5's formula. (a) Every device wants an equal share and may keep C of it. "
             "(b) One device wants all slots and may keep an eighth of them.",
             known=[([0.75, 0.125], "these are the shares that are kept"),
                    ([0.25, 0.125], "(b) is the share that is kept")]),
    3: Function(dropped,
                [([12, 4], 1.0), ([12, 4], 0.5), ([3, 3, 4], 1.0), ([5, 0, 0, 2], 1.3),
                 ([4, 4], 2.0)],
                "The budget is a whole number, rounded down. Add up what each device wants beyond "
                "it, never less than 0, and divide by all slots."),
    4: Function(kept_on_device,
                [([.5, .9, .7, .4], [False] * 4, 2),
                 ([.5, .9, .7, .4], [False, False, False, True], 2),
                 ([.3, .3, .3], [False] * 3, 2), ([.1, .2, .9], [True, True, False], 1),
                 ([], [], 3)],
                "Rank the slots: protected ones first, then by affinity, and among equal ones the "
                "earlier first. The first `budget` are kept, and protected ones in any case."),
})

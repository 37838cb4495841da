# SPDX-License-Identifier: MIT
"""Exercises of 14_pretraining."""

import math

import torch
from torch import Tensor

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.training.recipe import PAPER


def clip(gradients: list[Tensor], most: float) -> list[Tensor]:
    """The gradients, scaled so that their common norm is at most `most`."""
    norm = math.sqrt(sum((g * g).sum().item() for g in gradients))
    return [g * min(1.0, most / norm) for g in gradients]


def clip_cases() -> list[tuple]:
    return [([torch.tensor([3.0]), torch.tensor([4.0])], 1.0),
            ([torch.tensor([0.3, 0.0]), torch.tensor([[0.4]])], 1.0),
            ([torch.arange(6.0).view(2, 3), torch.ones(4)], 2.5)]


def adamw(w: float, g: float, m: float, v: float, t: int, rate: float) -> list[float]:
    """Weight and moments after step t, with beta 0.9 and 0.95, a decay of 0.1, epsilon 1e-8."""
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    step = m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return [w - rate * 0.1 * w - rate * step, m, v]


V2_RATE = PAPER["v2"]
TOKENS, PHASE, SEQUENCE = 10_340, 100, 256

exercises = Exercises({
    1: Value(V2_RATE.rate(0.7) * V2_RATE.lr, "70 % lies behind the first mark (60 %) and before "
             "the second one (90 %).",
             known=[(V2_RATE.lr, "that is the peak; one mark is passed already"),
                    (0.316**2 * V2_RATE.lr, "the second mark, at 90 %, is not passed yet")]),
    2: Value((TOKENS - 1 - PHASE) // SEQUENCE, "Each window needs its tokens, and one more: the "
             "target of its last token. What is left behind the last whole window is not read.",
             known=[((TOKENS - PHASE) // SEQUENCE, "the last token of the last window has no "
                     "target")]),
    3: Value(math.log(V2.vocab), "A model that knows nothing gives each word the same probability. "
             "The loss is in nats: the natural logarithm.",
             known=[(math.log2(V2.vocab), "that is in bits")]),
    4: Function(clip, clip_cases, "One norm of all gradients together; and gradients that are "
                "short enough stay as they are.", tolerance=1e-5),
    5: Function(adamw, [(1.0, 0.5, 0.0, 0.0, 1, 0.1), (2.0, -0.3, 0.2, 0.04, 7, 0.05),
                        (-1.0, 0.0, 0.1, 0.5, 40, 0.2)],
                "First both means, then what they would be without their start at 0, then the "
                "step; the decay takes from the old weight and is not in the gradient."),
})

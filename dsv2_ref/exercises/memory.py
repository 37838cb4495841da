# SPDX-License-Identifier: MIT
"""Exercises of 24_memory."""

import math

from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.kernels.eight_bit_moments import V_CODES, V_DECADES
from dsv2_ref.training.memory import state_bytes
from dsv2_ref.training.recipe import Recipe


def share(x: float, gap: float) -> float:
    """The probability that x is rounded up on a grid of multiples of `gap`."""
    return x / gap - math.floor(x / gap)


def size(code: int, largest: float) -> float:
    """What a code of a second moment stands for."""
    return largest * 10 ** (-V_DECADES * (V_CODES - code) / (V_CODES - 1)) if code else 0.0


LITTLE = Recipe(steps=1, optimizer="adamw8", weights="bf16")

exercises = Exercises({
    1: Value(2**-7 / 2e-4, "A move is a whole gap, 2**-7 = 0.0078; an update is 0.0002. How many "
             "updates make a gap?", tolerance=0.03,
             known=[(2**-7 / 1e-4, "that is for an update of 1e-4"),
                    (2**-8 / 2e-4, "between 1 and 2 the gap is 2**-7: 8 significant bits, and the "
                     "first of them stands for 1")]),
    2: Value(state_bytes(7_000_000_000, LITTLE) / 1e9, "The last row of the table in section 1, "
             "times seven billion.",
             known=[(7 * 16, "that is fp32 with AdamW"), (7 * 10.03125, "the weights, and with "
                     "them the gradients, are bf16")]),
    3: Value(18 * 4 + 6 * 200, "A recomputed block still keeps its input.",
             known=[(6 * 200, "a recomputed block still keeps its input"),
                    (18 * 200 + 6 * 4, "18 are recomputed, not 6")]),
    4: Function(share, [(1.0 + 1e-4, 2**-7), (0.3, 0.25), (5.0, 2.0)],
                "How far is x above the grid number below it, counted in gaps?"),
    5: Function(size, [(255, 0.5), (128, 1.0), (1, 2.0), (0, 1.0), (254, 3.0)],
                "From code 255 to code 1 there are 254 equal steps of the logarithm, seven powers "
                "of ten in all; code 0 stands for 0.", tolerance=1e-4),
})

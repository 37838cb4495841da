# SPDX-License-Identifier: MIT
"""Exercises of 23_surviving."""

import math
import statistics

from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.training.trainer import RECENT, SPIKE


def interval(seconds_to_save: float, seconds_between_kills: float) -> float:
    """Seconds between two states that lose the least time."""
    return math.sqrt(2 * seconds_to_save * seconds_between_kills)


def usable(norm: float, recent: list[float], left_out: int) -> bool:
    """Whether an update with this gradient norm is made."""
    usual = statistics.median(recent) if len(recent) == RECENT else math.inf
    return math.isfinite(norm) and (norm <= SPIKE * usual or left_out >= 3)


def cases() -> list[tuple]:
    calm = [0.9, 1.1] * 31 + [1.0, 5.0]
    return [(1.0, calm, 0), (10.5, calm, 0), (9.9, calm, 0), (500.0, calm, 2), (500.0, calm, 3),
            (math.nan, calm, 0), (math.inf, calm[:5], 0), (math.nan, calm, 3),
            (500.0, calm[:63], 0)]


exercises = Exercises({
    1: Value(1129 - 750, "Which is the newest state that is whole? Which step was the last whole "
             "one before the kill?",
             known=[(129, "the state of step 1,000 is damaged; it cannot be gone back to"),
                    (380, "step 1,130 was not whole when the kill came, so it is not done a second "
                     "time")]),
    2: Value(7 * (4 + 8), "A state holds the weight and both moments, 4 bytes each.",
             known=[(7 * 16, "gradients are made anew in each step; a state has none"),
                    (7 * 4, "those are the weights alone")]),
    3: Function(interval, [(30.0, 36_000.0), (5.0, 1000.0), (120.0, 1e6)],
                "Loss per second: save / x + x / (2 between). Where is its derivative 0?"),
    4: Function(usable, cases, "In this order: is it a number? Are there 64 norms to compare "
                "with? Is it more than 10 times their median? Were three left out already?"),
})

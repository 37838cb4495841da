# SPDX-License-Identifier: MIT
"""Exercises of 17_pipelines."""

from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.parallel.schedule import even, order, simulate, stages_of


def kept(p: int, m: int, r: int) -> int:
    """Micro-batches that rank r of p keeps at once."""
    return simulate(order("1f1b", p, m), even(p)).in_flight()[r]


def step_time(schedule: str) -> float:
    return simulate(order(schedule, 4, 12), even(4, F=2, I=3, W=2)).makespan


exercises = Exercises({
    1: Value(lambda: simulate(order("1f1b", 8, 24), even(8)).bubble,
             "p - 1 waits stand beside m micro-batches of work; the share is that of the whole "
             "time.", tolerance=1e-3,
             known=[(7 / 24, "this is idle time over work, not over the whole time"),
                    (8 / 32, "a rank waits for the others, not for itself"),
                    (22.58, "a share lies between 0 and 1")]),
    2: Value(stages_of("zbv", 8, 5), "Go down the ranks, 0 to 7, and up again: which stage does "
             "rank 7 get on the way up, which rank 6?",
             known=[([5, 13], "this is a loop"), ([10, 5], "the smaller one first"),
                    ([5, 11], "the first stage on the way up is on the last rank")]),
    3: Function(kept, [(2, 4, 0), (4, 8, 1), (4, 8, 3), (8, 3, 0), (8, 3, 7), (5, 1, 2)],
                "Count the forwards that rank r does before its first backward: the last rank "
                "does one. There are never more than there are micro-batches."),
    4: Value(lambda: step_time("zb-h1"), "A rank works m (F + I + W). Section 3 says for how long "
             "it is idle besides.", tolerance=1e-6,
             known=[(84, "this is the work alone"),
                    (105, "in each wait there is room for a W, which 1F1B leaves empty"),
                    (87, "a rank waits p - 1 times")]),
})

# SPDX-License-Identifier: MIT
"""Exercises of notebook 22: three ways to choose, bits per byte, Pass@k, EM and F1."""

import math

from dsv2_ref.exercises import Exercises, Value
from dsv2_ref.inference.scoring import choose, exact_match, pass_at_k, token_f1

CHOICES = {"yes": (-2.0, 1), "maybe": (-2.4, 1), "certainly": (-4.2, 3)}     # log p, tokens
LOSSES = ((2.0, 4.0), (1.2, 2.0))            # nats per token, bytes per token
ANSWER, EXPECTED = "A red kite with a long tail.", "the red kite"


def three_choices() -> list[int]:
    """By the sum, per byte, per token."""
    log_p, tokens = zip(*CHOICES.values(), strict=True)
    return [choose(log_p), choose(log_p, [len(c.encode()) for c in CHOICES]),
            choose(log_p, tokens)]


def bits() -> list[float]:
    """Bits per byte of both models."""
    return [loss / math.log(2) / n for loss, n in LOSSES]


def passes() -> list[float]:
    """Pass@1, @5, @8 of ten samples with three right ones."""
    return [pass_at_k(10, 3, k) for k in (1, 5, 8)]


def em_and_f1() -> list[float]:
    """Of `ANSWER`, where `EXPECTED` is right."""
    return [exact_match(ANSWER, [EXPECTED]), token_f1(ANSWER, [EXPECTED])]


exercises = Exercises({
    1: Value(three_choices, "The largest is the least negative. yes has 3 bytes, maybe 5, "
             "certainly 9; divide each log p by the length.",
             known=[([0, 0, 0], "the lengths were not divided out"),
                    ([2, 0, 1], "these have the smallest scores; the largest wins"),
                    ([0, 1, 2], "-2.4 / 5 is -0.48; and -4.2 / 9?")]),
    2: Value(bits, "Nats divided by ln 2 are bits. A token of 4 bytes shares its bits among them.",
             known=[([0.5, 0.6], "these are nats per byte"),
                    ([2 / math.log(2), 1.2 / math.log(2)], "these are bits per token"),
                    ([8 / math.log(2), 2.4 / math.log(2)], "divide by the bytes of a token")]),
    3: Value(passes, "1 - C(n - c, k) / C(n, k) with n = 10 and c = 3. How many groups of eight "
             "are there among the seven that fail?",
             known=[([1 - 0.7**k for k in (1, 5, 8)],
                     "that draws with putting back: the plug-in estimate"),
                    ([0.3, 1 / 12, 0], "that is the chance that none passes (but for the first)"),
                    ([0.7, 1 / 12, 0], "that is the chance that none passes")]),
    4: Value(em_and_f1, "Articles do not count: the answer has red, kite, with, long, tail.",
             known=[([0, 2 * 3 / (7 + 3)], "articles are left out before the words are counted"),
                    ([0, 2 * 2 / (7 + 3)], "articles are left out before the words are counted"),
                    ([1, 1], "the answer says more than was expected"),
                    ([0, 1], "that is the recall alone"),
                    ([0, 0.4], "that is the precision alone")]),
})

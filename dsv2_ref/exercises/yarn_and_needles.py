# SPDX-License-Identifier: MIT
"""Exercises of 18_yarn_and_needles."""

import math
from collections.abc import Sequence

from dsv2_ref.attention.rope import rope_frequencies, yarn_mscale
from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value

TRAINED = 4096
M = yarn_mscale(16, 0.707)


def tokens_read(length: int, places: Sequence[int]) -> int:
    """With the beginning shared by all needles."""
    return max(places) + sum(length - place for place in places)


exercises = Exercises({
    1: Value(int((2 * math.pi / rope_frequencies(V2.d_r) > TRAINED).sum()),
             "For which i is 2π·θ^(2i/64) above 4096? Count them.",
             known=[(23, "this is the number of the first such pair"),
                    (21, "one turn takes 2π / ω tokens, not 1 / ω"),
                    (11, "of these no turn but the speed is kept")]),
    2: Value(131_072 // TRAINED, "At the last position a slow pair must stand no further than it "
             "stood at 4096.",
             known=[(40, "this is what V2 took, which is more than it needs"),
                    (128, "s is a factor and not a length")]),
    3: Value(M * M, "m = 0.0707 ln s + 1 multiplies queries and keys alike.", tolerance=1e-3,
             known=[(M, "this is m"), (yarn_mscale(8, 0.707) ** 2, "this is s = 8"),
                    ((0.0707 * math.log10(16) + 1) ** 2, "the logarithm is the natural one"),
                    ((0.0707 * math.log2(16) + 1) ** 2, "the logarithm is the natural one")]),
    4: Function(tokens_read, [(100, [10]), (100, [90, 10]), (512, [1, 256, 500]), (7, [7, 7]),
                              (64, [3, 3, 60, 9])],
                "The shared text is read once, up to the last place; from each needle's place on, "
                "each has a rest of its own."),
})

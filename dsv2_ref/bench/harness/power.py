# SPDX-License-Identifier: MIT
"""How large a difference has to be for so many seeds to see it.

A run ends a little higher or lower with each seed. Where n runs of one setting are compared with n
of another, and a run has the standard deviation σ, their means differ by chance by about σ √(2/n).
Student's t-test calls a difference real where it is larger than t times that, with t such that a
difference of nothing at all is called real in 5 of 100 studies. Its *power* is the share of studies
in which a difference that is there is called real; 0.8 is the usual aim.

  t = d / (s √(2/n)),  s² the pooled variance, of k (n - 1) degrees of freedom if a study has k
                       settings, two of which are compared

Given s, t is a normal variable around d / (σ √(2/n)) divided by s/σ, and s²·freedom/σ² is a chi
square. So one integral over s gives both the quantile and the power, without scipy.

Needs: numpy.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

CALLED_REAL = 0.05           # of studies in which there is no difference


def pooled_deviation(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """σ of one run, from runs of several settings, and its degrees of freedom."""
    groups = [list(group) for group in groups]
    if not groups or any(len(group) < 2 for group in groups):
        raise ValueError(f"groups: {[len(group) for group in groups]} runs, expected two each")
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / freedom), freedom


def beyond(t: float, freedom: int, shift: float = 0.0) -> float:
    """P(|T| > t), T Student's of `freedom` degrees, its numerator shifted by `shift`."""
    wide = 1 / math.sqrt(2 * freedom)                                        # of s / σ around 1
    ends = np.linspace(max(0, 1 - 9 * wide), 1 + 9 * wide, 401)              # s / σ
    s = (ends[1:] + ends[:-1]) / 2
    log_weight = (freedom - 1) * np.log(s) - freedom * s * s / 2             # of a chi, unscaled
    weight = np.exp(log_weight - log_weight.max())
    erf = np.array([[math.erf((t * v + sign * shift) / math.sqrt(2)) for v in s]
                    for sign in (-1, 1)])
    outside = 1 - erf.sum(0) / 2                          # of a normal variable around the shift
    return float((weight * outside).sum() / weight.sum())


@cache
def threshold(freedom: int) -> float:
    """The t that nothing at all exceeds in 5 of 100 studies."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle, freedom) > CALLED_REAL else (low, middle)
    return high


def power(difference: float, deviation: float, seeds: int, settings: int = 2) -> float:
    """Share of studies with `seeds` runs of each setting that call the difference real."""
    if seeds < 2 or deviation <= 0:
        raise ValueError(f"seeds: {seeds} with deviation {deviation}, expected two at least, and a "
                         "deviation above 0")
    freedom = settings * (seeds - 1)
    return beyond(threshold(freedom), freedom, difference / (deviation * math.sqrt(2 / seeds)))


def smallest_difference(
    deviation: float, seeds: int, settings: int = 2, wanted: float = 0.8
) -> float:
    """The difference that is seen with the wanted power."""
    low, high = 0.0, 100 * deviation
    for _ in range(30):
        middle = (low + high) / 2
        seen = power(middle, deviation, seeds, settings) >= wanted
        low, high = (low, middle) if seen else (middle, high)
    return high


def seeds_needed(
    difference: float, deviation: float, settings: int = 2, wanted: float = 0.8
) -> int:
    """The fewest seeds per setting that see the difference with the wanted power."""
    if not difference:
        raise ValueError("difference: 0, expected another number; no study sees nothing")
    rough = 2 * (2.8 * deviation / difference) ** 2                          # for many seeds
    n = max(2, int(rough) - 2)
    while n > 2 and power(difference, deviation, n - 1, settings) >= wanted:
        n -= 1
    while power(difference, deviation, n, settings) < wanted:
        n += 1
    return n

# SPDX-License-Identifier: MIT
"""How many seeds a difference takes: against printed tables, and against studies made by chance."""

import math

import numpy as np
import pytest

from dsv2_ref.bench.harness.power import (
    beyond,
    pooled_deviation,
    power,
    seeds_needed,
    smallest_difference,
    threshold,
)


@pytest.mark.parametrize("freedom, t", [(2, 4.303), (4, 2.776), (8, 2.306), (38, 2.024)])
def test_thresholds_are_those_of_the_tables(freedom, t):
    assert threshold(freedom) == pytest.approx(t, abs=2e-3)
    assert beyond(t, freedom) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("difference, n", [(0.0, 3), (2.0, 3), (1.0, 10), (0.5, 30)])
def test_power_is_the_share_of_studies_that_call_it_real(difference, n):
    g = np.random.default_rng(0)
    a, b = g.normal(0, 1, (20_000, n)), g.normal(difference, 1, (20_000, n))
    s = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / 2)
    t = np.abs(b.mean(1) - a.mean(1)) / (s * math.sqrt(2 / n))
    share = (t > threshold(2 * (n - 1))).mean()
    assert power(difference, 1.0, n) == pytest.approx(share, abs=0.012)
    assert power(-difference, 1.0, n) == pytest.approx(power(difference, 1.0, n), abs=1e-9)


def test_seeds_and_differences_are_each_others_inverse():
    # Cohen's tables: 17 per group for d = 1, 64 for d = 0.5, at 5 % and 80 %
    assert [seeds_needed(d, 1.0) for d in (1.0, 0.5, -0.5)] == [17, 64, 64]
    for n in (3, 17):
        d = smallest_difference(0.2, n)
        assert power(d, 0.2, n) == pytest.approx(0.8, abs=1e-4) and seeds_needed(d, 0.2) == n


def test_more_settings_tell_more_of_the_deviation_and_no_more_of_a_difference():
    g = np.random.default_rng(1)
    runs = g.normal(0, 1, (20_000, 4, 3)) + np.array([0, 2.0, 0, 0])[:, None]
    s = np.sqrt(runs.var(2, ddof=1).mean(1))
    t = np.abs(runs[:, 1].mean(1) - runs[:, 0].mean(1)) / (s * math.sqrt(2 / 3))
    share = (t > threshold(8)).mean()
    assert power(2.0, 1.0, 3, settings=4) == pytest.approx(share, abs=0.012)
    assert power(2.0, 1.0, 3) < 0.9 * power(2.0, 1.0, 3, settings=4)
    assert smallest_difference(1.0, 3, 4) < 0.9 * smallest_difference(1.0, 3)
    assert seeds_needed(0.5, 1.0, 4) in (63, 64)


def test_pooled():
    sigma, freedom = pooled_deviation([[1.0, 3.0], [0.0, 0.0, 3.0]])
    assert freedom == 3 and sigma == pytest.approx(math.sqrt((2 + 6) / 3))


@pytest.mark.parametrize("call, told", [
    (lambda: power(1.0, 1.0, 1), "seeds: 1 with"), (lambda: power(1.0, 0.0, 3), "deviation 0.0"),
    (lambda: seeds_needed(0.0, 1.0), "difference: 0"),
    (lambda: pooled_deviation([[1.0]]), r"groups: \[1\] runs"),
])
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()

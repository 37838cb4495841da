# SPDX-License-Identifier: MIT
"""Accuracy on pairs and calibration: loops, models that are calibrated by construction, and what
looks like calibration and is not."""

import math
import random

import pytest
import torch
from oracles import loops
from refusals import refused

from dsv2_ref.alignment.calibration import (
    Bin,
    calibration,
    calibration_error,
    pair_accuracy,
    pair_chances,
)

CHANCES = [0.0, 0.04, 0.1, 0.13, 0.55, 0.59, 0.51, 0.999, 1.0]
HAPPENED = [False, True, False, True, True, False, True, True, False]


def looped(chances, happened, bins):
    """Bin by bin, prediction by prediction."""
    found = []
    for i in range(bins):
        mine = [(c, h) for c, h in zip(chances, happened, strict=True)
                if i / bins <= c < (i + 1) / bins or (i == bins - 1 and c == 1)]
        if mine:
            found.append((sum(c for c, _ in mine) / len(mine),
                          sum(h for _, h in mine) / len(mine), len(mine)))
    return found


def both(chances=CHANCES, happened=HAPPENED):
    return torch.tensor(chances, dtype=torch.float64), torch.tensor(happened)


@pytest.mark.parametrize("bins", [1, 4, 10, 50])
def test_bins_and_their_error_are_the_loops(bins):
    found, expected = calibration(*both(), bins), looped(CHANCES, HAPPENED, bins)
    assert len(found) == len(expected) > 0
    for mine, its in zip(found, expected, strict=True):
        assert mine == pytest.approx(its, abs=1e-12) and mine.count == its[2]
    error = sum(n * abs(c - s) for c, s, n in expected) / len(CHANCES)
    assert calibration_error(found) == pytest.approx(error, abs=1e-12)


def test_the_error_weighs_by_how_many_are_in_a_bin():
    bins = [Bin(0.1, 0.1, 90), Bin(0.9, 0.4, 10)]
    assert calibration_error(bins) == pytest.approx(0.05)
    assert abs(calibration_error(bins) - 0.25) > 0.1                     # the plain mean of bins


def test_a_model_that_knows_the_chances_is_calibrated_and_one_that_exaggerates_is_not():
    draw = random.Random(0)
    r = [draw.gauss(0, 1.5) for _ in range(20_000)]
    won = [draw.random() < 1 / (1 + math.exp(-x)) for x in r]
    r = torch.tensor([x if w else -x for x, w in zip(r, won, strict=True)])      # better - worse
    errors = [calibration_error(calibration(*pair_chances(k * r, torch.zeros_like(r))))
              for k in (1, 3, 1 / 3)]
    assert errors[0] < 0.01 < 0.1 < min(errors[1:])
    accuracies = {pair_accuracy(k * r, torch.zeros_like(r)) for k in (1, 3, 1 / 3)}
    assert len(accuracies) == 1 and 0.7 < accuracies.pop() < 0.8         # none of it is seen there


def test_pairs_are_shown_in_both_orders():
    better, worse = loops.normal(1, 7), loops.normal(2, 7)
    chance, won = pair_chances(better + 40, worse + 40)                  # differences alone count
    for i in range(7):
        expected = 1 / (1 + math.exp(worse[i] - better[i]))
        assert abs(chance[i] - expected) < 1e-10 and abs(chance[7 + i] - (1 - expected)) < 1e-10
    assert won.tolist() == [True] * 7 + [False] * 7
    one_order = calibration(chance[:7], won[:7])
    assert all(b.share == 1 for b in one_order) and calibration_error(one_order) > 0.2


def test_a_tie_is_half_right_and_no_opinion_is_calibrated():
    tie = torch.zeros(6)
    assert pair_accuracy(tie, tie) == 0.5
    assert calibration(*pair_chances(tie, tie)) == [(0.5, 0.5, 12)]
    assert pair_accuracy(torch.tensor([1.0, 0, 2, 5]), torch.tensor([0.0, 1, 2, 4])) == 0.625


def test_refusals():
    refused(lambda: calibration(*both(), 0), "bins: 0")
    refused(lambda: calibration(torch.zeros(3), torch.zeros(2).bool()), "happened: shape (2,)")
    refused(lambda: calibration(torch.zeros(0), torch.zeros(0).bool()), "at least one")
    for wrong in (-0.1, 1.1, math.nan):
        chance = torch.tensor([wrong, 0.5])
        refused(lambda c=chance: calibration(c, torch.ones(2).bool()), "expected 0 to 1")

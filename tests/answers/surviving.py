# SPDX-License-Identifier: MIT
"""Answers to 23_surviving."""

import math
import statistics

import numpy as np
import torch


def usable(norm, recent, left_out):
    if not math.isfinite(norm):
        return False
    if len(recent) < 64 or left_out >= 3:
        return True
    return norm <= 10 * statistics.median(recent)


def by_numpy(norm, recent, left_out):
    large = len(recent) >= 64 and norm > 10 * np.median(recent)
    return np.isfinite(norm) and not (large and left_out < 3)


def by_tensor(norm, recent, left_out):
    norm = torch.tensor(norm)
    usual = torch.tensor(recent).sort().values[31:33].mean() if len(recent) == 64 else math.inf
    return norm.isfinite() & ((norm <= 10 * usual) | torch.tensor(left_out > 2))


RIGHT = {
    1: [379, 1129 - 750, len(range(751, 1130))],
    2: [84, 7e9 * 12 / 1e9, torch.tensor(84.0)],
    3: [lambda save, between: (2 * save * between) ** 0.5,
        lambda save, between: math.sqrt(2) * math.sqrt(save) * math.sqrt(between),
        lambda save, between: torch.tensor(2 * save * between, dtype=torch.float64).sqrt()],
    4: [usable, by_numpy, by_tensor],
}
WRONG = {
    1: [129, 380, 130, 1129, 250],
    2: [112, 28, 56, 84e9, "84"],
    3: [lambda save, between: math.sqrt(save * between), lambda save, between: between / 2,
        lambda save, between: 2 * save * between, lambda save, between: save,
        lambda save, between: math.sqrt(2 * save / between)],
    4: [lambda norm, recent, left_out: norm <= 10 * statistics.median(recent),     # from the start
        lambda norm, recent, left_out: usable(norm, recent, 0),                    # never believed
        lambda norm, recent, left_out: left_out >= 3 or usable(norm, recent, 0),   # NaN is, too
        lambda norm, recent, left_out: usable(norm, recent, left_out + 1),         # after two
        lambda norm, recent, left_out: norm <= 10 * statistics.mean(recent) or left_out >= 3,
        lambda norm, recent, left_out: True],
}

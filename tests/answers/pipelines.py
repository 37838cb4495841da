# SPDX-License-Identifier: MIT
"""Answers to 17_pipelines."""

from fractions import Fraction

import numpy as np
import torch


def forwards_first(p, m, r):
    return m if m < p - r else p - r


RIGHT = {
    1: [7 / 31, 0.2258, torch.tensor(7 / 31), float(Fraction(7, 31)), 1 - 24 / 31],
    2: [[5, 10], (5, 10), torch.tensor([5, 10]), np.array([5, 10])],
    3: [lambda p, m, r: min(m, p - r), forwards_first,
        lambda p, m, r: torch.tensor([m, p - r]).min()],
    4: [93, 93.0, 12 * 7 + 3 * (2 + 3 - 2), torch.tensor(93)],
}
WRONG = {
    1: [7 / 24, 8 / 32, 0.2, 7 / 32, 8 / 31, 22.58, "7/31"],
    2: [[5, 13], [10, 5], [5, 11], 5, [5, 2], [5, 9], "5, 10"],
    3: [lambda p, m, r: p - r, lambda p, m, r: m, lambda p, m, r: min(m, p),
        lambda p, m, r: min(m, p - 1 - r), lambda p, m, r: min(m, r + 1),
        lambda p, m, r: p - 1 - r, lambda p, r: p - r, 4],
    4: [84, 105, 87, 96, 12 * 7 + 3 * 7, 93.5, None],
}

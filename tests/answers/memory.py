# SPDX-License-Identifier: MIT
"""Answers to 24_memory."""

import math

import torch

from dsv2_ref.kernels.eight_bit_moments import decode


def by_package(code, largest):
    return decode(torch.tensor([code]), torch.tensor([largest]), 255, 7)[0]


RIGHT = {
    1: [2**-7 / 2e-4, 39, torch.tensor(39.0625)],
    2: [7 * (2 + 2 + 2 + 8 / 256), 42.2, 42.22],
    3: [1272, 18 * 4 + (24 - 18) * 200, 1272.0],
    4: [lambda x, gap: x / gap - math.floor(x / gap), lambda x, gap: x % gap / gap,
        lambda x, gap: (torch.tensor(x, dtype=torch.float64) / gap).frac()],
    5: [lambda code, largest: largest * 10 ** (7 * (code - 255) / 254) if code else 0.0,
        lambda code, largest: 0.0 if code == 0 else largest * math.exp(
            (code - 255) * 7 * math.log(10) / 254), by_package],
}
WRONG = {
    1: [78.125, 2**-8 / 2e-4, 5000, 1, 2e-4],
    2: [112, 14, 7 * (10 + 8 / 256), 28, 42.2e9],
    3: [1200, 18 * 200 + 6 * 4, 4800, 96, 1272_000],
    4: [lambda x, gap: 0.5, lambda x, gap: x / gap, lambda x, gap: x % gap,
        lambda x, gap: 1 - (x / gap - math.floor(x / gap)), lambda x, gap: round(x / gap)],
    5: [lambda code, largest: largest * code / 255,                            # linear
        lambda code, largest: largest * 10 ** (7 * (code - 255) / 255) if code else 0.0,
        lambda code, largest: largest * 10 ** (7 * (code - 255) / 254),        # 0 is not 0
        lambda code, largest: 10 ** (7 * (code - 255) / 254) if code else 0.0,
        lambda code, largest: largest * math.exp(7 * (code - 255) / 254) if code else 0.0],
}

# SPDX-License-Identifier: MIT
"""Answers to 12_fp8_weights."""

import math

import torch

RIGHT = {
    1: [5 * 40, 200.0, math.ceil(576 / 128) * (5120 // 128), torch.tensor(200)],
    2: [2**-9, 1 / 512, 0.001953125, torch.tensor(2.0**-9), 0.00195],
    3: [3 * (1536 * 5120 + 4 * 12 * 40), 23_598_720, torch.tensor(23_598_720)],
    4: [lambda w: w.abs().max().item() / 448,
        lambda w: w.abs().max() / 448,
        lambda w: torch.maximum(w.max(), -w.min()) / 448,
        lambda w: max(abs(v) for row in w.tolist() for v in row) / 448],
}
WRONG = {
    1: [160, 180, 4.5 * 40, 225, 576 * 40, "200"],
    2: [2**-6, 2**-10, 448, 0.0, 2**-9 / 448, 2**-7],
    3: [23_592_960, 47_185_920, 3 * (1536 * 5120 + 480), 7_866_240, 23_598_721],
    4: [lambda w: w.max().item() / 448,
        lambda w: w.abs().max().item() / 127,
        lambda w: 448 / w.abs().max().item(),
        lambda w: w.abs().mean().item() / 448,
        lambda w: w.abs().amax(-1) / 448,
        lambda w: w.abs().max().item() / 256],
}

# SPDX-License-Identifier: MIT
"""Answers to 15_lite_on_a_gpu."""

import math

import torch

PER_TOKEN = 6 * 2_451_435_008 + 3 * 2048 * 2 * 27 * 16 * (128 + 64 + 128)


def nearest(tokens, batch, sequence):
    whole, rest = divmod(tokens, batch * sequence)
    return max(int(whole) + (2 * rest > batch * sequence), 1)


def left(token_bytes):
    return int((141e9 - 94.73e9) / (4096 * token_bytes))


RIGHT = {
    1: [15.706484224 * (2 + 8 / 256), 31.9, torch.tensor(31.904)],
    2: [12_000 * PER_TOKEN / 989e12, 0.199, torch.tensor(0.1989)],
    3: [36, left(26 * 4096 + 2 * 102_000), torch.tensor(36.0)],
    4: [lambda tokens, batch, sequence: max(1, round(tokens / (batch * sequence))), nearest,
        lambda tokens, batch, sequence: torch.tensor(tokens / batch / sequence).round().clamp(1)],
}
WRONG = {
    1: [15.7 * 8, 15.7 * 2, 94.7, 15.7, 31.9e9],
    2: [12_000 * 6 * 2_451_435_008 / 989e12, 12_000 * 2 * 2_451_435_008 / 989e12, 19.9, 0.3, 5],
    3: [left(26 * 4096 + 102_000), 37, 1, 35, 84],
    4: [lambda t, b, s: int(t / (b * s)), lambda t, b, s: round(t / b),
        lambda t, b, s: round(t / (b * s)), lambda t, b, s: math.ceil(t / (b * s)),
        lambda t, b, s: t / (b * s)],
}

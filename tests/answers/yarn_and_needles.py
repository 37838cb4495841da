# SPDX-License-Identifier: MIT
"""Answers to 18_yarn_and_needles."""

import math

import torch


def piece_by_piece(length, places):
    read, at = 0, 0
    for place in sorted(places):
        read, at = read + place - at, place
        read += length - place
    return read


RIGHT = {
    1: [9, 9.0, torch.tensor(9), sum(2 * math.pi * 1e4 ** (i / 32) > 4096 for i in range(32))],
    2: [32, 32.0, 131_072 / 4096, torch.tensor(32)],
    3: [(0.0707 * math.log(16) + 1) ** 2, 1.4305, (0.1 * 0.707 * math.log(16) + 1) ** 2,
        torch.tensor(1.4305)],
    4: [lambda length, places: max(places) + sum(length - place for place in places),
        piece_by_piece,
        lambda n, p: torch.tensor(p).max() + (n - torch.tensor(p)).sum()],
}
WRONG = {
    1: [8, 10, 23, 32, 21, 11, "9"],
    2: [40, 8, 128, 1 / 32, 16, 31],
    3: [0.0707 * math.log(16) + 1, 1.0, 1.3156, (0.0707 * math.log2(16) + 1) ** 2,
        (0.707 * math.log(16) + 1) ** 2, 16, None],
    4: [lambda n, p: len(p) * n, lambda n, p: sum(n - x for x in p),
        lambda n, p: min(p) + sum(n - x for x in p), lambda n, p: n + max(p),
        lambda n, p: sum(p) + sum(n - x for x in p),
        lambda n, p: p[0] + sum(n - x for x in p), lambda n: n],
}

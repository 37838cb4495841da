# SPDX-License-Identifier: MIT
"""Answers to 00_tour."""

import math

import torch


def by_filling(memory, tokens, n_layers, row):
    one, n = tokens * n_layers * row, 0
    while memory >= one:
        memory, n = memory - one, n + 1
    return n


RIGHT = {
    1: [27 * (512 + 64) * 2, 31_104, 31_104.0, torch.tensor(31_104)],
    2: [20_851_512_320 / 235_741_434_880, 21 / 236, 0.088, torch.tensor(0.0884)],
    3: [lambda memory, tokens, n_layers, row: memory // (tokens * n_layers * row),
        lambda memory, tokens, n_layers, row: math.floor(memory / tokens / n_layers / row),
        lambda memory, tokens, n_layers, row: int(memory / (tokens * n_layers * row)),
        by_filling],
}
WRONG = {
    1: [27 * (512 + 64), 27 * 512 * 2, 60 * (512 + 64) * 2, 2 * (512 + 64), 27 * (512 + 64) * 4,
        "31104", 31.104, None],
    2: [8.8, 6 / 160, 21.38 / 235.74, 0.08, 235.7 / 20.85, 1 - 0.0884, True],
    3: [lambda memory, tokens, n_layers, row: memory / (tokens * n_layers * row),
        lambda memory, tokens, n_layers, row: round(memory / (tokens * n_layers * row)),
        lambda memory, tokens, n_layers, row: math.ceil(memory / (tokens * n_layers * row)),
        lambda memory, tokens, n_layers, row: memory // (tokens * row),
        lambda memory, tokens, n_layers, row: memory // (n_layers * row),
        lambda memory, tokens, n_layers, row: (memory - 1) // (tokens * n_layers * row),
        lambda memory, tokens, n_layers, row: memory // (2 * tokens * n_layers * row), 9],
}

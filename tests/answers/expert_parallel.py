# SPDX-License-Identifier: MIT
"""Answers to 16_expert_parallel."""

import collections

import numpy as np
import torch


def by_sets(indices, held, n_ranks):
    reached = [{e // held for e in row} for row in indices]
    return [sum(rank in ranks for ranks in reached) for rank in range(n_ranks)]


def by_counter(indices, held, n_ranks):
    count = collections.Counter(rank for row in indices for rank in {e // held for e in row})
    return tuple(count[rank] for rank in range(n_ranks))


def in_torch(indices, held, n_ranks):
    there = torch.zeros(len(indices), n_ranks, dtype=torch.int64)
    for token, row in enumerate(indices):
        there[token, torch.tensor(row) // held] = 1
    return there.sum(0)


def by_case(delay, forward, backward):
    first = forward if forward < delay else delay
    return first + (backward if backward < delay else delay)


ROW = 2 * 5120 + 4 * 6 + 4 * 6

RIGHT = {
    1: [[3, 4], (3, 4), torch.tensor([3, 4])],
    2: [3 * ROW * 4096 * 59, 7.458e9, 3 * (10 * 1024 + 48) * 4 * 1024 * 59.0,
        np.int64(3 * ROW) * 4096 * 59],
    3: [by_sets, by_counter, in_torch],
    4: [lambda delay, forward, backward: min(delay, forward) + min(delay, backward), by_case,
        lambda d, f, b: torch.tensor([f, b]).double().clamp(max=d).sum()],
    5: [8, 8.0, torch.tensor(8), 4096 // 512],
}
WRONG = {
    1: [[6, 9], [4, 3], [3, 5], 7, [3], "[3, 4]", [5, 5]],
    2: [6 * ROW * 4096 * 59, 3 * 2 * 5120 * 4096 * 59, 3 * ROW * 4096 * 60, 3 * ROW * 4096,
        ROW * 4096 * 59, 7.5, 3 * (4 * 5120 + 48) * 4096 * 59, None],
    3: [lambda i, h, n: [sum(e // h == r for row in i for e in row) for r in range(n)],
        lambda i, h, n: [sum(any(e % h == r for e in row) for row in i) for r in range(n)],
        lambda i, h, n: sum(len({e // h for e in row}) for row in i),
        lambda i, h, n: [sum(any(e // n == r for e in row) for row in i) for r in range(n)],
        lambda i, h, n: [c for c in by_sets(i, h, n) if c],
        lambda i, h, n: [sum(all(e // h == r for e in row) for row in i) for r in range(n)], 3],
    4: [lambda d, f, b: f + b, lambda d, f, b: 2 * d, lambda d, f, b: min(d, f + b),
        lambda d, f, b: min(2 * d, f + b), lambda d, f, b: max(d, f) + max(d, b),
        lambda d, f, b: 5 * d, lambda d, f: min(d, f)],
    5: [1, 1 / 8, 64, 2, "8", 4096, True],
}

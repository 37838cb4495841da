# SPDX-License-Identifier: MIT
"""Answers to 13_kernels."""

import math

import torch

EMPTY = -math.inf


def with_a_branch(a, b):
    m = max(a[0], b[0])
    shrink = [0.0 if p[0] == EMPTY else 2.0 ** (p[0] - m) for p in (a, b)]
    return [m, *(shrink[0] * a[i] + shrink[1] * b[i] for i in (1, 2))]


def early(a, b):
    if a[1] == 0:
        return b
    if b[1] == 0:
        return a
    (n, k, x), (m, l, y) = sorted((a, b))
    f = math.exp2(n - m)
    return m, f * k + l, f * x + y


def with_tensors(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    m = torch.maximum(a[0], b[0])
    top = torch.where(m == EMPTY, 0.0, m)
    return torch.cat((m[None], torch.exp2(a[0] - top) * a[1:] + torch.exp2(b[0] - top) * b[1:]))


def has_nan(a, b):
    """Right but for two empty pieces: -inf - (-inf) is NaN, and so is all that follows."""
    m = max(a[0], b[0])
    x, y = (2.0 ** (p[0] - m) for p in (a, b))
    return [m, x * a[1] + y * b[1], x * a[2] + y * b[2]]


def swapped(a, b):
    m, x, y = max(a[0], b[0]), *(2.0 ** (max(min(p[0], 1e3), -1e3)) for p in (a, b))
    return [m, y * a[1] + x * b[1], y * a[2] + x * b[2]]


def overflows(a, b):
    x, y = (2.0 ** p[0] if p[0] < 1000 else math.inf for p in (a, b))
    m = max(a[0], b[0])
    f = torch.exp2(torch.tensor(-m, dtype=torch.float32)).item()
    return [m, (x * a[1] + y * b[1]) * f, (x * a[2] + y * b[2]) * f]


RIGHT = {
    1: [with_a_branch, early, with_tensors],
    2: [56, 56.0, sum(16 - 2 * (i + 1) for i in range(8)), torch.tensor(56)],
    3: [131072 * 1152 / 4.8e12 * 1e6, 31.457, 31.5, torch.tensor(31.46)],
    4: [989 / 4.8 * 436 / 2176, 41.3, 41, torch.tensor(41.28)],
}
WRONG = {
    1: [has_nan, swapped, overflows,
        lambda a, b: [max(a[0], b[0]), a[1] + b[1], a[2] + b[2]],
        lambda a, b: [b[0], a[1] * 2.0 ** min(a[0] - b[0], 99) + b[1], b[2]],
        lambda a, b: with_a_branch(a, b)[1:], 4],
    2: [72, 64, 48, 28, 128, 100],
    3: [0.0315, 31457, 11.9, 4.61, 503, 72.2],
    4: [109.1, 206, 16, 128, 44, 40],
}

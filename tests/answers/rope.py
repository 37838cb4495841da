# SPDX-License-Identifier: MIT
"""Answers to 03_rope."""

import math

import torch

from dsv2_ref.attention.rope import rope_frequencies


def by_index(W, d_r):
    order = torch.arange(d_r).view(2, d_r // 2).T.flatten()
    return W.view(-1, d_r, W.shape[1])[:, order].reshape(W.shape)


def by_steps(W, d_r):
    made, heads = torch.empty_like(W).unflatten(0, (-1, d_r)), W.unflatten(0, (-1, d_r))
    made[:, 0::2], made[:, 1::2] = heads[:, : d_r // 2], heads[:, d_r // 2 :]
    return made.flatten(0, 1)


RIGHT = {
    1: [math.cos(0.1 * (70 - 30)), math.cos(7) * math.cos(3) + math.sin(7) * math.sin(3), -0.65,
        torch.tensor(4.0).cos()],
    2: [18, torch.tensor(18), int((rope_frequencies(64) * 1000 / (2 * math.pi) >= 1).sum())],
    3: [[True, False, True, False], (True, False, True, False),
        torch.tensor([True, False, True, False])],
    4: [lambda W, d_r: W.unflatten(0, (-1, 2, d_r // 2)).transpose(1, 2).flatten(0, 2),
        by_index, by_steps],
}
WRONG = {
    1: [math.cos(10), math.sin(4), 1.0, -math.cos(4), math.cos(40), math.cos(math.radians(4))],
    2: [17, 14, 23, 32, 16],
    3: [[True, True, False, False], [True, False, False, False], [True, False, True, True],
        [True] * 4, [1, 0, 1, 0], True],
    4: [lambda W, d_r: W,
        lambda W, d_r: W.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1),
        lambda W, d_r: W.unflatten(0, (-1, d_r // 2, 2)).transpose(1, 2).flatten(0, 2),
        lambda W, d_r: W.unflatten(0, (-1, 2, d_r // 2)).transpose(1, 2).flatten(1, 2),
        lambda W, d_r: W.unflatten(0, (-1, 2, d_r // 2)).flip(1).transpose(1, 2).flatten(0, 2),
        lambda W, d_r: W[:d_r]],
}

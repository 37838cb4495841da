# SPDX-License-Identifier: MIT
"""Answers to 01_attention."""

import torch
import torch.nn.functional as F

from dsv2_ref.attention.mha import attend


def head(q, k, v, scale=None, diagonal=0):
    scores = q @ k.T * (q.shape[1] ** -0.5 if scale is None else scale)
    hidden = ~torch.ones(len(q), len(q)).tril(diagonal).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def by_rows(q, k, v):
    return torch.stack([(q[t] @ k[: t + 1].T / q.shape[1] ** 0.5).softmax(0) @ v[: t + 1]
                        for t in range(len(q))])


def masked_after(q, k, v):
    """Weights of later tokens are set to zero after the softmax: they no longer sum to one."""
    return (q @ k.T / q.shape[1] ** 0.5).softmax(-1).tril() @ v


RIGHT = {
    1: [3_932_160 * 131_072 / 2**30, 480, torch.tensor(480.0)],
    2: [[False, True, True, True], (False, True, True, True), torch.arange(4) >= 1],
    3: [2, 2.0, torch.tensor(2)],
    4: [head, by_rows,
        lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None],
                                                       is_causal=True)[0],
        lambda q, k, v: attend(q[None, :, None], k[None, :, None], v[None, :, None],
                               scale=q.shape[1] ** -0.5)[0, :, 0]],
}
WRONG = {
    1: [240.0, 8.0, 515.396, 120, 3_932_160 * 131_072, "480"],
    2: [[False, True, False, False], [True, True, False, False], [True] * 4,
        [False, False, True, True], 3, [0, 1, 1, 1]],
    3: [2.25, 3, 4, 1, 16],
    4: [lambda q, k, v: (q @ k.T / q.shape[1] ** 0.5).softmax(-1) @ v,
        lambda q, k, v: head(q, k, v, scale=1.0),
        lambda q, k, v: head(q, k, v, scale=1 / q.shape[1]),
        lambda q, k, v: head(q, k, v, scale=v.shape[1] ** -0.5),
        lambda q, k, v: head(q, k, v, diagonal=-1),
        lambda q, k, v: head(k, q, v),
        masked_after, lambda q, k, v: head(q, k, v).T, 0],
}

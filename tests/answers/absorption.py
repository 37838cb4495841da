# SPDX-License-Identifier: MIT
"""Answers to 04_absorption."""

import numpy as np
import torch
import torch.nn.functional as F


def by_heads(q, c, W_UK):
    return torch.stack([c @ (W_UK[h].T @ q[h]) for h in range(len(q))])


def by_stars(q, c, W_UK):
    return ((q[:, :, None] * W_UK).sum(1)[:, None] * c).sum(-1)


def repeated(q, c, W_UK):
    return torch.bmm(q[:, None] @ W_UK, c.T.expand(len(q), -1, -1))[:, 0]


def keys_of_a_head(q, c, W_UK):
    return torch.stack([F.linear(c, W_UK[h]) @ q[h] for h in range(len(q))])


def keys_one_by_one(q, c, W_UK):
    return torch.stack([torch.stack([(W_UK[h] @ row) @ q[h] for row in c]) for h in range(len(q))])


def keys_with_einsum(q, c, W_UK):
    return torch.einsum("hsd,hd->hs", torch.einsum("hdc,sc->hsd", W_UK, c), q)


def keys_from_the_left(q, c, W_UK):
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum("hdc,sc,hd->hs", W_UK, c, q)


def keys_by_stars(q, c, W_UK):
    keys = (W_UK[:, None] * c[None, :, None]).sum(-1)
    return (keys * q[:, None]).sum(-1)


def unseen(q, c, W_UK):
    return np.einsum("hd,hdc,sc->hs", *(x.numpy() for x in (q, W_UK, c)))


RIGHT = {
    1: [lambda q, c, W_UK: torch.einsum("hd,hdc->hc", q, W_UK) @ c.T,
        lambda q, c, W_UK: (q[:, None] @ W_UK)[:, 0] @ c.T,
        lambda q, c, W_UK: torch.einsum("hd,hdc,sc->hs", q, W_UK, c),
        lambda q, c, W_UK: torch.vmap(lambda one, W: c @ (one @ W))(q, W_UK),
        by_heads, by_stars, repeated],
    2: [1536 * 512 / (1536 + 512), 384, torch.tensor(384)],
    3: [170, 170.0, max(T for T in range(1, 500) if T < 512 * 256 / (1024 - 256))],
    4: [[False, False, False, True, False], (False, False, False, True, False),
        torch.tensor([0, 0, 0, 1, 0]) == 1],
}
WRONG = {
    1: [keys_with_einsum, keys_from_the_left, keys_by_stars, keys_of_a_head, keys_one_by_one,
        unseen,
        lambda q, c, W_UK: q @ W_UK[0] @ c.T,
        lambda q, c, W_UK: (torch.einsum("hd,hdc->hc", q, W_UK) @ c.T).T,
        lambda q, c, W_UK: torch.einsum("hd,hdc->hc", q, W_UK) @ c.T / q.shape[1] ** 0.5,
        lambda q, c, W_UK: torch.softmax(torch.einsum("hd,hdc->hc", q, W_UK) @ c.T, -1), 3],
    2: [128, 512, 1536 * 512, 1536 * 512 / 128, "384"],
    3: [171, 512, 170.67, 10**9, 169, 186],
    4: [True, [False, False, False, True, True], [True, False, False, True, False],
        [False] * 5, [False, False, False, True], [True, True, True, True, False], ["d_c"],
        [0, 0, 0, 1, 0]],
}

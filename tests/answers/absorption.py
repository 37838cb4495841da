# SPDX-License-Identifier: MIT
"""Answers to 04_absorption."""

import torch


def by_heads(q, c, W_UK):
    return torch.stack([c @ (W_UK[h].T @ q[h]) for h in range(len(q))])


def made_with_einsum(q, c, W_UK):
    return torch.einsum("hsd,hd->hs", torch.einsum("hdc,sc->hsd", W_UK, c), q)


def made_by_hand(q, c, W_UK):
    keys = (W_UK[:, None] * c[None, :, None]).sum(-1)
    return (keys * q[:, None]).sum(-1)


RIGHT = {
    1: [lambda q, c, W_UK: torch.einsum("hd,hdc->hc", q, W_UK) @ c.T,
        lambda q, c, W_UK: (q[:, None] @ W_UK)[:, 0] @ c.T,
        by_heads],
    2: [1536 * 512 / (1536 + 512), 384, torch.tensor(384)],
    3: [170, 170.0, max(T for T in range(1, 500) if T < 512 * 256 / (1024 - 256))],
    4: [True, 1 == 1, torch.tensor(True)],
}
WRONG = {
    1: [made_with_einsum, made_by_hand,
        lambda q, c, W_UK: q @ W_UK[0] @ c.T,
        lambda q, c, W_UK: (torch.einsum("hd,hdc->hc", q, W_UK) @ c.T).T,
        lambda q, c, W_UK: torch.einsum("hd,hdc->hc", q, W_UK) @ c.T / q.shape[1] ** 0.5,
        lambda q, c, W_UK: torch.softmax(torch.einsum("hd,hdc->hc", q, W_UK) @ c.T, -1), 3],
    2: [128, 512, 1536 * 512, 1536 * 512 / 128, "384"],
    3: [171, 512, 170.67, 10**9, 169],
    4: [False, 163, "True", None, 1],
}

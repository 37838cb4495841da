# SPDX-License-Identifier: MIT
"""Answers to 06_moe."""

import math

import torch
import torch.nn.functional as F

from dsv2_ref.moe.experts import experts_padded


def scattered(s, top_k):
    top = s.topk(top_k)
    return torch.zeros_like(s).scatter(1, top.indices, top.values)


def above_a_threshold(s, top_k):
    return torch.where(s >= s.topk(top_k).values[:, -1:], s, 0)


def row_by_row(s, top_k):
    rows = []
    for row in s.tolist():
        best = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
        rows.append([row[i] if i in best else 0.0 for i in range(len(row))])
    return rows


def looped(x, indices, gates, W_gate, W_up, W_down):
    y = torch.zeros_like(x)
    for n in range(len(x)):
        for i, gate in zip(indices[n], gates[n], strict=True):
            hidden = F.silu(W_gate[i] @ x[n]) * (W_up[i] @ x[n])
            y[n] += gate * (W_down[i] @ hidden)
    return y


def gathered(x, indices, gates, W_gate, W_up, W_down):
    """All slots at once: each with its own matrices."""
    hidden = (F.silu(torch.einsum("nkwd,nd->nkw", W_gate[indices], x))
              * torch.einsum("nkwd,nd->nkw", W_up[indices], x))
    return torch.einsum("nk,nkdw,nkw->nd", gates, W_down[indices], hidden)


def all_experts(x, indices, gates, W_gate, W_up, W_down):
    """Every expert on every token, times gates that are mostly 0."""
    weight = torch.zeros(len(x), len(W_gate), dtype=x.dtype).scatter(1, indices, gates)
    return sum(weight[:, i, None] * ((F.silu(x @ W_gate[i].T) * (x @ W_up[i].T)) @ W_down[i].T)
               for i in range(len(W_gate)))


RIGHT = {
    1: [math.comb(64, 6), 74_974_368, float(math.comb(64, 6)), torch.tensor(74_974_368)],
    2: [6 / 64, 0.09375, 0.094, torch.tensor(6 / 64)],
    3: [3 * 5120 * 1536 * 8, 188_743_680, torch.tensor(188_743_680)],
    4: [scattered, above_a_threshold, row_by_row],
    5: [looped, gathered, all_experts, experts_padded],
}
WRONG = {
    1: [64 * 6, 64**6, math.perm(64, 6), math.comb(160, 6), "74974368", math.comb(64, 6) + 1],
    2: [1.0, 16 * 6 / 64, 6 / 160, 16 * 6 / 160, 0.6, 1 / 64, None],
    3: [3 * 5120 * 1536 * 6, 3 * 5120 * 1536 * 162, 5120 * 1536 * 8, 3 * 5120 * 1536 * 2, 8,
        3 * 5120 * 1536 * 8 + 5120],
    4: [lambda s, k: s, lambda s, k: s.topk(k).values,
        lambda s, k: scattered(s, k) / scattered(s, k).sum(1, keepdim=True),
        lambda s, k: (scattered(s, k) > 0).double(),
        lambda s, k: torch.zeros_like(s).scatter(1, *reversed(s.topk(k, largest=False))),
        lambda s, k: 16 * scattered(s, k), lambda s, k: scattered(s, 2)],
    5: [lambda x, i, g, *W: looped(x, i, torch.ones_like(g), *W),
        lambda *given: looped(*given) / 2,
        lambda x, *rest: x,
        lambda x, *rest: x + looped(x, *rest),
        lambda x, i, g, a, b, c: looped(x, i, g, b, a, c),
        lambda x, i, g, a, b, c: looped(x, i[:, :1], g[:, :1], a, b, c),
        lambda x, i, g, a, b, c: looped(x, i.flip(1), g, a, b, c)],
}

# SPDX-License-Identifier: MIT
"""Answers to 14_pretraining."""

import math

import torch
from torch import nn


def clip(gradients, most, up=False):
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    return [g * (most / norm if up else min(1.0, most / norm)) for g in gradients]


def by_torch(gradients, most):
    weights = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for W, g in zip(weights, gradients, strict=True):
        W.grad = g.clone()
    nn.utils.clip_grad_norm_(weights, most)
    return [W.grad for W in weights]


def where_longer(gradients, most):
    norm = sum(g.pow(2).sum() for g in gradients) ** 0.5
    return tuple(g / norm * most if norm > most else g for g in gradients)


def adamw(w, g, m, v, t, rate, correct=True, decay=0.1, coupled=False, root_first=False):
    if coupled:
        g, decay = g + 0.1 * w, 0.0
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    m_hat, v_hat = (m / (1 - 0.9**t), v / (1 - 0.95**t)) if correct else (m, v)
    below = math.sqrt(v_hat) + 1e-8 if not root_first else v_hat + 1e-8
    return w * (1 - rate * decay) - rate * m_hat / below, m, v


def adamw_by_torch(w, g, m, v, t, rate):
    W = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = torch.optim.AdamW([W], lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.state[W] = {"step": torch.tensor(t - 1.0), "exp_avg": torch.tensor(m).double(),
                          "exp_avg_sq": torch.tensor(v).double()}
    W.grad = torch.tensor(g, dtype=torch.float64)
    optimizer.step()
    s = optimizer.state[W]
    return [W.detach(), s["exp_avg"], s["exp_avg_sq"]]


RIGHT = {
    1: [0.316 * 2.4e-4, 7.584e-5, torch.tensor(0.316 * 2.4e-4)],
    2: [39, (10_340 - 1 - 100) // 256, torch.tensor(39)],
    3: [math.log(102_400), 11.54, -torch.log(torch.tensor(1 / 102_400))],
    4: [clip, by_torch, where_longer],
    5: [adamw, adamw_by_torch, lambda *given: torch.tensor(adamw(*given), dtype=torch.float64)],
}
WRONG = {
    1: [2.4e-4, 0.316**2 * 2.4e-4, 0.316, 0.7 * 2.4e-4, "7.6e-5"],
    2: [40, 10_340 // 256 + 1, 39.99, 10_240, 41],
    3: [math.log2(102_400), 1 / 102_400, 102_400, 0.0, -math.log(102_400)],
    4: [lambda g, most: clip(g, most, up=True),                                # scales up as well
        lambda g, most: [x * min(1.0, most / x.norm().item()) for x in g],     # each by itself
        lambda g, most: [x.clamp(-most, most) for x in g], lambda g, most: g,
        lambda g, most: clip(g, most)[:1]],
    5: [lambda *given: adamw(*given, correct=False),
        lambda *given: adamw(*given, decay=0.0),
        lambda *given: adamw(*given, coupled=True),                            # Adam with L2
        lambda *given: adamw(*given, root_first=True),                         # no root
        lambda *given: adamw(*given)[:1]],
}

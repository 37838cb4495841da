# SPDX-License-Identifier: MIT
"""Answers to 09_dropping."""

import torch


def share(load, capacity):
    budget = int(capacity * sum(load) / len(load))
    return sum(max(0, n - budget) for n in load) / sum(load)


def share_with_tensors(load, capacity):
    load = torch.tensor(load, dtype=torch.float64)
    budget = torch.floor(capacity * load.mean())
    return (load - budget).clamp(min=0).sum() / load.sum()


def one_minus_kept(load, capacity):
    budget = capacity * sum(load) // len(load)
    return 1 - sum(min(n, budget) for n in load) / sum(load)


def keep(affinity, protected, budget):
    places = range(len(affinity))
    ranked = sorted(places, key=lambda i: (not protected[i], -affinity[i]))
    return [protected[i] or i in ranked[:budget] for i in places]


def keep_with_tensors(affinity, protected, budget):
    protected = torch.tensor(protected, dtype=torch.bool)
    order = torch.tensor(affinity).argsort(descending=True, stable=True)
    order = torch.cat([order[protected[order]], order[~protected[order]]])
    kept = torch.zeros(len(affinity), dtype=torch.bool)
    kept[order[:budget]] = True
    return kept | protected


def keep_by_counting(affinity, protected, budget):
    """A slot stays if fewer than `budget` others go before it."""
    keys = [(not p, -a, i) for i, (a, p) in enumerate(zip(affinity, protected, strict=True))]
    return tuple(p or sum(other < key for other in keys) < budget
                 for key, p in zip(keys, protected, strict=True))


RIGHT = {
    1: [2 * 4096 * 6 // 8, 6144.0, torch.tensor(6144)],
    2: [[0.25, 0.875], (0.25, 7 / 8), torch.tensor([0.25, 0.875])],
    3: [share, share_with_tensors, one_minus_kept],
    4: [keep, keep_with_tensors, keep_by_counting],
}
WRONG = {
    1: [2 * 4096 // 8, 2 * 4096 * 6, 4096 * 6 // 8, 6145, "6144", None],
    2: [[0.75, 0.875], [0.25, 0.125], [0.75, 0.125], [0.875, 0.25], [0.25, 1.0], 0.25],
    3: [lambda load, c: sum(max(0, n - c * sum(load) / len(load)) for n in load) / sum(load),
        lambda load, c: max(load) / sum(load) - c / len(load),
        lambda load, c: 1 - share(load, c),
        lambda load, c: share(load, c) * sum(load),
        lambda load, c: sum(n - int(c * sum(load) / len(load)) for n in load) / sum(load),
        lambda load, c: share(load, 1.0)],
    4: [lambda a, p, b: [i in sorted(range(len(a)), key=lambda i: -a[i])[:b]
                         for i in range(len(a))],
        lambda a, p, b: keep([-x for x in a], p, b),
        lambda a, p, b: [q or k for q, k in zip(p, keep(a, [False] * len(a), b), strict=True)],
        lambda a, p, b: [i in sorted(range(len(a)), key=lambda i: (not p[i], -a[i]))[:b]
                         for i in range(len(a))],
        lambda a, p, b: [not k for k in keep(a, p, b)],
        lambda a, p, b: sorted(a, reverse=True)[:b],
        lambda a, p, b: [q or x >= sorted(a, reverse=True)[min(b, len(a)) - 1] if a else False
                         for x, q in zip(a, p, strict=True)]],
}

# SPDX-License-Identifier: MIT
"""Answers to 07_routing."""

import math

import numpy as np
import torch


def masked(s, top_k, n_devices, max_devices, score=lambda groups: groups.amax(1),
           fill=-torch.inf):
    groups = s.view(n_devices, -1)
    keep = torch.zeros(n_devices, dtype=torch.bool)
    keep[score(groups).topk(max_devices).indices] = True
    return groups.masked_fill(~keep[:, None], fill).flatten().topk(top_k).indices


def in_plain_python(s, top_k, n_devices, max_devices):
    values, size = s.tolist(), len(s) // n_devices
    best = [max(values[d * size:(d + 1) * size]) for d in range(n_devices)]
    devices = sorted(range(n_devices), key=lambda d: -best[d])[:max_devices]
    reach = [i for i in range(len(values)) if i // size in devices]
    return tuple(sorted(reach, key=lambda i: -values[i])[:top_k])


def by_sets(indices, n_routed, n_devices):
    return torch.tensor([len(set(row)) for row in (indices // (n_routed // n_devices)).tolist()])


def by_comparing(indices, n_routed, n_devices):
    device = indices // (n_routed // n_devices)
    return (device[:, :, None] == torch.arange(n_devices)).any(1).sum(1)


REACHED = 8 * (1 - math.comb(56, 6) / math.comb(64, 6))
RIGHT = {
    1: [REACHED, 4.54, torch.tensor(REACHED)],
    2: [[1, 4, 0], (1, 4, 0), torch.tensor([1, 4, 0]), np.array([1, 4, 0])],
    3: [6, 6.0, torch.tensor(6)],
    4: [masked, lambda *given: masked(*given).tolist(), in_plain_python,
        lambda *given: masked(*given, fill=-1).numpy()],
    5: [by_sets, by_comparing, lambda *given: by_sets(*given).tolist()],
}
WRONG = {
    1: [6.0, 8.0, 4.46, 8 - REACHED, REACHED / 8, 0.75],
    2: [[1, 4, 2], [1, 2, 3], [0, 1, 4], [1, 4], 1, [0, 2]],
    3: [3, 5, 7, 8, 20],
    4: [lambda s, k, d, m: s.topk(k).indices,                                     # no limit
        lambda s, k, d, m: masked(s, k, d, m, lambda groups: groups.topk(2).values.sum(1)),
        lambda s, k, d, m: masked(s, k, d, m).sort().values,
        lambda s, k, d, m: masked(s, k, d, 1),
        lambda s, k, d, m: masked(s, k, d, m, lambda groups: groups.sum(1)),
        lambda s, k, d, m: s[masked(s, k, d, m)],                                 # affinities
        lambda s, k, d, m: [i for i in masked(s, k, d, m).tolist() if s[i] > 0]],
    5: [lambda i, e, d: torch.full((len(i),), i.shape[1]),
        lambda i, e, d: by_sets(i, e, e), lambda i, e, d: by_sets(i % d, d, d),
        lambda i, e, d: by_sets(i, e, d).sum(), lambda i, e, d: by_sets(i, e, d) - 1],
}

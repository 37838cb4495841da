# SPDX-License-Identifier: MIT
"""Answers to 10_model."""

import torch


def by_parts(d, w, n_shared, n_routed):
    expert = d * w + d * w + w * d
    router = torch.empty(n_routed, d, device="meta").numel()
    return sum(expert for _ in range(n_shared + n_routed)) + router


def in_steps(h, norm, f):
    x = norm(h)
    h = h.clone()
    h += f(x)
    return h


N = 20_851_512_320
EXPERT = 3 * 5120 * 1536
RIGHT = {
    1: [lambda d, w, s, r: 3 * d * w * (s + r) + r * d, by_parts,
        lambda d, w, n_shared, n_routed: d * (3 * w * (n_shared + n_routed) + n_routed)],
    2: [N + 2 * 59 * EXPERT, 23_635_481_600, torch.tensor(23_635_481_600)],
    3: [2 * 2_451_435_008 / (2 * 27 * 16 * (128 + 64 + 128)), 17_700, torch.tensor(17_733.0)],
    4: [lambda h, norm, f: h + f(norm(h)), lambda h, norm, f: torch.add(f(norm(h)), h), in_steps],
}
WRONG = {
    1: [lambda d, w, s, r: 3 * d * w * (s + r), lambda d, w, s, r: 3 * d * w * r + r * d,
        lambda d, w, s, r: 2 * d * w * (s + r) + r * d,
        lambda d, w, s, r: 3 * d * w * (s + r) + (s + r) * d,
        lambda d, w, s, r: 3 * d * w * (s + r) + r, 185_794_560],
    2: [N, N + 2 * 60 * EXPERT, N * 8 // 6, N + 59 * EXPERT, N + 2 * EXPERT, 23.6e9,
        N + 2 * 59 * EXPERT + 102_400 * 5120],
    3: [8500, 2_451_435_008 / (2 * 27 * 16 * 320), 5216, 2 * 2_451_435_008 / (27 * 16 * 320),
        478_800, "17700"],
    4: [lambda h, norm, f: norm(h) + f(norm(h)), lambda h, norm, f: h + f(h),
        lambda h, norm, f: norm(h + f(h)), lambda h, norm, f: f(norm(h)),
        lambda h, norm, f: h + norm(f(h))],
}

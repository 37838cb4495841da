# SPDX-License-Identifier: MIT
"""Answers to 08_balance."""

import torch


def by_device(indices, n_routed, n_devices, max_devices):
    device = indices // (n_routed // n_devices)
    tokens = [(device == d).any(-1).sum() for d in range(n_devices)]
    return torch.stack(tokens).double() * n_devices / (max_devices * len(indices))


def by_sets(indices, n_routed, n_devices, max_devices):
    heard = [0] * n_devices
    for row in indices.tolist():
        for device in {i // (n_routed // n_devices) for i in row}:
            heard[device] += 1
    return [n * n_devices / (max_devices * len(indices)) for n in heard]


def one_hot(indices, n_routed, n_devices, max_devices):
    device = indices // (n_routed // n_devices)
    reach = torch.nn.functional.one_hot(device, n_devices).amax(1)
    return reach.float().mean(0) * n_devices / max_devices


def by_slots(indices, n_routed, n_devices, max_devices):
    slots = torch.bincount(indices.flatten() // (n_routed // n_devices), minlength=n_devices)
    return slots.double() * n_devices / (max_devices * len(indices))


RIGHT = {
    1: [[160 / 6, 8.0, 8 / 3], (26.67, 8, 2.667), torch.tensor([160 / 6, 8, 8 / 3])],
    2: [["expert", "communication", "device"], ("expert", "communication", "device"),
        ["Expert", " communication", "device"]],
    3: [[2.0, 1.0], (2, 1), torch.tensor([2, 1])],
    4: [by_device, by_sets, one_hot],
}
WRONG = {
    1: [[6.0, 8.0, 8 / 3], [160 / 6, 1.0, 8 / 3], [160 / 6, 8.0, 8.0], [160 / 6, 160 / 6, 8 / 3],
        [160 / 6, 160.0, 8 / 3], [160 / 6, 8.0], 160 / 6],
    2: [["expert", "device", "communication"], ["device"] * 3, "expert",
        ["communication", "expert", "device"], ["expert", "communication", "communication"]],
    3: [[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [4.0, 1.0], 2.0],
    4: [by_slots, lambda i, n, d, m: by_device(i, n, d, d),
        lambda i, n, d, m: by_device(i, n, d, m) * len(i),
        lambda i, n, d, m: by_device(i, n, n, m),
        lambda i, n, d, m: by_device(i, n, d, m) * m / d,
        lambda i, n, d, m: by_device(i % d, d, d, m)],
}

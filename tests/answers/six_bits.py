# SPDX-License-Identifier: MIT
"""Answers to 11_six_bits."""

import torch


def scale_by_rows(x):
    flat = x.reshape(-1, x.shape[-1])
    return torch.stack([max(abs(row)) / 31.5 for row in flat]).reshape(*x.shape[:-1], 1)


RIGHT = {
    1: [60 * (432 + 16), 26_880, 26_880.0, torch.tensor(60 * 448)],
    2: [(512 * 6 + 64 * 8 + 32) / 576, 6.278, 113 / 18, torch.tensor(6.2778)],
    3: [1, 1.0, 2 / 2, torch.tensor(1)],
    4: [lambda x: x.abs().amax(-1, keepdim=True) / 31.5,
        lambda x: torch.maximum(x.amax(-1), -x.amin(-1))[..., None] * 2 / 63,
        lambda x: x.norm(float("inf"), -1, keepdim=True) / 31.5,
        scale_by_rows],
    5: [lambda W_UK, gain, R: W_UK * gain @ R.T,
        lambda W_UK, gain, R: W_UK @ torch.diag(gain) @ torch.linalg.inv(R),
        lambda W_UK, gain, R: torch.einsum("nc,c,rc->nr", W_UK, gain, R),
        lambda W_UK, gain, R: (R @ (W_UK * gain).T).T],
}
WRONG = {
    1: [60 * 436, 60 * 432, 448, 60 * 440, 60 * 460, "26880"],
    2: [6.06, 6.222, 7, 3616, 8, 6.5],
    3: [0.5, 2, 0.25, "1", True],
    4: [lambda x: x.abs().amax(-1, keepdim=True) / 32,
        lambda x: x.abs().amax(-1, keepdim=True) / 31,
        lambda x: x.amax(-1, keepdim=True) / 31.5,
        lambda x: x.abs().amax(-1) / 31.5,
        lambda x: x.abs().amax() / 31.5,
        lambda x: x.abs().amax(-1, keepdim=True) / 63],
    5: [lambda W_UK, gain, R: W_UK * gain @ R,
        lambda W_UK, gain, R: W_UK @ R.T,
        lambda W_UK, gain, R: W_UK @ R.T * gain,
        lambda W_UK, gain, R: W_UK / gain @ R.T,
        lambda W_UK, gain, R: R @ W_UK,
        lambda W_UK, gain, R: W_UK * gain],
}

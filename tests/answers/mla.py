# SPDX-License-Identifier: MIT
"""Answers to 02_mla."""

import torch
import torch.nn.functional as F

from dsv2_ref.attention.rope import rotate


def norm(x, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rows(h, W_DKV, gain, W_KR, cos, sin, eps=1e-6):
    return torch.cat((norm(h @ W_DKV.T, eps) * gain, rotate((h @ W_KR.T)[None], cos, sin)[0]), -1)


def with_torch(h, W_DKV, gain, W_KR, cos, sin):
    c = F.rms_norm(F.linear(h, W_DKV), gain.shape, gain, 1e-6)
    return torch.cat((c, rotate(F.linear(h, W_KR)[None], cos, sin).squeeze(0)), 1)


def with_complex_numbers(h, W_DKV, gain, W_KR, cos, sin):
    pairs = torch.view_as_complex((h @ W_KR.T).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(1)
    return torch.hstack((norm(h @ W_DKV.T) * gain, turned))


def without_norm(h, W_DKV, gain, W_KR, cos, sin):
    return torch.cat((h @ W_DKV.T * gain, rotate((h @ W_KR.T)[None], cos, sin)[0]), -1)


def turned_in_halves(h, W_DKV, gain, W_KR, cos, sin):
    a, b = (h @ W_KR.T).chunk(2, -1)
    return torch.cat((norm(h @ W_DKV.T) * gain, a * cos - b * sin, a * sin + b * cos), -1)


def normed_together(h, W_DKV, gain, W_KR, cos, sin):
    both = norm(torch.cat((h @ W_DKV.T, h @ W_KR.T), -1))
    c, k = both.split((len(W_DKV), len(W_KR)), -1)
    return torch.cat((c * gain, rotate(k[None], cos, sin)[0]), -1)


RIGHT = {
    1: [["c_kv", "k_r"], ("c_kv", "k_r"), sorted({"k_r", "c_kv"}), ["C_KV", " k_r"]],
    2: [[2.0, 1.0], (2, 1), torch.tensor([2, 1])],
    3: [512, 512.0, torch.tensor(512)],
    4: [rows, with_torch, with_complex_numbers],
}
WRONG = {
    1: [["c_kv"], ["k_c", "v_c"], ["c_kv", "c_q", "k_r"], "c_kv, k_r", ["k_r", "c_kv"], 2],
    2: [[2.0, 2.0], [1.0, 1.0], [4.0, 1.0], [1.0, 2.0], 2.0, [2.0]],
    3: [1000, 576, 32_768, 128, 64],
    4: [lambda h, D, gain, *rest: rows(h, D, torch.ones_like(gain), *rest),
        lambda h, D, gain, R, c, s: rows(h, D, gain, R, c, -s),
        without_norm,
        lambda h, D, gain, R, c, s: norm(h @ D.T) * gain,
        lambda h, D, gain, R, c, s: torch.cat((norm(h @ D.T) * gain, h @ R.T), -1),
        lambda *given: rows(*given, eps=0.0), lambda *given: rows(*given, eps=1e-5),
        turned_in_halves, normed_together],
}

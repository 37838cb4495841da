# SPDX-License-Identifier: MIT
"""The small kernels between products against what they replace.

Without a CUDA device the kernels run in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from oracles.loops import normal  # noqa: E402
from refusals import refused  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dsv2_ref.kernels.between_products import (  # noqa: E402
    add_norm_fused,
    rotate_both_fused,
    swiglu_fused,
)

# fp16 has 11 bits: half a step, and a sum of a few such
TOLERANCE = {torch.float32: 3e-7, torch.float16: 1.5e-3}


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= TOLERANCE[got.dtype] * expected.abs().max()).all()


def rotate_fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x as the queries, or as the key beside others."""
    if x.ndim == 4:
        return rotate_both_fused(x, x[:, :, 0], cos, sin)[0]
    return rotate_both_fused(torch.stack([x, x], 2), x, cos, sin)[1]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs as complex numbers, in fp64: x (B, T, n_h, d_r), tables (B or 1, T, d_r/2)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    by = torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.view_as_real(pairs * by).flatten(-2)


def tables(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    angles = 3 * normal(seed, *shape).to(DEVICE)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("B", "T", "n_h", "d_r"), [(1, 1, 16, 64), (2, 5, 3, 6), (3, 37, 2, 2),
                                                    (2, 9, 33, 10)])
def test_pairs_are_turned_as_complex_numbers(B, T, n_h, d_r, dtype):
    x = normal(1, B, T, n_h, d_r).to(DEVICE, dtype)
    for batch in (1, B):
        cos, sin = tables(2, batch, T, d_r // 2)
        close(rotate_fused(x, cos, sin), turned(x, cos, sin))
        if batch == 1:                                       # tables without a batch, in fp32
            close(rotate_fused(x, cos[0].float(), sin[0].float()), turned(x, cos, sin))
        key = x[:, :, 1]                                     # one for all heads, and strided
        close(rotate_fused(key, cos, sin), turned(key[:, :, None], cos, sin)[:, :, 0])


@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (3, 4, 10)])
def test_the_gradient_is_turned_back(shape):
    x, dy = (normal(seed, *shape).float().to(DEVICE) for seed in (3, 4))
    x.requires_grad_()
    cos, sin = tables(5, shape[0], shape[1], shape[-1] // 2)
    rotate_fused(x, cos, sin).backward(dy)
    wide = dy if dy.ndim == 4 else dy[:, :, None]
    close(x.grad, turned(wide, cos, -sin).view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1408), (3, 7, 5), (0, 4), (2050,)])
def test_the_gate_meets_up(shape, dtype):
    gate, up = (3 * normal(seed, *shape).to(DEVICE, dtype) for seed in (6, 7))
    h = swiglu_fused(gate, up)
    assert h.dtype == dtype and h.shape == shape
    if h.numel():
        g = gate.double()
        close(h, g / (1 + (-g).exp()) * up.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "eps"), [((1, 1, 2048), 1e-6), ((2, 3, 40), 0.5),
                                            ((0, 8), 1e-6)])
def test_a_sum_and_its_norm(shape, eps, dtype):
    h, u = (normal(seed, *shape).to(DEVICE, dtype) for seed in (8, 9))
    norm = nn.RMSNorm(shape[-1], eps=eps).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(normal(10, shape[-1]))
    total, x = add_norm_fused(h, u, norm)
    assert torch.equal(total, h + u) and x.dtype == dtype and x.shape == shape
    if x.numel():
        row = total.double()
        close(x, row / (row.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double())


def test_what_is_not_asked_for_is_refused():
    x = normal(11, 2, 5, 3, 6).float().to(DEVICE)
    cos, sin = tables(12, 5, 3)
    refused(lambda: rotate_fused(x, cos[:4], sin[:4]), "cos, sin", "(4, 3)", "(..., 5, 3)")
    refused(lambda: rotate_fused(x.double(), cos, sin), "q_r", "float64")
    refused(lambda: rotate_both_fused(x, x[:1, :, 0], cos, sin), "k_r", "(1, 5, 6)", "as q_r")
    refused(lambda: swiglu_fused(x, x[:1]), "up", "(1, 5, 3, 6)", "as gate")
    refused(lambda: swiglu_fused(x, x.half()), "up", "float16")
    norm = nn.RMSNorm(5, eps=1e-6).to(DEVICE)
    refused(lambda: add_norm_fused(x, x, norm), "norm", "(5,)", "6 numbers")
    refused(lambda: add_norm_fused(x[..., :5], x[..., :5], norm), "add_norm_fused", "gradient")
    refused(lambda: swiglu_fused(x.requires_grad_(), x), "swiglu_fused", "gradient")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    x = normal(13, 1, 2, 1, 4).float()
    refused(lambda: swiglu_fused(x.bfloat16(), x.bfloat16()), "gate", "bfloat16 on cpu")
    compiled = object.__new__(triton.JITFunction)
    monkeypatch.setitem(rotate_both_fused.__wrapped__.__globals__, "_rotate_kernel", compiled)
    refused(lambda: rotate_fused(x, *tables(14, 2, 2)), "q_r", "cpu", "TRITON_INTERPRET=1")

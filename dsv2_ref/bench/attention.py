# SPDX-License-Identifier: MIT
"""Causal attention of V2's widths, 192 for queries and keys and 128 for values, on one GPU.

Ours (kernels/flash_attention.py, with the RoPE key shared by all heads) against what torch has:

  cudnn          SDPA with the cuDNN backend asked for by name
  cudnn_padded   the same with values padded to 192, should it refuse two widths
  sdpa           SDPA as it chooses by itself, values padded (that is `attend_expanded`)
  flex           FlexAttention, compiled, with a causal block mask and its default tiles

The others get keys that are put together and repeated for every head beforehand; that copy is in
nobody's time. 16 and 128 heads, 4K and 8K tokens a sequence, bf16; forward, and backward alone
(the gradients of all inputs; ours sums that of the shared key over the heads, the others leave it
to whoever repeated the key). Both directions are compared with fp32 before anything is timed.

TFLOP/s by the analytic count of what causality leaves, T·(T + 1)/2 pairs a sequence and head: two
products forward, five backward (scores again, dP, dV, dQ, dK), however many a kernel takes.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # for `quick`, before triton

from dsv2_ref.bench._gpu import check, device_for, medians, record, rotated, row
from dsv2_ref.kernels.flash_attention import flash_attention

SCALE = (192**0.5 / 1.2608**2) ** -1                          # of V2, with YaRN's factor
CHECKED_HEADS = 4                                             # at a time, in fp32


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens, n_h heads."""

    B: int
    T: int
    n_h: int
    d_h: int = 128
    d_r: int = 64
    d_v: int = 128
    dtype: torch.dtype = torch.bfloat16

    def flops(self, backward: bool) -> int:
        d_qk, pairs = self.d_h + self.d_r, self.B * self.n_h * self.T * (self.T + 1) // 2
        return 2 * pairs * (3 * d_qk + 2 * self.d_v if backward else d_qk + self.d_v)

    def nbytes(self, backward: bool) -> int:
        """Read and written at least, the shared key once; backward also reads O and dO."""
        inputs = self.n_h * (2 * self.d_h + self.d_r + self.d_v) + self.d_r
        numbers = 2 * (inputs + self.n_h * self.d_v) if backward else inputs + self.n_h * self.d_v
        return self.B * self.T * numbers * self.dtype.itemsize


CASES = [Case(4, 4096, 16), Case(2, 8192, 16), Case(1, 4096, 128), Case(1, 8192, 128)]
QUICK = [Case(2, 40, 2, 16, 8, 12, torch.float32)]


@dataclass
class Inputs:
    """The same numbers for both sides, a gradient, and outputs that backward passes start at."""

    ours: list[Tensor]                # q_c, q_r, k_c, k_r, v packed, (B·T, ...)
    theirs: list[Tensor]              # q, k, v (B, n_h, T, ·), views of (B, T, n_h, ·)
    grad: Tensor                      # (B, T, n_h, d_v)
    outputs: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)


def run(quick: bool = False) -> dict[str, Any]:
    """Two rows a case, forward and backward; ValueError without a CUDA device."""
    device = device_for("attention", quick)
    rows = []
    for case in QUICK if quick else CASES:
        rows += _rows(case, device)
    return {"name": "attention", "quick": quick, **record(device), "rows": rows}


def _rows(case: Case, device: torch.device) -> list[dict[str, Any]]:
    made = rotated(lambda i: _inputs(case, device, i), case.nbytes(backward=False), device)
    forms = _forms(case, device)
    errors = _errors(case, forms["ours"], made[0])
    sizes = dict(batch=case.B, tokens=case.T, heads=case.n_h, d_qk=case.d_h + case.d_r,
                 d_v=case.d_v, dtype=str(case.dtype)[6:])
    rows = []
    for backward in (False, True):
        if backward:
            steps = {name: _backward(name, form) for name, form in forms.items()}
        else:
            steps = {name: torch.no_grad()(form) for name, form in forms.items()}
        ms = medians(steps, made, device, warmup=max(3, len(made)))
        direction = "backward" if backward else "forward"
        rows.append(row(f"{direction}, {case.n_h} heads, {case.B}x{case.T}", ms,
                        case.flops(backward), case.nbytes(backward), errors[backward],
                        direction=direction, **sizes))
    return rows


def _inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator(device).manual_seed(seed)
    N, n_h = case.B * case.T, case.n_h
    shapes = [(N, n_h, case.d_h), (N, n_h, case.d_r), (N, n_h, case.d_h), (N, case.d_r),
              (N, n_h, case.d_v)]
    ours = [torch.randn(shape, generator=g, device=device).to(case.dtype) for shape in shapes]
    q_c, q_r, k_c, k_r, v = ours
    k_r = k_r[:, None].expand(-1, n_h, -1)
    theirs = [x.unflatten(0, (case.B, case.T)).transpose(1, 2)
              for x in (torch.cat((q_c, q_r), -1), torch.cat((k_c, k_r), -1), v.clone())]
    grad = torch.randn((case.B, case.T, n_h, case.d_v), generator=g, device=device)
    return Inputs([x.requires_grad_() for x in ours], [x.requires_grad_() for x in theirs],
                  grad.to(case.dtype))


def _forms(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Tensor]]:
    """Each side as a function of the inputs, with outputs (B, T, n_h, d_v)."""
    starts = torch.arange(case.B + 1, device=device, dtype=torch.int32) * case.T
    d_qk = case.d_h + case.d_r
    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" \
        else flex_attention
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, case.T, case.T, device=device)

    def ours(x: Inputs) -> Tensor:
        o = flash_attention(*x.ours, SCALE, starts, starts, case.T, case.T)
        return o.unflatten(0, (case.B, case.T))

    def sdpa(x: Inputs, pad: int = d_qk - case.d_v) -> Tensor:
        q, k, v = x.theirs
        v = F.pad(v, (0, pad)) if pad else v
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        return o[..., : case.d_v].transpose(1, 2)

    def cudnn(x: Inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(x, pad=0)

    def cudnn_padded(x: Inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(x)

    def flex(x: Inputs) -> Tensor:
        return compiled(*x.theirs, block_mask=mask, scale=SCALE).transpose(1, 2)

    return {"ours": ours, "cudnn": cudnn, "cudnn_padded": cudnn_padded, "sdpa": sdpa, "flex": flex}


def _backward(name: str, form: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Any]:
    """Gradients alone: the graph is made in the warm-up and kept."""
    def step(x: Inputs) -> Any:
        if name not in x.outputs:
            x.outputs[name] = form(x), x.ours if name == "ours" else x.theirs
        o, inputs = x.outputs[name]
        return torch.autograd.grad(o, inputs, x.grad, retain_graph=True)

    return step


def _errors(case: Case, ours: Callable[[Inputs], Tensor], x: Inputs) -> tuple[float, float]:
    """Relative RMS error of the output, and the largest of the five gradients, against fp32."""
    with torch.no_grad():
        o = torch.full_like(x.grad, math.nan)                 # what the allocator gives back next
        del o
    o = ours(x)
    grads = torch.autograd.grad(o, x.ours, x.grad)
    expected, expected_grads = _reference(case, x)
    forward = check(o, expected, "attention forward")
    names = ("q_c", "q_r", "k_c", "k_r", "v")
    return forward, max(check(got, wanted, f"attention backward, {name}")
                        for name, got, wanted in zip(names, grads, expected_grads, strict=True))


def _reference(case: Case, x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in fp32, a few heads at a time."""
    outputs, grads, shared = [], [], torch.zeros(())
    for first in range(0, case.n_h, CHECKED_HEADS):
        heads = slice(first, first + CHECKED_HEADS)
        q, k, v = (t[:, heads].detach().float().requires_grad_() for t in x.theirs)
        with sdpa_kernel(SDPBackend.MATH):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
            o = o.transpose(1, 2)
            dq, dk, dv = (g.transpose(1, 2).flatten(0, 1)
                          for g in torch.autograd.grad(o, (q, k, v), x.grad[:, :, heads].float()))
        outputs.append(o.detach())
        grads.append((dq[..., : case.d_h], dq[..., case.d_h:], dk[..., : case.d_h], dv))
        shared = shared.to(dk) + dk[..., case.d_h:].sum(1)
    q_c, q_r, k_c, v = (torch.cat(parts, 1) for parts in zip(*grads))
    return torch.cat(outputs, 2), [q_c, q_r, k_c, shared, v]

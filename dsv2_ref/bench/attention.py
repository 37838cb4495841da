# SPDX-License-Identifier: MIT
"""Causal attention of V2's widths, 192 for queries and keys and 128 for values, on one GPU.

Ours (kernels/flash_attention.py, with the RoPE key shared by all heads) against what torch has:

  cudnn          SDPA with the cuDNN backend asked for by name
  cudnn_padded   the same with values padded to 192, should it refuse two widths
  sdpa           SDPA as it chooses by itself, values padded, as `attend_expanded` has them
  flex           FlexAttention, compiled, with a causal block mask and its default tiles

The others get keys that are put together and repeated for every head, and values that are padded,
beforehand: those copies are in nobody's time. 16 and 128 heads, 4K and 8K tokens per sequence,
bf16; forward, and backward alone (the gradients of all inputs; ours sums that of the shared key
over the heads, the others leave it to whoever repeated the key). Ours is compared with fp32 in both
directions before anything is timed, the others forward.

TFLOP/s by the analytic count of what causality leaves, T·(T + 1)/2 pairs per sequence and head: two
products forward, five backward (scores again, dP, dV, dQ, dK), however many a kernel takes.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # for `quick`, before triton

from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import PEER_TOLERANCE, Step, check, growing, rotated, row, sound
from dsv2_ref.kernels.flash_attention import flash_attention

SCALE = 1.2608**2 / 192**0.5                                  # of V2, with YaRN's factor
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

    @property
    def name(self) -> str:
        return f"{self.n_h} heads, {self.B}x{self.T}"

    @property
    def d_qk(self) -> int:
        return self.d_h + self.d_r

    def unpacked(self, x: Tensor) -> Tensor:
        """(B·T, n_h, ·) -> (B, n_h, T, ·), a view."""
        return x.unflatten(0, (self.B, self.T)).transpose(1, 2)

    def flops(self, backward: bool) -> int:
        pairs = self.B * self.n_h * self.T * (self.T + 1) // 2
        return 2 * pairs * (3 * self.d_qk + 2 * self.d_v if backward else self.d_qk + self.d_v)

    def nbytes(self, backward: bool) -> int:
        """Read and written at least, the shared key once; backward also reads O and dO."""
        inputs = self.n_h * (2 * self.d_h + self.d_r + self.d_v) + self.d_r
        numbers = 2 * (inputs + self.n_h * self.d_v) if backward else inputs + self.n_h * self.d_v
        return self.B * self.T * numbers * self.dtype.itemsize

    @property
    def needs(self) -> int:
        """Twice all forms with outputs and gradients; scores of a few heads in fp32, with theirs.

        Both counted at small sizes; the mask of FlexAttention and a workspace come on top.
        """
        rows = self.B * self.T * self.n_h * self.dtype.itemsize * 10 * (self.d_qk + self.d_v)
        return 2 * rows + 4 * self.B * CHECKED_HEADS * self.T**2 * 5 + 2**26


CASES = [Case(2, 8192, 16), Case(4, 4096, 16), Case(1, 8192, 128), Case(1, 4096, 128)]
QUICK = [Case(2, 40, 2, 16, 8, 12, torch.float32)]


@dataclass
class Inputs:
    """The same numbers in the form each side reads, and the gradient of its output.

    ours: q_c, q_r, k_c, k_r, v packed, (B·T, ...). plain: q, k, v (B, n_h, T, ·), views of
    (B, T, n_h, ·); padded: the same with values as wide as the keys.
    """

    leaves: dict[str, list[Tensor]]
    grads: dict[str, Tensor]
    graphs: dict[str, Tensor] = field(default_factory=dict)       # outputs, for backward passes


@dataclass(frozen=True)
class Form:
    """One side: a function of those leaves."""

    name: str
    leaves: str
    attend: Callable[..., Tensor]

    def forward(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            return self.attend(*x.leaves[self.leaves])

    def backward(self, x: Inputs) -> Any:
        """Gradients alone: the graph is made in the warm-up and kept."""
        leaves = x.leaves[self.leaves]
        if self.name not in x.graphs:
            x.graphs[self.name] = self.attend(*leaves)
        return torch.autograd.grad(x.graphs[self.name], leaves, x.grads[self.leaves],
                                   retain_graph=True)


def run(quick: bool = False) -> dict[str, Any]:
    """Two rows a case, forward and backward; ValueError without a CUDA device."""
    return measured("attention", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    made = rotated(lambda i: inputs(case, device, i), case.nbytes(backward=False), device)
    ours, *others = forms(case, device)
    o, *errors = checked(case, ours, made[0])
    right: dict[str, Step | str] = {}

    def stages(direction: str) -> Iterator[dict[str, Step | str]]:
        yield {"ours": getattr(ours, direction)}
        if not right:
            right.update(sound({form.name: partial(_packed, case, form) for form in others},
                               made[0], lambda _: o, PEER_TOLERANCE))
        yield {form.name: why if isinstance(why := right[form.name], str)
               else getattr(form, direction) for form in others}

    for backward, direction in enumerate(("forward", "backward")):
        for ms in growing(stages(direction), made, device, warmup=len(made) + 1):
            yield row(f"{direction}, {case.name}", ms, case.flops(backward), case.nbytes(backward),
                      errors[backward], direction=direction, batch=case.B, tokens=case.T,
                      heads=case.n_h, d_qk=case.d_qk, d_v=case.d_v, dtype=str(case.dtype)[6:])


def _packed(case: Case, form: Form, x: Inputs) -> Tensor:
    """The output of a comparator as ours has it, (B·T, n_h, d_v)."""
    return form.forward(x).transpose(1, 2).flatten(0, 1)[..., : case.d_v]


def inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator(device).manual_seed(seed)
    n_h, d_v = case.n_h, case.d_v
    shapes = [(n_h, case.d_h), (n_h, case.d_r), (n_h, case.d_h), (case.d_r,), (n_h, d_v),
              (n_h, d_v)]
    *ours, grad = (torch.randn(case.B * case.T, *shape, generator=g, device=device).to(case.dtype)
                   for shape in shapes)
    q_c, q_r, k_c, k_r, v = ours
    q, k = torch.cat((q_c, q_r), -1), torch.cat((k_c, k_r[:, None].expand(-1, n_h, -1)), -1)
    wider = (0, case.d_qk - d_v)
    leaves = {"ours": ours, "plain": [q, k, v], "padded": [q, k, F.pad(v, wider)]}
    for name in ("plain", "padded"):
        leaves[name] = [case.unpacked(x) for x in leaves[name]]
    leaves = {name: [x.detach().requires_grad_() for x in some] for name, some in leaves.items()}
    grads = {"ours": grad, "plain": case.unpacked(grad),
             "padded": case.unpacked(F.pad(grad, wider))}
    return Inputs(leaves, grads)


def forms(case: Case, device: torch.device) -> list[Form]:
    starts = torch.arange(case.B + 1, device=device, dtype=torch.int32) * case.T
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, case.T, case.T, device=device)
    compiled = _compiled_flex() if device.type == "cuda" else None

    def ours(*x: Tensor) -> Tensor:
        return flash_attention(*x, SCALE, starts, starts, case.T, case.T)

    def sdpa(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=True, scale=SCALE)

    def cudnn(*x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(*x)

    def flex(*x: Tensor) -> Tensor:
        if compiled is None:
            raise RuntimeError("compiled for CUDA alone")
        return compiled(*x, block_mask=mask, scale=SCALE)

    return [Form("ours", "ours", ours), Form("cudnn", "plain", cudnn),
            Form("cudnn_padded", "padded", cudnn), Form("sdpa", "padded", sdpa),
            Form("flex", "plain", flex)]


def _compiled_flex() -> Callable[..., Tensor]:
    """Of a new start: of one function the compiler keeps few versions, then runs it uncompiled."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def checked(case: Case, ours: Form, x: Inputs) -> tuple[Tensor, float, float]:
    """The output in fp32; the relative RMS error of ours, and the largest of its five gradients."""
    leaves = x.leaves["ours"]
    poison = torch.full_like(leaves[4], math.nan)             # memory that the output may get next
    del poison
    o = ours.attend(*leaves)
    grads = torch.autograd.grad(o, leaves, x.grads["ours"])
    expected, expected_grads = _reference(case, x)
    forward = check(o, expected, "attention forward")
    names = ("q_c", "q_r", "k_c", "k_r", "v")
    return expected, forward, max(check(got, wanted, f"attention backward, {name}")
                                  for name, got, wanted in zip(names, grads, expected_grads,
                                                               strict=True))


def _reference(case: Case, x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in fp32, packed as ours are; a few heads at a time."""
    parts, shared = [], 0.0
    for first in range(0, case.n_h, CHECKED_HEADS):
        heads = slice(first, first + CHECKED_HEADS)
        q, k, v = (t[:, heads].detach().float().requires_grad_() for t in x.leaves["plain"])
        with sdpa_kernel(SDPBackend.MATH):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
            grads = torch.autograd.grad(o, (q, k, v), x.grads["plain"][:, heads].float())
        o, dq, dk, dv = (t.detach().transpose(1, 2).flatten(0, 1) for t in (o, *grads))
        d_h = case.d_h
        parts.append((o, dq[..., :d_h], dq[..., d_h:], dk[..., :d_h], dv))
        shared = shared + dk[..., d_h:].sum(1)
    o, dq_c, dq_r, dk_c, dv = (torch.cat(some, 1) for some in zip(*parts))
    return o, [dq_c, dq_r, dk_c, shared, dv]

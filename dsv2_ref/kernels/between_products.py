# SPDX-License-Identifier: MIT
"""The small steps between matrix products, one launch each.

One token's way through a layer is nine small products and much that is smaller still: a pair of
coordinates turned by an angle, a gate times a value, a residual and its norm. Torch takes a launch
for each cast, product and sum of these; on a card that has little to compute, the launches are what
a token waits for. Here each step is one kernel over the rows:

  rotate_both_fused  RoPE of queries and key, sections 2.1.3 and 3.1.4: both halves of a pair are
                     read once, turned, and written once. Its gradient is the turn by the opposite
                     angle: the same kernel.
  swiglu_fused       silu(gate) · up of an expert, section 2.2.1. No gradient.
  add_norm_fused     h + u and its RMSNorm: a row stays in registers between. No gradient.

How this file differs from its twins:
  1. A twin rounds to the dtype after each operation; so do these kernels where more than one
     rounding would be seen: the gate before it meets up, the sum before it is normed. In fp32 the
     card may round a·cos - b·sin once where the twin rounds twice.
  2. Tables of cosines and sines are read in whatever dtype they have, and used in fp32.

Launch: 1,024 numbers per program, 4 warps; a row per program for the norm. Not timed yet.

Shapes: B batch, T tokens, n_h heads, d_r RoPE size (even), d width, w width of an expert.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from between_products import add_norm_fused, rotate_both_fused, swiglu_fused
    angles = torch.arange(5)[:, None] * 1e4 ** -torch.linspace(0, 1, 3)      # (T, d_r/2)
    q_r, k_r = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 6)         # (B, T, n_h, d_r), (B, T, d_r)
    q_r, k_r = rotate_both_fused(q_r, k_r, angles.cos(), angles.sin())
    hidden = swiglu_fused(torch.randn(10, 24), torch.randn(10, 24))          # (N, w)
    norm = torch.nn.RMSNorm(40, eps=1e-6).requires_grad_(False)
    h, x = add_norm_fused(torch.randn(10, 40), torch.randn(10, 40), norm)    # (N, d) twice
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv2_ref.kernels.target import check_device, on_its_device

BLOCK = 1024


@triton.jit
def _turn_rows(
    x, out, cos, sin, first, rows, T, n_h, cos_b, cos_t, sin_b, sin_t, D: tl.constexpr,
    BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """ROWS rows of x (B, T, n_h, D) from `first` on; tables (B, T, D/2) by their strides."""
    row = first.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    at = row[:, None] * D + column[None]
    inside = (row < rows)[:, None] & (column < D)[None]
    a, b = tl.split(tl.reshape(tl.load(x + at, mask=inside, other=0.0).to(tl.float32),
                               (ROWS, WIDTH // 2, 2)))
    token = row // n_h
    real = (row < rows)[:, None] & (pair < D // 2)[None]
    c = tl.load(cos + (token // T * cos_b + token % T * cos_t)[:, None] + pair[None], mask=real,
                other=0.0).to(tl.float32)
    s = tl.load(sin + (token // T * sin_b + token % T * sin_t)[:, None] + pair[None], mask=real,
                other=0.0).to(tl.float32)
    s = -s if BACK else s
    turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (ROWS, WIDTH))
    tl.store(out + at, turned.to(out.dtype.element_ty), mask=inside)


# tokens and batches differ from pass to pass: no reason to compile anew
@triton.jit(do_not_specialize=["tokens", "T", "cos_b", "cos_t", "sin_b", "sin_t"])
def _rotate_kernel(
    q_r, k_r, q_out, k_out, cos, sin, tokens, T, cos_b, cos_t, sin_b, sin_t, N_H: tl.constexpr,
    D: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """The first programs have rows of q_r, the others of k_r."""
    queries = (tokens * N_H + ROWS - 1) // ROWS
    if tl.program_id(0) < queries:
        _turn_rows(q_r, q_out, cos, sin, tl.program_id(0), tokens * N_H, T, N_H, cos_b, cos_t,
                   sin_b, sin_t, D, BACK, ROWS, WIDTH)
    else:
        _turn_rows(k_r, k_out, cos, sin, tl.program_id(0) - queries, tokens, T, 1, cos_b, cos_t,
                   sin_b, sin_t, D, BACK, ROWS, WIDTH)


@triton.jit
def _swiglu_kernel(gate, up, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    h = silu * tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _add_norm_kernel(h, u, weight, total, normed, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """One row."""
    column = tl.arange(0, WIDTH)
    at, inside = tl.program_id(0).to(tl.int64) * D + column, column < D
    row = (tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
           + tl.load(u + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + at, row, mask=inside)
    row = row.to(tl.float32)
    row *= tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    row *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, row.to(normed.dtype.element_ty), mask=inside)


def _check(kernel: object, **named: Tensor) -> None:
    """ValueError unless all are of one shape and one dtype that kernels read."""
    (name, first), *others = named.items()
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: dtype {first.dtype}, expected float32, bfloat16 or float16")
    for other, x in others:
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(f"{other}: {x.dtype} of shape {tuple(x.shape)}, expected "
                             f"{first.dtype} of {tuple(first.shape)}, as {name}")
    check_device(name, first, kernel)


def _turn(
    q_r: Tensor, k_r: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """By the angle, or back."""
    B, T, n_h, D = q_r.shape
    q_r, k_r = q_r.contiguous(), k_r.contiguous()
    out = torch.empty_like(q_r), torch.empty_like(k_r)
    cos, sin = (t.expand(B, T, D // 2) for t in (cos, sin))
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    width = max(2, triton.next_power_of_2(D))
    each = max(1, BLOCK // width)
    if B * T:
        _rotate_kernel[(triton.cdiv(B * T * n_h, each) + triton.cdiv(B * T, each),)](
            q_r, k_r, *out, cos, sin, B * T, T, *cos.stride()[:2], *sin.stride()[:2], n_h, D, back,
            each, width)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_r, k_r, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(q_r, k_r, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_r, dk_r):
        return *_turn(dq_r, dk_r, *ctx.saved_tensors, True), None, None


@on_its_device
def rotate_both_fused(
    q_r: Tensor, k_r: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotate` of both: (a, b) -> (a cos - b sin, a sin + b cos) for each adjacent pair.

    q_r (B, T, n_h, d_r) and k_r (B, T, d_r) of one dtype, fp32, bf16 or fp16; cos, sin (T, d_r/2)
    or (B or 1, T, d_r/2), which get no gradient -> as q_r and k_r.
    """
    B, T, _, d_r = q_r.shape
    _check(_rotate_kernel, q_r=q_r[:, :, 0], k_r=k_r)
    if d_r % 2 or any(t.shape[-2:] != (T, d_r // 2) for t in (cos, sin)):
        raise ValueError(f"cos, sin: shape {tuple(cos.shape)}, expected (..., {T}, {d_r // 2}), a "
                         "row for each of the T new tokens")
    if torch.is_grad_enabled() and (q_r.requires_grad or k_r.requires_grad):
        return _Rotate.apply(q_r, k_r, cos, sin)
    return _turn(q_r, k_r, cos, sin, False)


def _no_gradient(name: str, *inputs: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(f"{name}: an input requires a gradient, expected none "
                         "(torch.no_grad() for decoding, the twin for training)")


@on_its_device
def swiglu_fused(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of experts.py: silu(gate) · up of one shape and dtype. There is no gradient."""
    _check(_swiglu_kernel, gate=gate, up=up)
    _no_gradient("swiglu_fused", gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if n := gate.numel():
        _swiglu_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK)
    return out


@on_its_device
def add_norm_fused(h: Tensor, u: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """h + u and its norm, (..., d) each, as `add_norm` of forms.py. There is no gradient."""
    if type(norm) is not nn.RMSNorm or norm._forward_hooks or norm._forward_pre_hooks:
        h = h + u                            # somebody looks on, or it is another norm
        return h, norm(h)
    _check(_add_norm_kernel, h=h, u=u)
    d = h.shape[-1]
    if norm.weight.shape != (d,) or norm.eps is None:
        raise ValueError(f"norm: {norm}, expected one over {d} numbers, with weights and eps")
    _no_gradient("add_norm_fused", h, u, norm.weight)
    h, u = h.contiguous(), u.contiguous()
    total, normed = torch.empty_like(h), torch.empty_like(h)
    if rows := h.numel() // d:
        width = triton.next_power_of_2(d)
        _add_norm_kernel[(rows,)](h, u, norm.weight, total, normed, norm.eps, d, width,
                                  num_warps=4 if width <= 2048 else 8)
    return total, normed

# SPDX-License-Identifier: MIT
"""Routed experts with FP8 weights, as grouped products that read one byte a weight.

The routed part of equation (20), section 2.2.1, in the FP8 of section 3.2.3. Nearly all weights of
the model are experts', and a decoded token reads K of them: here the bytes that FP8 saves are time,
if nothing but codes is read. As in kernels/grouped_experts.py the slots are sorted by expert, each
expert's rows are cut into tiles, and a program finds out on the device which expert its tile
belongs to. As in kernels/fp8_products.py codes become numbers in the loop that multiplies them,
and a block's scale enters its sum in fp32.

  up     gate, up = x W_gateᵀ, x W_upᵀ; h = silu(gate)·up      x is gathered while it is loaded
  rows   out = g · h W_downᵀ                                   each slot writes a row of its own
  sum    y of a token = the sum of its K rows, in fp32, by torch

How this file differs from grouped_experts.py:
  1. No backward: weights in FP8 are frozen, and so small a model is not what one trains through.
  2. One tile a program, and programs for as many tiles as there can be; those without a tile end
     at once. When few tokens decode, each has its share of the reading and is done.
  3. Pointers everywhere: a step takes 128 columns of a row of codes, which is one cache line.
  4. Dropped slots write no row. With `keep` the rows begin as zeros, so that the sum may be plain.
  5. Experts' own blocks: the scales of expert e are rows e of (E, R, C), and its last blocks are
     ragged where 128 does not divide its sizes.

For prompts the same codes are decoded again for each 64 rows of an expert. That costs arithmetic,
not memory; a dequantised stack would take 1.1 GB a layer of V2-Lite and 7.5 GB of V2. Not timed.

A slot is one (token, expert) pair, numbered n·K + k.
Shapes: N flat tokens, d width, w expert width, E routed experts, K slots per token; R and C blocks
of 128 rows and columns of a matrix.
Copy with: fp8_products.py, route_tokens.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from fp8_experts import experts_fp8
    from fp8_products import Fp8Stack
    x = torch.randn(40, 64)                                          # (N, d), after the norm
    gates, indices = torch.rand(40, 8).topk(3)                       # (N, K) each, from the router
    W_gate, W_up = (Fp8Stack(torch.randn(8, 32, 64)) for _ in "gu")  # (E, w, d)
    W_down = Fp8Stack(torch.randn(8, 64, 32))                        # (E, d, w)
    y = experts_fp8(x, indices, gates, W_gate, W_up, W_down)         # (N, d)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.fp8_products import Fp8Stack, decode, plan, read, read_some
from dsv2_ref.kernels.route_tokens import sort_slots_fused


@triton.jit
def _locate(tile, offsets, E: tl.constexpr, BM: tl.constexpr):
    """A row tile's expert, E or more where there is no such tile; its rows, and which exist."""
    e = tl.arange(0, triton.next_power_of_2(E))
    start = tl.load(offsets + e, mask=e < E, other=0)
    tiles = (tl.load(offsets + e + 1, mask=e < E, other=0) - start + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(ends <= tile, tiles, 0), 0)
    first = tl.load(offsets + expert, mask=expert < E, other=0) + (tile - before) * BM
    rows = first + tl.arange(0, BM)
    return expert, rows, rows < tl.load(offsets + expert + 1, mask=expert < E, other=0)


@triton.jit
def _up_kernel(
    x, gate_codes, gate_scale, up_codes, up_scale, order, offsets, h, E: tl.constexpr,
    K: tl.constexpr, d: tl.constexpr, w: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, PTX: tl.constexpr,
):
    C: tl.constexpr = (d + 127) // 128
    R: tl.constexpr = (w + 127) // 128
    i = tl.program_id(0) * BR
    e, rows, real = _locate(tl.program_id(1), offsets, E, BM)
    if e < E:
        dtype: tl.constexpr = x.dtype.element_ty
        token = tl.load(order + rows, mask=real, other=0) // K
        outputs = i + tl.arange(0, BR)
        inside = e.to(tl.int64) * w + tl.minimum(outputs, w - 1)
        at = (e * R + i // 128) * C
        s_gate, s_up = tl.load(gate_scale + at), tl.load(up_scale + at)
        gate, up = tl.zeros((BM, BR), tl.float32), tl.zeros((BM, BR), tl.float32)
        for k in range(0, d, BK):
            columns = k + tl.arange(0, BK)
            a = read_some(x, token, real, columns, d)
            b = decode(read(gate_codes, inside, columns, d), dtype, PTX)
            gate += s_gate * tl.dot(a, b.T, input_precision="ieee")
            b = decode(read(up_codes, inside, columns, d), dtype, PTX)
            up += s_up * tl.dot(a, b.T, input_precision="ieee")
            later = at + tl.minimum(k + BK, d - 1) // 128              # ahead of its use
            s_gate, s_up = tl.load(gate_scale + later), tl.load(up_scale + later)
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        tl.store(h + rows.to(tl.int64)[:, None] * w + outputs[None],
                 (gate * tl.sigmoid(gate) * up).to(dtype), mask=real[:, None] & (outputs < w)[None])


@triton.jit
def _rows_kernel(
    h, codes, scale, order, offsets, gates, out, E: tl.constexpr, d: tl.constexpr, w: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
):
    C: tl.constexpr = (w + 127) // 128
    R: tl.constexpr = (d + 127) // 128
    i = tl.program_id(0) * BR
    e, rows, real = _locate(tl.program_id(1), offsets, E, BM)
    if e < E:
        slot = tl.load(order + rows, mask=real, other=0)
        outputs = i + tl.arange(0, BR)
        inside = e.to(tl.int64) * d + tl.minimum(outputs, d - 1)
        at = (e * R + i // 128) * C
        s = tl.load(scale + at)
        acc = tl.zeros((BM, BR), tl.float32)
        for k in range(0, w, BK):
            columns = k + tl.arange(0, BK)
            a = read_some(h, rows, real, columns, w)
            b = decode(read(codes, inside, columns, w), h.dtype.element_ty, PTX)
            acc += s * tl.dot(a, b.T, input_precision="ieee")
            s = tl.load(scale + at + tl.minimum(k + BK, w - 1) // 128)
        acc *= tl.load(gates + slot, mask=real, other=0.0).to(tl.float32)[:, None]
        tl.store(out + slot.to(tl.int64)[:, None] * d + outputs[None],
                 acc.to(out.dtype.element_ty), mask=real[:, None] & (outputs < d)[None])


def experts_fp8(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Fp8Stack, W_up: Fp8Stack, W_down: Fp8Stack,
    keep: Tensor | None = None,
) -> Tensor:
    """Gated sum of the chosen experts, as `experts_loop` in moe/experts.py makes it of the stacks.

    x (N, d), indices and gates (N, K), W_gate and W_up (E, w, d), W_down (E, d, w), keep (N, K)
    bool or None for all -> (N, d), summed in fp32. x is fp32, bf16 or fp16; no gradient.
    ValueError for anything else.
    """
    E, w, d = W_gate.shape
    expected = {"x": (x, (len(gates), d)), "indices": (indices, gates.shape),
                "W_up": (W_up, (E, w, d)), "W_down": (W_down, (E, d, w))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: {x.dtype}, expected one of float32, bfloat16 and float16")
    few = gates.numel() <= 16 * E
    how, down = (plan(x, "few" if few else many, d, w) for many in ("pair", "many"))
    order, offsets = sort_slots_fused(indices, E, keep)
    slots, K = len(order), gates.shape[1]
    h, out = x.new_empty(slots, w), x.new_empty(slots, d) if keep is None else x.new_zeros(slots, d)
    x, gates = x.contiguous(), gates.contiguous()
    if slots:
        gate, up, last = (W.codes.view(torch.int8) for W in (W_gate, W_up, W_down))
        _up_kernel[how.grid(slots, E, w)](
            x, gate, W_gate.scale, up, W_up.scale, order, offsets, h, E, K, d, w, PTX=how.PTX,
            **how.options())
        _rows_kernel[down.grid(slots, E, d)](
            h, last, W_down.scale, order, offsets, gates, out, E, d, w, PTX=down.PTX,
            **down.options())
    return out.view(len(gates), K, d).sum(1, dtype=torch.float32).to(x.dtype)

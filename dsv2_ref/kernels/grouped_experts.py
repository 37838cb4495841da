# SPDX-License-Identifier: MIT
"""Routed experts as grouped matrix products, forward and backward.

The routed part of equation (20), section 2.2.1. After routing, each expert has its own number of
rows. Padding all experts to the fullest one computes on air; one product per expert leaves the
machine idle between them. Grouped products do neither: the slots are sorted by expert, each
expert's rows are cut into tiles, and a program finds out on the device which expert its tile
belongs to. The host never learns how many rows an expert got, so it never waits: a fixed number of
programs walk through the tiles until these run out.

  up       gate, up = x W_gateᵀ, x W_upᵀ; h = silu(gate)·up    x is gathered while it is loaded
  rows     out = g · h W_downᵀ                                 each slot writes a row of its own
  sum      y of a token = the sum of its K rows, in fp32
  back     h' = dy W_down; from it dgate, dup, g·h, and dg = <h', h>
  rows     dx of a slot = dgate W_gate + dup W_up              then summed as above
  weights  dW of an expert = the product of two (rows, ·) matrices over its rows

How this file differs from the famous versions:
  1. No atomics. K rows per token are written and summed in a fixed order: one more pass over
     (N·K, d), by bytes a few per cent of the products' time, and the same bits every time.
     Dropped slots are left out of the sum, and nothing else has to know of them.
  2. gate and up are kept for the backward, 4·w bytes per slot in bf16, and h is made again from
     them. Keeping x alone would cost two products more, on top of the nine that there are; keeping
     h too, half as much memory again to spare one elementwise step. Outputs are not kept, for
     <dy, h W_downᵀ> is <dy W_down, h>.
  3. gate and up are rounded to x's dtype before silu, as in a computation layer by layer, so that
     forward and backward see the same numbers. The slot's gate enters before rounding.
  4. An expert's last tile is ragged: missing rows repeat the last one and are not stored. Where
     rows are what is summed over (weights) they are zeros, and an expert without rows stores zeros.
  5. The weights stay (E, w, d) and (E, d, w). On sm_90 tiles come through one tensor descriptor
     over (E·w, d) or (E·d, w); elsewhere, and in fp32 or odd widths, through pointers.

A slot is one (token, expert) pair, numbered n·K + k.
Shapes: N flat tokens, d width, w expert width, E routed experts, K slots per token, R kept slots.
Copy with: route_tokens.py, target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from grouped_experts import experts_fused
    x = torch.randn(40, 64)                                          # (N, d), after the norm
    gates, indices = torch.rand(40, 8).topk(3)                       # (N, K) each, from the router
    W_gate, W_up = torch.randn(8, 32, 64), torch.randn(8, 32, 64)    # (E, w, d)
    y = experts_fused(x, indices, gates, W_gate, W_up, W_down=torch.randn(8, 64, 32))    # (N, d)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv2_ref.kernels.route_tokens import sort_slots_fused, sum_slots
from dsv2_ref.kernels.target import check_device, multiprocessors, on_its_device, target_of

# target -> BM, BN, BK, warps, stages, blocks an SM: narrow for up and back, wide for the others.
# Not timed yet; from the code for sm_90 at Lite's widths: no spills, three buffers, and for 1,024
# clocks of matrix work per step (back: 512) 148, 92, 111 and 209 instructions in up, rows, back and
# weights. up reads its rows for two 128-wide products, so shared memory takes 1,152 clocks.
TILES = {
    "sm_90": {"narrow": (128, 128, 64, 8, 3, 1), "wide": (128, 256, 64, 8, 3, 1)},
    "few": {"narrow": (16, 64, 128, 4, 3, 2), "wide": (16, 128, 128, 4, 3, 2)},
    "sm_80": {"narrow": (128, 64, 32, 4, 3, 2), "wide": (128, 128, 32, 4, 3, 2)},
    "consumer": {"narrow": (128, 64, 32, 4, 3, 2), "wide": (128, 128, 32, 4, 3, 2)},
    "gfx942": {"narrow": (128, 64, 32, 4, 2, 2), "wide": (128, 128, 32, 4, 2, 2)},
    "small": {"narrow": (64, 32, 32, 4, 2, 2), "wide": (64, 64, 32, 4, 2, 2)},
    "cpu": {"narrow": (16, 16, 32, 1, 1, 1), "wide": (16, 32, 16, 1, 1, 1)},
}


@triton.jit
def _count_tiles(offsets, E: tl.constexpr, BM: tl.constexpr):
    """Row tiles of every expert, and their running sum, both (≥ E,)."""
    e = tl.arange(0, triton.next_power_of_2(E))
    rows = tl.load(offsets + e + 1, mask=e < E, other=0) - tl.load(offsets + e, mask=e < E, other=0)
    tiles = (rows + BM - 1) // BM
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def _locate(tile, tiles, ends, offsets, BM: tl.constexpr):
    """A row tile's expert, its rows (BM,), the missing ones repeating the last, and which exist."""
    e = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(ends <= tile, tiles, 0), 0)
    start = tl.load(offsets + e) + (tile - before) * BM
    end = tl.load(offsets + e + 1)
    rows = start + tl.arange(0, BM)
    return e, start, tl.minimum(rows, end - 1), rows < end


@triton.jit
def _at(rows, columns, width: tl.constexpr):
    return rows.to(tl.int64)[:, None] * width + columns[None]


@triton.jit
def _read(M, rows, columns, width: tl.constexpr, whole: tl.constexpr):
    """M[rows, columns] of a matrix `width` wide; zeros past its edge, if tiles are not whole."""
    at = M + _at(rows, columns, width)
    return tl.load(at) if whole else tl.load(at, mask=(columns < width)[None], other=0.0)


@triton.jit
def _read_weight(
    W, e, i, j, height: tl.constexpr, width: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    TMA: tl.constexpr,
):
    """The tile (BI, BJ) at (i, j) of W[e] (height, width); rows past its end are some numbers."""
    rows, columns = e * height + tl.minimum(i + tl.arange(0, BI), height - 1), j + tl.arange(0, BJ)
    return W.load([e * height + i, j]) if TMA else _read(W, rows, columns, width, width % BJ == 0)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")          # or fp32 would become tf32


@triton.jit
def _multiply(
    acc, A, start, rows, W, e, n, inner: tl.constexpr, outer: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr,
    TMA: tl.constexpr,
):
    """acc + A[rows] · W[e], or its transpose, in columns n to n + BN; `inner` is summed over.

    Rows are consecutive from `start` unless they are to be gathered.
    """
    for k in range(0, inner, BK):
        a = (A.load([start, k]) if TMA and not GATHER else
             _read(A, rows, k + tl.arange(0, BK), inner, inner % BK == 0))
        b = (_read_weight(W, e, n, k, outer, inner, BN, BK, TMA).T if TRANSPOSED else
             _read_weight(W, e, k, n, inner, outer, BK, BN, TMA))
        acc = _dot(a, b, acc)
    return acc


@triton.jit
def _up_kernel(
    x, W_gate, W_up, order, offsets, gate_out, up_out, h_out, E: tl.constexpr, K: tl.constexpr,
    d: tl.constexpr, w: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, SAVE: tl.constexpr,
):
    tiles, ends = _count_tiles(offsets, E, BM)
    across: tl.constexpr = (w + BN - 1) // BN
    for tile in range(tl.program_id(0), tl.max(ends, 0) * across, tl.num_programs(0)):
        e, _, rows, real = _locate(tile // across, tiles, ends, offsets, BM)
        n = tile % across * BN
        token = tl.load(order + rows) // K
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, d, BK):
            a = _read(x, token, k + tl.arange(0, BK), d, d % BK == 0)
            gate = _dot(a, _read_weight(W_gate, e, n, k, w, d, BN, BK, TMA).T, gate)
            up = _dot(a, _read_weight(W_up, e, n, k, w, d, BN, BK, TMA).T, up)
        columns = n + tl.arange(0, BN)
        at, mask = _at(rows, columns, w), real[:, None] & (columns < w)[None]
        gate, up = gate.to(h_out.dtype.element_ty), up.to(h_out.dtype.element_ty)
        if SAVE:
            tl.store(gate_out + at, gate, mask=mask)
            tl.store(up_out + at, up, mask=mask)
        h = gate.to(tl.float32) * tl.sigmoid(gate.to(tl.float32)) * up.to(tl.float32)
        tl.store(h_out + at, h.to(h_out.dtype.element_ty), mask=mask)


@triton.jit
def _rows_kernel(
    A, W, B, V, order, offsets, gates, out, E: tl.constexpr, outer: tl.constexpr,
    inner: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
    BACK: tl.constexpr,
):
    """out[slot] = g · A Wᵀ forward (h and W_down), A W + B V backward (dgate, W_gate, dup, W_up)"""
    tiles, ends = _count_tiles(offsets, E, BM)
    across: tl.constexpr = (outer + BN - 1) // BN
    for tile in range(tl.program_id(0), tl.max(ends, 0) * across, tl.num_programs(0)):
        e, start, rows, real = _locate(tile // across, tiles, ends, offsets, BM)
        n = tile % across * BN
        slot, columns = tl.load(order + rows), n + tl.arange(0, BN)
        acc = _multiply(tl.zeros((BM, BN), tl.float32), A, start, rows, W, e, n, inner, outer,
                        BM, BN, BK, not BACK, False, TMA)
        acc = (_multiply(acc, B, start, rows, V, e, n, inner, outer, BM, BN, BK, False, False, TMA)
               if BACK else acc * tl.load(gates + slot).to(tl.float32)[:, None])
        tl.store(out + _at(slot, columns, outer), acc.to(out.dtype.element_ty),
                 mask=real[:, None] & (columns < outer)[None])


@triton.jit
def _back_half(dh, g, rows, columns, real, gate, up, dgate, dup, gated_h, w: tl.constexpr):
    """From dh = dy W_down, before the slot's gate g: all gradients there; <dh, h> is returned."""
    at, mask = _at(rows, columns, w), real[:, None] & (columns < w)[None]
    a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    h = a * s * b
    tl.store(gated_h + at, (g[:, None] * h).to(dup.dtype.element_ty), mask=mask)
    share = tl.sum(dh * h, 1)
    dh *= g[:, None]
    tl.store(dup + at, (dh * a * s).to(dup.dtype.element_ty), mask=mask)
    tl.store(dgate + at, (dh * b * s * (1 + a * (1 - s))).to(dup.dtype.element_ty), mask=mask)
    return share


@triton.jit
def _back_kernel(
    dy, W_down, order, offsets, gates, gate, up, dgate, dup, gated_h, dg, E: tl.constexpr,
    K: tl.constexpr, d: tl.constexpr, w: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr,
):
    tiles, ends = _count_tiles(offsets, E, BM)
    across: tl.constexpr = (w + BN - 1) // BN
    for tile in range(tl.program_id(0), tl.max(ends, 0) * across, tl.num_programs(0)):
        e, start, rows, real = _locate(tile // across, tiles, ends, offsets, BM)
        n = tile % across * BN
        slot = tl.load(order + rows)
        dh = _multiply(tl.zeros((BM, BN), tl.float32), dy, start, slot // K, W_down, e, n, d, w,
                       BM, BN, BK, False, True, TMA)
        g = tl.load(gates + slot).to(tl.float32)
        # in two halves, or the tiles that meet here would not fit into the registers
        left, right = tl.split(dh.reshape(BM, 2, BN // 2).permute(0, 2, 1))
        half = n + tl.arange(0, BN // 2)
        share = _back_half(left, g, rows, half, real, gate, up, dgate, dup, gated_h, w)
        share += _back_half(right, g, rows, half + BN // 2, real, gate, up, dgate, dup, gated_h, w)
        tl.store(dg + slot * across + tile % across, share, mask=real)


@triton.jit
def _weights_kernel(
    A, X, order, offsets, dW, K: tl.constexpr, d: tl.constexpr, w: tl.constexpr,
    along_w: tl.constexpr, along_d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dW[e] = the sum over the expert's rows of A[row]ᵀ X[token], a tile (BM of w, BN of d)."""
    across: tl.constexpr = (d + BN - 1) // BN
    each: tl.constexpr = (w + BM - 1) // BM * across
    e, tile = tl.program_id(0) // each, tl.program_id(0) % each
    i, j = tile // across * BM + tl.arange(0, BM), tile % across * BN + tl.arange(0, BN)
    start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    rows = start + tl.arange(0, BK)
    token = tl.load(order + rows, mask=rows < end, other=0) // K
    for _ in range(start, end, BK):
        a = tl.load(A + _at(rows, i, w), mask=(rows < end)[:, None] & (i < w)[None], other=0.0)
        b = tl.load(X + _at(token, j, d), mask=(rows < end)[:, None] & (j < d)[None], other=0.0)
        rows += BK
        token = tl.load(order + rows, mask=rows < end, other=0) // K   # ahead of its use
        acc = _dot(a.T, b, acc)
    at = e.to(tl.int64) * w * d + i[:, None] * along_w + j[None] * along_d
    tl.store(dW + at, acc.to(dW.dtype.element_ty), mask=(i < w)[:, None] & (j < d)[None])


class Plan(NamedTuple):
    """How kernels are started: tiles of one target, descriptors or pointers, multiprocessors."""

    tiles: dict[str, tuple[int, ...]]
    descriptors: bool
    processors: int

    def grid(self, tile: str, slots: int, E: int, width: int) -> tuple[int]:
        """Programs: as many as run at once, or the most tiles there can be, if those are fewer."""
        BM, BN, *_, blocks = self.tiles[tile]
        most = (slots // BM + min(E, slots)) * triton.cdiv(width, BN)
        return (max(1, min(most, self.processors * blocks)),)

    def options(self, tile: str) -> dict[str, int]:
        return dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), self.tiles[tile]))

    def operand(self, matrix: Tensor, tile: str, block: str) -> Tensor | TensorDescriptor:
        """What a kernel reads a matrix (..., width) through; `block` is "MK", "NK" or "KN"."""
        if not self.descriptors:
            return matrix
        size = dict(zip("MNK", self.tiles[tile]))
        return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [size[b] for b in block])


def plan(x: Tensor, W_gate: Tensor, slots: int) -> Plan:
    """The tiles for these sizes on this device."""
    (E, w, d), target = W_gate.shape, target_of(x.device)
    if target == "cpu":
        return Plan(TILES["cpu"], False, 3)
    processors = multiprocessors(x.device)
    if x.element_size() == 4 or d % 8 or w % 8:                     # or rows that are not aligned
        return Plan(TILES["small"], False, processors)
    name = "few" if target == "sm_90" and slots <= 16 * E else target
    return Plan(TILES[name], target == "sm_90" and slots > 0, processors)


def grouped_forward(
    x: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor, order: Tensor,
    offsets: Tensor, how: Plan, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots that are sorted already: order and offsets from `sort_slots_fused`, gates (N, K).

    -> rows (N·K, d), gated, of which dropped slots' are never written; and gate and up (N·K, w),
    sorted, written if they are to be saved.
    """
    (E, w, d), K, slots = W_gate.shape, gates.shape[1], len(order)
    h, rows = x.new_empty(slots, w), x.new_empty(slots, d)
    gate, up = (torch.empty_like(h), torch.empty_like(h)) if save else (h, h)
    _up_kernel[how.grid("narrow", slots, E, w)](
        x, how.operand(W_gate, "narrow", "NK"), how.operand(W_up, "narrow", "NK"), order, offsets,
        gate, up, h, E, K, d, w, TMA=how.descriptors, SAVE=save, **how.options("narrow"))
    h, W_down = how.operand(h, "wide", "MK"), how.operand(W_down, "wide", "NK")
    _rows_kernel[how.grid("wide", slots, E, d)](
        h, W_down, h, W_down, order, offsets, gates, rows, E, d, w, TMA=how.descriptors,
        BACK=False, **how.options("wide"))
    return rows, gate, up


def grouped_backward(
    dy: Tensor, x: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    order: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, how: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy (N, d) -> rows of dx (N·K, d) and dg (N·K,), not written for dropped slots; dW, thrice."""
    (E, w, d), K, slots = W_gate.shape, gates.shape[1], len(order)
    dgate, dup, gated_h = (torch.empty_like(gate) for _ in range(3))
    BM, BN = how.tiles["wide"][:2]
    dg = gates.new_empty(slots, triton.cdiv(w, how.tiles["narrow"][1]), dtype=torch.float32)
    _back_kernel[how.grid("narrow", slots, E, w)](
        dy, how.operand(W_down, "narrow", "KN"), order, offsets, gates, gate, up, dgate, dup,
        gated_h, dg, E, K, d, w, TMA=how.descriptors, **how.options("narrow"))
    rows = x.new_empty(slots, d)
    _rows_kernel[how.grid("wide", slots, E, d)](
        how.operand(dgate, "wide", "MK"), how.operand(W_gate, "wide", "KN"),
        how.operand(dup, "wide", "MK"), how.operand(W_up, "wide", "KN"), order, offsets, gates,
        rows, E, d, w, TMA=how.descriptors, BACK=True, **how.options("wide"))
    dW = [torch.empty_like(W) for W in (W_gate, W_up, W_down)]
    # W_down is (d, w), the others (w, d)
    for a, b, out, along in zip((dgate, dup, gated_h), (x, x, dy), dW, ((d, 1), (d, 1), (1, w))):
        _weights_kernel[(E * triton.cdiv(w, BM) * triton.cdiv(d, BN),)](
            a, b, order, offsets, out, K, d, w, *along, **how.options("wide"))
    return rows, dg.sum(1), *dW


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gates, W_gate, W_up, W_down, order, offsets, keep, how):
        rows, gate, up = grouped_forward(x, gates, W_gate, W_up, W_down, order, offsets, how, True)
        ctx.save_for_backward(x, gates, W_gate, W_up, W_down, order, offsets, gate, up, keep)
        ctx.how = how
        return sum_slots(rows, gates.shape[1], keep)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *saved, keep = ctx.saved_tensors
        gates = saved[1]
        rows, dg, *dW = grouped_backward(dy.contiguous(), *saved, ctx.how)
        dg = dg.view_as(gates).to(gates.dtype)
        dg = dg if keep is None else dg.masked_fill(~keep, 0.0)
        return sum_slots(rows, gates.shape[1], keep), dg, *dW, None, None, None, None


@on_its_device
def experts_fused(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """Gated sum of the chosen experts, as `experts_loop` in moe/experts.py.

    x (N, d), indices and gates (N, K), W_gate and W_up (E, w, d), W_down (E, d, w), keep (N, K)
    bool or None for all -> (N, d), summed in fp32. x and weights: all fp32, all bf16 or all fp16.
    """
    tensors = _checked(x, indices, gates, W_gate, W_up, W_down)
    order, offsets = sort_slots_fused(indices, len(W_gate), keep)
    how = plan(x, W_gate, len(order))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Experts.apply(*tensors, order, offsets, keep, how)
    return sum_slots(grouped_forward(*tensors, order, offsets, how, False)[0], gates.shape[1], keep)


@on_its_device
def expert_rows(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None, slots: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `experts_fused` sums, (N, K, d), or the sum where slots are dropped. No gradient."""
    if keep is not None:
        return experts_fused(x, indices, gates, W_gate, W_up, W_down, keep)
    tensors = _checked(x, indices, gates, W_gate, W_up, W_down)
    slots = slots or sort_slots_fused(indices, len(W_gate))      # or `route_fused` has done it
    rows, _, _ = grouped_forward(*tensors, *slots, plan(x, W_gate, indices.numel()), False)
    return rows.unflatten(0, indices.shape)


def _checked(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor
) -> list[Tensor]:
    """x, gates and weights as kernels read them; ValueError for what they cannot multiply."""
    E, w, d = W_gate.shape
    expected = {"x": (x, (len(gates), d)), "indices": (indices, gates.shape),
                "W_up": (W_up, (E, w, d)), "W_down": (W_down, (E, d, w))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    kinds = {t.dtype for t in (x, W_gate, W_up, W_down)}
    if len(kinds) > 1 or not kinds < {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"x and weights: {', '.join(sorted(map(str, kinds)))}, expected one of "
                         "float32, bfloat16 and float16")
    check_device("x", x, _up_kernel)
    return [t.contiguous() for t in (x, gates, W_gate, W_up, W_down)]

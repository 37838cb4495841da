# SPDX-License-Identifier: MIT
"""essay

Copy with: cache_quant.py, latent_decode.py.  Needs: torch, triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.attention.cache_quant import lent_bits
from dsv2_ref.kernels.latent_decode import (
    Tile,
    check_cache,
    combine,
    load_seen,
    pieces,
    share_of_split,
    softmax_step,
    target_of,
)


def tile_for(dtype: torch.dtype, target: str) -> Tile:
    """Chosen by what compiles to what, not timed yet."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1, 1)
    return Tile(16, 64, 4, 3, 2)


@triton.jit
def _shift(x, N: tl.constexpr, PTX: tl.constexpr):
    """Bits N and up at the bottom; above them garbage, another in each form."""
    if PTX:
        return tl.inline_asm_elementwise(f"shr.u32 $0, $1, {N};", "=r,r", [x], tl.int16,
                                         is_pure=True, pack=2)
    return x >> N


@triton.jit
def _bits(x, MASK: tl.constexpr, PTX: tl.constexpr):
    """The bits of x under MASK as the mantissa of an fp16 number: 1024 + their value."""
    if PTX:
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK * 0x10001}, 0x64006400, 0xEA;", "=r,r", [x], tl.int16,
            is_pure=True, pack=2)
    return x & MASK | 0x6400


@triton.jit
def _more_bits(x, y, MASK: tl.constexpr, PTX: tl.constexpr):
    """The same, added to those of y."""
    if PTX:
        return tl.inline_asm_elementwise(f"lop3.b32 $0, $1, {MASK * 0x10001}, $2, 0xEA;",
                                         "=r,r,r", [x, y], tl.int16, is_pure=True, pack=2)
    return x & MASK | y


@triton.jit
def _minus(x, C: tl.constexpr, PTX: tl.constexpr):
    """fp16 x - C, for C = 1024 .. 2047: whole numbers, nothing is rounded."""
    if PTX:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 c; mov.b32 c, {(0x6000 + C) * 0x10001}; sub.rn.f16x2 $0, $1, c; }}",
            "=r,r", [x], tl.float16, is_pure=True, pack=2)
    return x - C


@triton.jit
def eight_fields(a, b, c, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Three planes of words -> eight tiles of fp16, 1024 + code or (v1, v4, v7) 1024 + 16·code.

    SPLIT is the mask of what C holds of v2 and v5: one bit or, where none is lent, two.
    """
    a6, b6, c6 = _shift(a, 6, PTX), _shift(b, 6, PTX), _shift(c, 6, PTX)
    v2 = _more_bits(_shift(c, 2, PTX), _bits(a6, 0xF, PTX), SPLIT, PTX)
    v5 = _more_bits(_shift(c, 4, PTX), _bits(b6, 0xF, PTX), SPLIT, PTX)
    v0, v1 = _bits(a, 0x3F, PTX), _bits(a6, 0x3F0, PTX)
    v3, v4 = _bits(b, 0x3F, PTX), _bits(b6, 0x3F0, PTX)
    v6, v7 = _bits(c, 0x3F, PTX), _bits(c6, 0x3F0, PTX)
    return (_fp16(v0), _fp16(v1), _fp16(v2), _fp16(v3), _fp16(v4), _fp16(v5), _fp16(v6), _fp16(v7))


@triton.jit
def _fp16(x):
    return x.to(tl.float16, bitcast=True)


@triton.jit
def _scores(q, k, s, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    """s + the sum of eight products of q (BH, ·) with k (BN, ·).

    The code of number 0 is 32 or, in v2 and v5, HALF. It is subtracted here or (PTX) by the caller,
    from the score.
    """
    for t in tl.static_range(8):
        key = k[t]
        if not PTX:
            key = (key - (1536 if t % 3 == 1 else 1024 + HALF if t % 3 == 2 else 1056)).to(q[t].dtype)
        s = tl.dot(q[t], tl.trans(key), s, input_precision=DOT)
    return s


@triton.jit
def _sums(p, v, acc, shrink, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    out = ()
    for t in tl.static_range(8):
        n = _minus(v[t], 1536 if t % 3 == 1 else 1024 + HALF if t % 3 == 2 else 1056, PTX)
        out = out + (tl.dot(p, n.to(p.dtype), acc[t] * shrink[:, None], input_precision=DOT),)
    return out


@triton.jit
def _three_planes(base, rows, stride, W: tl.constexpr, BW: tl.constexpr):
    """A, B, C of the tile's rows, (BN, BW) each; behind their W words come the first ones again."""
    at = base + rows[:, None] * stride + (tl.arange(0, BW) % W)[None, :]
    return tl.load(at), tl.load(at + W), tl.load(at + 2 * W)


@triton.jit
def _largest(q, row, real, D: tl.constexpr, B: tl.constexpr):
    x = tl.arange(0, B)
    q = tl.load(q + row[:, None] * D + x, mask=real & (x < D), other=0.0)
    return tl.max(tl.abs(q.to(tl.float32)), 1)


@triton.jit
def _queries(q, row, real, factor, TWO: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
             BW: tl.constexpr, TYPE: tl.constexpr, SHARE: tl.constexpr):
    """Eight tiles (BH, BW) of q·factor, in units of the fields they will meet; v2, v5 times TWO."""
    out = ()
    j = tl.arange(0, BW)
    for t in tl.static_range(8):
        x = t * W + j
        part = tl.load(q + row[:, None] * D + x, mask=real & (j < W) & (x < D), other=0.0)
        unit = 0.0625 if t % 3 == 1 else TWO if t % 3 == 2 else 1.0
        out = out + ((part.to(tl.float32) * (factor * unit)[:, None]).to(TYPE),)
    return out


@triton.jit
def _borrowing(q, row, real, factor, FIRST: tl.constexpr, LENT: tl.constexpr, D: tl.constexpr,
               W: tl.constexpr, BW: tl.constexpr, TYPE: tl.constexpr):
    """(BH, BW): q·factor of the RoPE numbers that borrowed from words FIRST .., doubled for bit 1."""
    j = tl.arange(0, BW)
    i = FIRST + j
    q = tl.load(q + row[:, None] * D + i % D, mask=real & (j < W) & (i < LENT * D), other=0.0)
    return (q.to(tl.float32) * factor[:, None] * tl.where(i < D, 1.0, 2.0)).to(TYPE)


@triton.jit
def _sum(q):
    return tl.sum(q.to(tl.float32), 1)


@triton.jit
def _offset(q, HALF: tl.constexpr):
    """What the scores with raw fields have too much."""
    low, high, split = _sum(q[0]), _sum(q[1]), _sum(q[2])
    low, high = low + _sum(q[3]) + _sum(q[6]), high + _sum(q[4]) + _sum(q[7])
    return low * 1056 + high * 1536 + (split + _sum(q[5])) * (1024 + HALF)


@triton.jit
def six_bit_kernel(
    q_c, q_r, words, scales, positions, table, o, lse, scale, S, n, n_h,
    stride_wb, stride_ws, stride_sb, stride_ss, stride_pb, stride_pt, stride_tb,
    D_C: tl.constexpr, D_R: tl.constexpr, LENT: tl.constexpr, W: tl.constexpr, W_R: tl.constexpr,
    BW: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    UNIT: tl.constexpr, TYPE: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr,
):
    TWO: tl.constexpr = 2 if LENT else 1
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BH + tl.arange(0, BH)
    seen = load_seen(positions, b, i, n, n_h, S, stride_pb, stride_pt)
    lo, hi, end = share_of_split(seen, BN)
    row, real = b * n + i, (i < n)[:, None]
    unit = tl.maximum(_largest(q_c, row, real, D_C, 8 * BW), _largest(q_r, row, real, D_R, 8 * BR))
    unit = tl.maximum(unit, 1e-30)
    q = _queries(q_c, row, real, 1 / unit, TWO, D_C, W, BW, TYPE, 1)
    r = _queries(q_r, row, real, (1 << LENT) / unit, 1, D_R, W_R, BR, TYPE, 1)
    fold_c, fold_r = tl.zeros([BH], tl.float32), tl.zeros([BH], tl.float32)
    if LENT:
        r2 = _borrowing(q_r, row, real, 1 / (128 * unit), 0, LENT, D_R, W, BW, TYPE)
        r5 = _borrowing(q_r, row, real, 1 / (512 * unit), W, LENT, D_R, W, BW, TYPE)
        fold_r += 1024 * (_sum(r2) + _sum(r5))
    if PTX:
        fold_c, fold_r = _offset(q, 32 // TWO), _offset(r, 32) + fold_r
    m, l, g = tl.full([BH], float("-inf"), tl.float32), tl.zeros([BH], tl.float32), 1e-30
    z = tl.zeros([BH, BW], tl.float32)
    acc = (z, z, z, z, z, z, z, z)
    page = b
    if PAGE:
        table += b * stride_tb
        page = tl.load(table + lo // PAGE, mask=lo < hi, other=0).to(tl.int64)
    for start in tl.range(lo, hi, BN):
        first = start % PAGE if PAGE else start
        rows = first + tl.minimum(tl.arange(0, BN), end - 1 - start)
        base = words + page * stride_wb * UNIT
        wa, wb, wc = _three_planes(base, rows, stride_ws * UNIT, W, BW)
        ra, rb, rc = _three_planes(base + 3 * W, rows, stride_ws * UNIT, W_R, BR)
        both = tl.load(scales + page * stride_sb + rows * stride_ss)
        if PAGE:
            page = tl.load(table + tl.minimum(start + BN, end - 1) // PAGE).to(tl.int64)
        s_c = (both << 16).to(tl.float32, bitcast=True)
        s_r = (both & -65536).to(tl.float32, bitcast=True)
        k = eight_fields(wa, wb, wc, 0x10 if LENT else 0x30, PTX)
        s = _scores(q, k, tl.zeros([BH, BN], tl.float32), 32 // TWO, PTX, DOT)
        s_rope = _scores(r, eight_fields(ra, rb, rc, 0x30, PTX), tl.zeros([BH, BN], tl.float32), 32, PTX, DOT)
        if LENT:
            s_rope = tl.dot(r2, tl.trans(_fp16(_bits(wc, 0x80, PTX)).to(TYPE)), s_rope, input_precision=DOT)
            s_rope = tl.dot(r5, tl.trans(_fp16(_bits(wc, 0x200, PTX)).to(TYPE)), s_rope, input_precision=DOT)
        s = (s - fold_c[:, None]) * s_c[None, :] + (s_rope - fold_r[:, None]) * s_r[None, :]
        s = s * (unit * scale)[:, None]
        s = tl.where((start + tl.arange(0, BN))[None, :] < seen[:, None], s, float("-inf"))
        p, shrink, m, l = softmax_step(s, m, l, 1)
        new = tl.maximum(g, tl.max(s_c, 0))
        p = (p * (s_c / new)[None, :]).to(TYPE)
        acc = _sums(p, k, acc, shrink * (g / new), 32 // TWO, PTX, DOT)
        g = new
    some = tl.where(l == 0.0, 1.0, l)
    to = (b * tl.num_programs(1) + tl.program_id(1)) * n + i
    tl.store(lse + to, m + tl.log2(some), mask=i < n)
    j = tl.arange(0, BW)
    for t in tl.static_range(8):
        unit_t = 0.0625 if t % 3 == 1 else TWO if t % 3 == 2 else 1.0
        x = t * W + j
        tl.store(o + to[:, None] * D_C + x, (acc[t] * (g * unit_t / some)[:, None]).to(o.dtype.element_ty), mask=real & (j < W) & (x < D_C))


def decode_six_bit(
    q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, positions: Tensor, scale: float,
    table: Tensor | None = None, splits: int | None = None, tile: Tile | None = None,
    ptx: bool | None = None,
) -> Tensor:
    (_, T, n_h, d_c), d_r = q_c.shape, q_r.shape[-1]
    target = target_of(q_c.device)
    tile = tile or tile_for(q_c.dtype, target)
    ptx = ptx if ptx is not None else target == "sm_90" and q_c.dtype != torch.float32
    PAGE = 0 if table is None else words.shape[1]
    check_cache(q_c, q_r, positions, words, scales, table, PAGE)
    w, w_r = -(-d_c // 8), -(-d_r // 8)
    S = words.shape[1] if table is None else PAGE * table.shape[1]
    words = words if words.stride(-1) == 1 else words.contiguous()
    both = (scales if scales.stride()[1:] == (2, 1) else scales.contiguous()).view(torch.int32)
    UNIT = 8 if words.stride(0) % 8 == words.stride(1) % 8 == 0 else 1
    o, lse, grid = pieces(q_c, S, tile, splits)
    table = positions if table is None else table.contiguous()
    f32 = q_c.dtype == torch.float32
    six_bit_kernel[grid](
        q_c.contiguous(), q_r.contiguous(), words, both, positions, table, o, lse,
        scale * 1.4426950408889634, S, T * n_h, n_h,
        words.stride(0) // UNIT, words.stride(1) // UNIT, *both.stride()[:2], *positions.stride(),
        table.stride(0), d_c, d_r, lent_bits(d_c, d_r), w, w_r,
        max(16, triton.next_power_of_2(w)), max(16, triton.next_power_of_2(w_r)),
        tile.BH, tile.BN, PAGE, UNIT, tl.float32 if f32 else tl.float16, ptx,
        "ieee" if f32 else "tf32", num_warps=tile.warps, num_stages=tile.stages)
    return combine(o, lse, q_c.dtype).unflatten(1, (T, n_h))

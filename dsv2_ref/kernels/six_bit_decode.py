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


@triton.constexpr_function
def ptx(FROM, MASK, FROM_Y, MASK_Y, MINUS) -> str:
    """What `_take` says, for the two numbers in a register. Bits that shift from one into the other
    are not under the masks."""
    pair = 0x10001
    code = f"shr.u32 s, $1, {FROM}; lop3.b32 s, s, {MASK * pair}, 0x64006400, 0xEA;"
    if MASK_Y:
        code += f" shr.u32 t, $2, {FROM_Y}; lop3.b32 s, t, {MASK_Y * pair}, s, 0xEA;"
    if MINUS:                                            # 0x6000 + MINUS is the number as fp16
        code += f" mov.b32 t, {(0x6000 + MINUS) * pair}; sub.rn.f16x2 s, s, t;"
    return f"{{ .reg .b32 s, t; {code} mov.b32 $0, s; }}"


@triton.jit
def _take(x, y, FROM: tl.constexpr, MASK: tl.constexpr, FROM_Y: tl.constexpr, MASK_Y: tl.constexpr,
          MINUS: tl.constexpr, PTX: tl.constexpr):
    """fp16 numbers 1024 + (x >> FROM & MASK | y >> FROM_Y & MASK_Y) - MINUS of int16 words.

    0x6400 is 1024 in fp16, whose last ten bits then count ones; nothing is rounded.
    """
    if PTX:
        return tl.inline_asm_elementwise(ptx(FROM, MASK, FROM_Y, MASK_Y, MINUS), "=r,r,r", [x, y],
                                         tl.float16, is_pure=True, pack=2)
    bits = x >> FROM & MASK | y >> FROM_Y & MASK_Y | 0x6400
    return bits.to(tl.float16, bitcast=True) - MINUS


@triton.jit
def field(a, b, c, t: tl.constexpr, HALF: tl.constexpr, SUBTRACT: tl.constexpr, PTX: tl.constexpr):
    """v_t of three planes of words, as 1024 + code or (v1, v4, v7) 1024 + 16·code; (BN, ·) fp16.

    HALF is the code of zero in v2 and v5: 16 if their highest bit is lent, else 32. To SUBTRACT is
    to give code - 32, 16·(code - 32), code - HALF.
    """
    word = a if t < 3 else b if t < 6 else c
    if t % 3 == 0:
        return _take(word, word, 0, 0x3F, 0, 0, 1056 if SUBTRACT else 0, PTX)
    if t % 3 == 1:
        return _take(word, word, 6, 0x3F0, 0, 0, 1536 if SUBTRACT else 0, PTX)
    return _take(word, c, 6, 0xF, 2 if t == 2 else 4, 2 * HALF - 16, 1024 + HALF if SUBTRACT else 0, PTX)


@triton.jit
def _scores(q, a, b, c, s, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    """s + the sum of eight products of q (BH, ·) with k (BN, ·).

    The code of number 0 is 32 or, in v2 and v5, HALF. It is subtracted here or (PTX) by the caller,
    from the score.
    """
    for t in tl.static_range(8):
        key = field(a, b, c, t, HALF, not PTX, PTX)
        s = tl.dot(q[t], tl.trans(key.to(q[t].dtype)), s, input_precision=DOT)
    return s


@triton.jit
def _sums(p, a, b, c, acc, shrink, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    out = ()
    for t in tl.static_range(8):
        n = field(a, b, c, t, HALF, True, PTX)
        out = out + (tl.dot(p, n.to(p.dtype), acc[t] * shrink, input_precision=DOT),)
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
    m, l = tl.full([BH], float("-inf"), tl.float32), tl.zeros([BH, BN], tl.float32)
    unit, nothing = unit * scale, tl.zeros([BH, BN], tl.float32)
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
        s = _scores(q, wa, wb, wc, nothing - fold_c[:, None], 32 // TWO, PTX, DOT)
        s_rope = _scores(r, ra, rb, rc, nothing - fold_r[:, None], 32, PTX, DOT)
        if LENT:
            bit = _take(wc, wc, 0, 0x80, 0, 0, 0, PTX).to(TYPE)  # 1024 + 128·bit
            s_rope = tl.dot(r2, tl.trans(bit), s_rope, input_precision=DOT)
            bit = _take(wc, wc, 0, 0x200, 0, 0, 0, PTX).to(TYPE)         # 1024 + 512·bit
            s_rope = tl.dot(r5, tl.trans(bit), s_rope, input_precision=DOT)
        s = (s * s_c[None, :] + s_rope * s_r[None, :]) * unit[:, None]
        s = tl.where((start + tl.arange(0, BN))[None, :] < seen[:, None], s, float("-inf"))
        e = tl.minimum(tl.maximum(both >> 7 & 0xFF, 27), 253)
        inverse = (254 - e << 23).to(tl.float32, bitcast=True)
        p, shrink, m = softmax_step(s + (e - 127).to(tl.float32)[None, :], m, 1)
        l = l * shrink + p * inverse[None, :]
        p = (p * (s_c * inverse)[None, :]).to(TYPE)
        acc = _sums(p, wa, wb, wc, acc, shrink, 32 // TWO, PTX, DOT)
    l = tl.sum(l, 1)
    some = tl.where(l == 0.0, 1.0, l)
    to = (b * tl.num_programs(1) + tl.program_id(1)) * n + i
    tl.store(lse + to, m + tl.log2(some), mask=i < n)
    j = tl.arange(0, BW)
    for t in tl.static_range(8):
        unit_t = 0.0625 if t % 3 == 1 else TWO if t % 3 == 2 else 1.0
        x = t * W + j
        tl.store(o + to[:, None] * D_C + x, (acc[t] * (unit_t / some)[:, None]).to(o.dtype.element_ty), mask=real & (j < W) & (x < D_C))


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

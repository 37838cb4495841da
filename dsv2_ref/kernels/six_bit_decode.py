# SPDX-License-Identifier: MIT
"""Decoding from the six-bit cache: rows are unpacked in registers, on their way to the matrix unit.

Section 3.2.3 stores the cache at 6 bits per number; attention/cache_quant.py says which 436 bytes a
row of 512 + 64 numbers takes, and its `attend_packed` is this kernel's naive twin. Read as it lies,
a row costs 2.6 times less traffic than in bf16, which is what decoding with 16 heads waits for.
With 128 heads the matrix units are the limit and six bits buy room, not speed.

A kernel that reads so little must not compute much: about 24 clock cycles are there for a token on
each multiprocessor. Splitting, paging and combining are those of latent_decode.py; what is new:

  fields      Word planes A, B, C (BN, w) hold eight tiles of codes, of w = d_c/8 neighbouring
              channels each. No tile is ever joined to another: scores are the sum of eight small
              products, and the output is eight accumulators.
  dequantise  A code becomes a number by putting its bits under those of 1024 in fp16, whose last
              ten mantissa bits count ones: and-or, no conversion. v1, v4 and v7 stay four bits
              higher, as 16·code, and the query for them is 16 times smaller.
  offsets     A number so made is too large by 1024 + 32 (where it is 16·code by 1024 + 512). Keys
              keep the excess: in a score it is 1056·Σq for every token, and is subtracted there.
              Values cannot: their average would be lost in the rounding of the large excess. So it
              is subtracted from each of their numbers.
  lent bits   The lowest bits of RoPE codes stand in the fields v2 and v5. They are two further
              tiles of 0 and 1, met by the queries that borrowed them: q_r and 2·q_r.
  scales      One per token for the latent, one for the RoPE key: both come to the scores, and the
              first to the weights too. Weights become fp16: the scale's power of two goes into the
              exponent of the softmax, so that no weight leaves fp16's range.

How it differs from low-bit kernels elsewhere: 1. no scale per group, whose multiplications eat the
gain; 2. on Hopper a pair of numbers shares an instruction of PTX assembly, since LLVM splits 16-bit
arithmetic into single numbers, three times the work; elsewhere the same bits come from plain
operations; 3. queries are scaled to at most 1 before they become fp16; 4. fp32 queries take fp32
products of exact integers. More than 16 heads share what is unpacked, 32 at a time. Nothing was
timed on a GPU yet.

Shapes: as in latent_decode.py; w, w_r words per plane (W, W_R), BW and BR columns of their tiles.
Copy with: latent_decode.py, target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from six_bit_decode import attend_six_bit
    q_c, q_r = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 4, 16)   # (B, T, n_h, d_h), (…, d_r)
    words = torch.randint(-2**15, 2**15, (2, 50, 3 * (8 + 2)), dtype=torch.int16)   # as packed by
    scales = torch.rand(2, 50, 2).bfloat16()                                        # cache_quant.py
    W_UK, W_UV = torch.randn(4, 32, 64), torch.randn(4, 24, 64)      # (n_h, d_h or d_v, d_c)
    positions = torch.tensor([[49], [20]])     # the second sequence has 21 tokens so far
    o = attend_six_bit(q_c, q_r, words, scales, W_UK, W_UV, 48**-0.5, positions)  # (B, T, n_h, d_v)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.latent_decode import (
    Tile,
    check_cache,
    combine,
    load_seen,
    no_gradient,
    pieces,
    share_of_split,
    softmax_step,
)
from dsv2_ref.kernels.target import on_its_device, target_of


def tile_for(n: int, dtype: torch.dtype, target: str) -> Tile:
    """Of a kernel for n rows of queries; chosen by what compiles to what, not timed yet.

    At 512 + 64, triton 3.7; nothing spills.
    """
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1, 1)             # exact rather than fast
    if target == "gfx942":
        return Tile(16, 32, 2, 1, 1)             # both warps compute all scores
    if target != "sm_90":
        return Tile(16, 32, 4, 3, 2)             # plain operations: 1333 instructions for 32 keys
    if n > 16:
        return Tile(32, 64, 8, 3, 1)             # 212 registers, 115,200 B
    return Tile(16, 64, 4, 3, 2)                 # 255 registers, 88,576 B; 1280 instructions


@triton.constexpr_function
def assembly(FROM, MASK, FROM_Y, MASK_Y, MINUS) -> str:
    """PTX of what `_take` says, for the two numbers in a register.

    Bits that shift from one number into the other are not under the masks.
    """
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

    All of it is one piece of assembly. Otherwise the compiler would shift once for keys and values
    together, and the shifted words would stay in registers during the softmax: they would spill.
    """
    if PTX:
        return tl.inline_asm_elementwise(assembly(FROM, MASK, FROM_Y, MASK_Y, MINUS), "=r,r,r",
                                         [x, y], tl.float16, is_pure=True, pack=2)
    bits = x >> FROM & MASK | y >> FROM_Y & MASK_Y | 0x6400
    return bits.to(tl.float16, bitcast=True) - MINUS


@triton.jit
def field(words, t: tl.constexpr, HALF: tl.constexpr, SUBTRACT: tl.constexpr, PTX: tl.constexpr):
    """v_t of planes A, B, C: (BN, ·) fp16, 1024 + code or (v1, v4, v7) 1024 + 16·code.

    HALF is the code of 0 in v2 and v5: 16 where their highest bit is lent, else 32. To SUBTRACT is
    to give code - 32, 16·(code - 32), code - HALF.
    """
    x, c = words[t // 3], words[2]
    if t % 3 == 0:
        return _take(x, c, 0, 0x3F, 0, 0, 1056 if SUBTRACT else 0, PTX)
    if t % 3 == 1:
        return _take(x, c, 6, 0x3F0, 0, 0, 1536 if SUBTRACT else 0, PTX)
    return _take(x, c, 6, 0xF, 2 if t == 2 else 4, 2 * HALF - 16,        # bit 4, or bits 5 and 4
                 1024 + HALF if SUBTRACT else 0, PTX)


@triton.jit
def _products(q, words, s, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    """s (BH, BN) + eight products of queries and codes; without PTX of queries and numbers."""
    for t in tl.static_range(8):
        key = field(words, t, HALF, not PTX, PTX).to(q[t].dtype)
        s = tl.dot(q[t], tl.trans(key), s, input_precision=DOT)
    return s


@triton.jit
def _scores(q, r, lent, words, rope, fold_c, fold_r, both, BH: tl.constexpr, BN: tl.constexpr,
            LENT: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    """(BH, BN), each part times its tokens' scales, two bf16 in an int32."""
    nothing = tl.zeros([BH, BN], tl.float32)
    s = _products(q, words, nothing - fold_c[:, None], 16 if LENT else 32, PTX, DOT)
    s_r = _products(r, rope, nothing - fold_r[:, None], 32, PTX, DOT)
    if LENT:
        for L in tl.static_range(2):             # bit 5 of v2 and of v5: 1024 + 128 or 512
            bit = _take(words[2], words[2], 0, 512 if L else 128, 0, 0, 0, PTX).to(lent[L].dtype)
            s_r = tl.dot(lent[L], tl.trans(bit), s_r, input_precision=DOT)
    first = (both << 16).to(tl.float32, bitcast=True)
    second = (both & -65536).to(tl.float32, bitcast=True)
    return s * first[None, :] + s_r * second[None, :], first


@triton.jit
def _averages(p, words, acc, shrink, HALF: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr):
    out = ()
    for t in tl.static_range(8):
        v = field(words, t, HALF, True, PTX).to(p.dtype)
        out = out + (tl.dot(p, v, acc[t] * shrink, input_precision=DOT),)
    return out


@triton.jit
def _planes(base, rows, stride, W: tl.constexpr, BW: tl.constexpr):
    """A, B, C (BN, BW) of some rows; behind their W words come the first ones again, unused."""
    at = base + rows[:, None] * stride + (tl.arange(0, BW) % W)[None, :]
    return tl.load(at), tl.load(at + W), tl.load(at + 2 * W)


@triton.jit
def _largest(q, row, real, D: tl.constexpr, B: tl.constexpr):
    x = tl.arange(0, B)
    q = tl.load(q + row[:, None] * D + x, mask=real & (x < D), other=0.0)
    return tl.max(tl.abs(q.to(tl.float32)), 1)


@triton.jit
def _parts(q, row, real, factor, TWO: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
           BW: tl.constexpr, TYPE: tl.constexpr):
    """Eight tiles (BH, BW) of q·factor, in the units of the fields they meet; v2, v5 times TWO."""
    out = ()
    j = tl.arange(0, BW)
    for t in tl.static_range(8):
        x = t * W + j
        part = tl.load(q + row[:, None] * D + x, mask=real & (j < W) & (x < D), other=0.0)
        unit = 0.0625 if t % 3 == 1 else TWO if t % 3 == 2 else 1.0
        out = out + ((part.to(tl.float32) * (factor * unit)[:, None]).to(TYPE),)
    return out


@triton.jit
def _borrowers(q_r, row, real, factor, FIRST: tl.constexpr, LENT: tl.constexpr, D: tl.constexpr,
               W: tl.constexpr, BW: tl.constexpr, TYPE: tl.constexpr):
    """(BH, BW): q_r·factor of whoever borrowed from words FIRST, FIRST + 1, ..; twice for bit 1."""
    i = FIRST + tl.arange(0, BW)
    lent = (i < FIRST + W) & (i < LENT * D)
    q = tl.load(q_r + row[:, None] * D + i % D, mask=real & lent, other=0.0)
    return (q.to(tl.float32) * factor[:, None] * tl.where(i < D, 1.0, 2.0)).to(TYPE)


@triton.jit
def _sum(q):
    return tl.sum(q.to(tl.float32), 1)


@triton.jit
def _fold(q, HALF: tl.constexpr):
    """What scores with codes have too much, (BH)."""
    low, high = _sum(q[0]) + _sum(q[3]) + _sum(q[6]), _sum(q[1]) + _sum(q[4]) + _sum(q[7])
    return low * 1056 + high * 1536 + (_sum(q[2]) + _sum(q[5])) * (1024 + HALF)


@triton.jit
def _load_queries(q_c, q_r, row, real, D_C: tl.constexpr, D_R: tl.constexpr, LENT: tl.constexpr,
                  W: tl.constexpr, W_R: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
                  TYPE: tl.constexpr, PTX: tl.constexpr):
    """Tiles for latents, RoPE and lent bits; what to take off; and what one unit of them is."""
    TWO: tl.constexpr = 2 if LENT else 1         # a lender's codes are two scales apart
    unit = tl.maximum(_largest(q_c, row, real, D_C, 8 * BW), _largest(q_r, row, real, D_R, 8 * BR))
    unit = tl.maximum(unit, 1e-30)
    q = _parts(q_c, row, real, 1 / unit, TWO, D_C, W, BW, TYPE)
    r = _parts(q_r, row, real, (1 << LENT) / unit, 1, D_R, W_R, BR, TYPE)
    lent = (_borrowers(q_r, row, real, 1 / 128 / unit, 0, LENT, D_R, W, BW, TYPE),
            _borrowers(q_r, row, real, 1 / 512 / unit, W, LENT, D_R, W, BW, TYPE))
    fold_c, fold_r = tl.zeros_like(unit), 1024 * (_sum(lent[0]) + _sum(lent[1]))
    if PTX:
        fold_c, fold_r = _fold(q, 32 // TWO), fold_r + _fold(r, 32)
    return q, r, lent, fold_c, fold_r, unit


@triton.jit
def _store(o, to, real, acc, l, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
           TWO: tl.constexpr):
    j = tl.arange(0, BW)
    for t in tl.static_range(8):
        x = t * W + j
        unit = 0.0625 if t % 3 == 1 else TWO if t % 3 == 2 else 1.0
        tl.store(o + to[:, None] * D + x, acc[t] * (unit / l)[:, None],
                 mask=real & (j < W) & (x < D))


@triton.jit(do_not_specialize=["S", "stride_pb", "stride_pt", "stride_tb"])
def six_bit_kernel(
    q_c, q_r, words, scales, positions, table, o, lse, scale, S, n, n_h,
    stride_wb, stride_ws, stride_sb, stride_ss, stride_pb, stride_pt, stride_tb,
    D_C: tl.constexpr, D_R: tl.constexpr, LENT: tl.constexpr, W: tl.constexpr, W_R: tl.constexpr,
    BW: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    STEP: tl.constexpr, TYPE: tl.constexpr, PTX: tl.constexpr, DOT: tl.constexpr,
):
    """Grid (⌈n/BH⌉, splits, B), as `decode_kernel`; strides of words in STEP of them."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BH + tl.arange(0, BH)
    seen = load_seen(positions, b, i, n, n_h, S, stride_pb, stride_pt)
    lo, hi, end = share_of_split(seen, BN)
    real = (i < n)[:, None]
    q, r, lent, fold_c, fold_r, unit = _load_queries(
        q_c, q_r, b * n + i, real, D_C, D_R, LENT, W, W_R, BW, BR, TYPE, PTX)
    unit *= scale
    m, l = tl.full([BH], float("-inf"), tl.float32), tl.zeros([BH, BN], tl.float32)
    z = tl.zeros([BH, BW], tl.float32)
    acc = (z, z, z, z, z, z, z, z)
    page = b                                     # without pages a sequence is one page
    if PAGE:
        table += b * stride_tb
        page = tl.load(table + lo // PAGE, mask=lo < hi, other=0).to(tl.int64)
    for start in tl.range(lo, hi, BN):
        first = start % PAGE if PAGE else start
        rows = first + tl.minimum(tl.arange(0, BN), end - 1 - start)
        base = words + page * stride_wb * STEP
        latents = _planes(base, rows, stride_ws * STEP, W, BW)
        rope = _planes(base + 3 * W, rows, stride_ws * STEP, W_R, BR)
        both = tl.load(scales + page * stride_sb + rows * stride_ss)
        if PAGE:
            page = tl.load(table + tl.minimum(start + BN, end - 1) // PAGE).to(tl.int64)
        s, s_c = _scores(q, r, lent, latents, rope, fold_c, fold_r, both, BH, BN, LENT, PTX, DOT)
        s = tl.where((start + tl.arange(0, BN))[None, :] < seen[:, None], s * unit[:, None],
                     float("-inf"))
        # s_c is about 2^(e - 127); fp32 has room for scales 2^120 apart, zero counting as 2^-100
        e = tl.minimum(tl.maximum(both >> 7 & 0xFF, 27), 253)
        power = (254 - e << 23).to(tl.float32, bitcast=True)             # 2^(127 - e)
        p, shrink, m = softmax_step(s + (e - 127).to(tl.float32)[None, :], m, 1)
        l = l * shrink + p * power[None, :]      # p is a weight times 2^(e - 127)
        acc = _averages((p * (s_c * power)[None, :]).to(TYPE), latents, acc, shrink,
                        16 if LENT else 32, PTX, DOT)
    l = tl.sum(l, 1)
    some = tl.where(l == 0.0, 1.0, l)            # nothing seen: o = 0, lse = -inf
    to = (b * tl.num_programs(1) + tl.program_id(1)) * n + i
    tl.store(lse + to, m + tl.log2(some), mask=i < n)
    _store(o, to, real, acc, some, D_C, W, BW, 2 if LENT else 1)


@on_its_device
def decode_six_bit(
    q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, positions: Tensor, scale: float,
    table: Tensor | None = None, splits: int | None = None, tile: Tile | None = None,
) -> Tensor:
    """`decode_latent` on packed rows: words (B, S, 3·(w + w_r)) int16 and scales (B, S, 2) bf16.

    With pages both are (pages, tokens, ·).  -> (B, T, n_h, d_c).
    """
    (_, T, n_h, d_c), d_r = q_c.shape, q_r.shape[-1]
    w, w_r = -(-d_c // 8), -(-d_r // 8)
    target, exact = target_of(q_c.device), q_c.dtype == torch.float32
    tile = tile or tile_for(T * n_h, q_c.dtype, target)
    PAGE = 0 if table is None else words.shape[1]
    check_cache(q_c, q_r, positions, words, scales, table, PAGE, six_bit_kernel)
    if words.dtype != torch.int16 or words.shape[-1] != 3 * (w + w_r):
        raise ValueError(f"words: {words.shape[-1]} of {words.dtype} a row, expected "
                         f"{3 * (w + w_r)} of torch.int16 for d_c = {d_c}, d_r = {d_r}")
    if scales.dtype != torch.bfloat16 or scales.shape[-1] != 2:
        raise ValueError(f"scales: {scales.shape[-1]} of {scales.dtype} a row, expected 2 of "
                         f"torch.bfloat16")
    S = words.shape[1] if table is None else PAGE * table.shape[1]
    words = words if words.stride(-1) == 1 else words.contiguous()
    # strides are multiples of 8 at V2's sizes, and known as such a row is loaded 16 bytes at a time
    STEP = 8 if words.stride(0) % 8 == words.stride(1) % 8 == 0 else 1
    even = scales.stride(-1) == 1 and all(x % 2 == 0 for x in scales.stride()[:2])
    both = (scales if even else scales.contiguous()).view(torch.int32)
    o, lse, grid = pieces(q_c, S, tile, splits)
    table = positions if table is None else table.contiguous()
    six_bit_kernel[grid](
        q_c.contiguous(), q_r.contiguous(), words, both, positions, table, o, lse,
        scale * 1.4426950408889634, S, T * n_h, n_h, words.stride(0) // STEP,
        words.stride(1) // STEP, *both.stride()[:2], *positions.stride(), table.stride(0),
        d_c, d_r, min(2, 2 * w // d_r), w, w_r,                  # lent_bits of cache_quant.py
        max(32, triton.next_power_of_2(w)), max(16, triton.next_power_of_2(w_r)),
        tile.BH, tile.BN, PAGE, STEP, tl.float32 if exact else tl.float16,
        target == "sm_90" and not exact, "ieee" if exact else "tf32",
        num_warps=tile.warps, num_stages=tile.stages)
    return combine(o, lse, q_c.dtype).unflatten(1, (T, n_h))


def attend_six_bit(
    q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """`attend_packed` of cache_quant.py, on a GPU; the same shapes. There is no gradient."""
    T, S = q_c.shape[1], words.shape[1]
    no_gradient("attend_six_bit", q_c, q_r)
    if positions is None:
        positions = torch.arange(S - T, S, device=q_c.device)[None]
    q_latent = torch.einsum("bthd,hdc->bthc", q_c, W_UK)
    o = decode_six_bit(q_latent, q_r, words, scales, positions.expand(len(q_c), T), scale)
    return torch.einsum("bthc,hvc->bthv", o, W_UV)

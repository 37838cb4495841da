# SPDX-License-Identifier: MIT
"""Rows of the latent cache quantised to six bits and packed, a program a row: one launch.

Section 3.2.3; the scheme and the layout of the words are in attention/cache_quant.py, whose
`pack_rows` this equals bit for bit. What takes torch over a hundred small launches a layer, each
reading and writing a row of 576 numbers, is here done between one load and one store.

How this file differs from its twin:
  1. The smallest bf16 number that is not below an fp32 number >= 0 is made from its bits: those
     above the lower sixteen, plus one if any of these is set. It has the twin's cases in it, also
     that of a number which leaves bf16's range and becomes infinity.
  2. Divisions are rounded correctly (`div_rn`), which Triton's own are not on a card, or a number
     half way between two codes would get the other one.
  3. A number is rounded to an integer, halves to even, by adding 3·2^22 and taking it off again.
  4. The bits that a lender holds belong to RoPE numbers that other threads have: their codes are
     made again from the row, which costs less than to exchange them.

Launch: a row per program, 2 warps. Not timed yet.

Shapes: d_c latent size, d_r RoPE size; w = d_c/8 and w_r = d_r/8 words a plane, rounded up.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from pack_six_bits import pack_rows_fused
    words, scales = pack_rows_fused(torch.randn(2, 5, 64), torch.randn(2, 5, 16))
    assert words.shape == (2, 5, 30) and scales.shape == (2, 5, 2)       # int16, bf16
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.target import check_device, on_its_device


@triton.jit
def _bf16_above(least):
    """Bits of the smallest bf16 number >= `least` >= 0."""
    return (least.to(tl.int32, bitcast=True) + 0xFFFF) >> 16


@triton.jit
def _largest(x, limit):
    """The largest |x| / limit of all x (8, ·), limits (8, 1); NaN where a number is."""
    most = tl.max(tl.max(tl.div_rn(tl.abs(x), limit), 0), 0)
    return tl.where(tl.sum(tl.sum((x != x).to(tl.int32), 0), 0) > 0, float("nan"), most)


@triton.jit
def _divisor(bits):
    """The scale, or 1 for a row of zeros."""
    return tl.where(bits == 0, 1.0, (bits << 16).to(tl.float32, bitcast=True))


@triton.jit
def _codes(x, scale, step, half: tl.constexpr):
    """The codes of x: its integers, multiples of `step`, plus half; of NaN some code."""
    n = tl.div_rn(x, scale * step) + 12582912.0 - 12582912.0
    n = tl.maximum(tl.minimum(n, half / step - 1), -half) * step
    return tl.where(n == n, n, 0.0).to(tl.int32) + half


@triton.jit
def _store_words(words, codes, t, j, w: tl.constexpr):
    """Codes (8, ·) of six bits, field t of word j, as planes A, B, C of w words."""
    middle = (codes & 15) << 6
    a = tl.where(t == 0, codes, tl.where(t == 1, codes << 10, tl.where(t == 2, middle, 0)))
    b = tl.where(t == 3, codes, tl.where(t == 4, codes << 10, tl.where(t == 5, middle, 0)))
    c = tl.where(t == 6, codes, tl.where(t == 7, codes << 10, 0))
    c += tl.where(t == 2, codes >> 4 << 6, tl.where(t == 5, codes >> 4 << 8, 0))
    tl.store(words + j, tl.sum(a, 0).to(tl.int16), mask=j < w)
    tl.store(words + w + j, tl.sum(b, 0).to(tl.int16), mask=j < w)
    tl.store(words + 2 * w + j, tl.sum(c, 0).to(tl.int16), mask=j < w)


@triton.jit
def _pack_kernel(
    c_kv, k_r, words, scales, D_C: tl.constexpr, D_R: tl.constexpr, LENT: tl.constexpr,
    W: tl.constexpr, W_R: tl.constexpr,
):
    """One row: words (3·(W + W_R),), and the bits of its two scales."""
    row = tl.program_id(0).to(tl.int64)
    c_kv, k_r, words = c_kv + row * D_C, k_r + row * D_R, words + row * 3 * (W + W_R)
    half: tl.constexpr = 32 << LENT                          # of the RoPE codes
    t = tl.arange(0, 8)[:, None]
    j, i = tl.arange(0, triton.next_power_of_2(W)), tl.arange(0, triton.next_power_of_2(W_R))
    in_c = (j[None] < W) & (t * W + j[None] < D_C)
    in_r = (i[None] < W_R) & (t * W_R + i[None] < D_R)
    latents = tl.load(c_kv + t * W + j[None], mask=in_c, other=0.0).to(tl.float32)
    rope = tl.load(k_r + t * W_R + i[None], mask=in_r, other=0.0).to(tl.float32)
    lends = ((t == 2) | (t == 5)) & (LENT > 0)
    step = tl.where(lends, 2.0, 1.0)
    # half a step short of the largest code's next: clipped there, a number errs by half a step
    c_bits = _bf16_above(_largest(latents, 32 - step / 2))
    r_bits = _bf16_above(_largest(rope, tl.zeros_like(step) + (half - 0.5)))
    tl.store(scales + row * 2, c_bits.to(tl.int16))
    tl.store(scales + row * 2 + 1, r_bits.to(tl.int16))
    s_c, s_r = _divisor(c_bits), _divisor(r_bits)
    codes = tl.where(in_c, _codes(latents, s_c, step, 32), 0)
    if LENT > 0:
        bit = (t // 5) * W + j[None]             # of those lent: all of t = 2 before all of t = 5
        theirs = lends & (j[None] < W) & (bit < LENT * D_R)
        lent = tl.load(k_r + bit % D_R, mask=theirs, other=0.0).to(tl.float32)
        lent = _codes(lent, s_r, tl.zeros_like(step) + 1.0, half) >> bit // D_R & 1
        codes = tl.where(lends, codes >> 1 | tl.where(theirs, lent, 0) << 5, codes)
    _store_words(words, codes, t, j, W)
    rope = tl.where(in_r, _codes(rope, s_r, tl.zeros_like(step) + 1.0, half), 0) >> LENT
    _store_words(words + 3 * W, rope, t, i, W_R)


@on_its_device
def pack_rows_fused(c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
    """`pack_rows` of cache_quant.py: c_kv (..., d_c), k_r (..., d_r) in fp32, bf16 or fp16 ->
    words (..., 3·(w + w_r)) int16, scales (..., 2) bf16.

    A row with NaN or infinity gets a scale that is NaN or infinity, and reads back as NaN.
    """
    for name, x in (("c_kv", c_kv), ("k_r", k_r)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: dtype {x.dtype}, expected float32, bfloat16 or float16")
        check_device(name, x, _pack_kernel)
    if c_kv.shape[:-1] != k_r.shape[:-1]:
        raise ValueError(f"k_r: shape {tuple(k_r.shape)}, expected a row for each of c_kv "
                         f"{tuple(c_kv.shape)}")
    rows, d_c, d_r = c_kv.shape[:-1], c_kv.shape[-1], k_r.shape[-1]
    w, w_r = -(-d_c // 8), -(-d_r // 8)
    words = torch.empty(*rows, 3 * (w + w_r), dtype=torch.int16, device=c_kv.device)
    scales = torch.empty(*rows, 2, dtype=torch.int16, device=c_kv.device)
    if n := rows.numel():
        _pack_kernel[(n,)](c_kv.contiguous(), k_r.contiguous(), words, scales, d_c, d_r,
                           min(2, 2 * w // d_r), w, w_r, num_warps=2)     # lent_bits
    return words, scales.view(torch.bfloat16)

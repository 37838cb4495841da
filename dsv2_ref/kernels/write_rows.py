# SPDX-License-Identifier: MIT
"""New rows of a cache written to their places, a program a row: plain, or packed in six bits.

Section 2.1.2: of each token a layer caches [c_kv ; k_r]. Torch joins the two, picks the rows of
tokens that are no padding and puts them where they belong, a launch each. The cache of section
3.2.3 quantises and packs a row before, in over a hundred launches more. Here a program knows which
row it takes and where that is to stand, and all of it is done between one load and one store.

  write_latent_fused    the row as it is, in the cache's dtype.
  write_six_bit_fused   quantised and packed; the scheme and the layout of the words are those of
                        attention/cache_quant.py, whose `pack_rows` this equals bit for bit.

How this file differs from its twins, `write` of the caches in attention/:
  1. The smallest bf16 number that is not below an fp32 number >= 0 is made from its bits: those
     above the lower sixteen, plus one if any of these is set. It has the twin's cases in it, also
     that of a number which leaves bf16's range and becomes infinity.
  2. Divisions are rounded correctly (`div_rn`), which Triton's own are not on a card, or a number
     half way between two codes would get the other one.
  3. A number is rounded to an integer, halves to even, by adding 3·2^22 and taking it off again.
  4. The bits that a lender holds belong to RoPE numbers that other threads have: their codes are
     made again from the row, which costs less than to exchange them.

Row real[r] of the B·T new ones (r itself, without `real`) goes to places[r], which is
slot·max_tokens + position: pages and sequences of different lengths need nothing else.
Launch: a row per program, 2 warps. Not timed yet.

Shapes: B batch, T new tokens, R rows that are stored, d_c latent size, d_r RoPE size; w = d_c/8 and
w_r = d_r/8 words a plane, rounded up.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from write_rows import write_latent_fused, write_six_bit_fused
    c_kv, k_r = torch.randn(2, 3, 64), torch.randn(2, 3, 16)         # (B, T, d_c), (B, T, d_r)
    places = torch.tensor([7, 8, 9, 47])         # tokens 7, 8, 9 of a sequence, 7 of the other,
    real = torch.tensor([0, 1, 2, 3])            # whose other two rows are padding
    rows = torch.zeros(2, 40, 80)                                    # (slots, max_tokens, d_c+d_r)
    write_latent_fused(c_kv, k_r, rows, places, real)
    words, scales = torch.zeros(2, 40, 30).short(), torch.zeros(2, 40, 2).bfloat16()
    write_six_bit_fused(c_kv, k_r, words, scales, places, real)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.target import check_device, on_its_device


@triton.jit
def _write_kernel(
    c_kv, k_r, rows, places, real, D_C: tl.constexpr, D_R: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, REAL: tl.constexpr,
):
    """One row, in two pieces."""
    row = tl.load(real + tl.program_id(0)) if REAL else tl.program_id(0).to(tl.int64)
    to = rows + tl.load(places + tl.program_id(0)) * (D_C + D_R)
    i, j = tl.arange(0, BC), tl.arange(0, BR)
    c = tl.load(c_kv + row * D_C + i, mask=i < D_C, other=0.0)
    r = tl.load(k_r + row * D_R + j, mask=j < D_R, other=0.0)
    tl.store(to + i, c.to(rows.dtype.element_ty), mask=i < D_C)
    tl.store(to + D_C + j, r.to(rows.dtype.element_ty), mask=j < D_R)


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
    c_kv, k_r, words, scales, places, real, D_C: tl.constexpr, D_R: tl.constexpr,
    LENT: tl.constexpr, W: tl.constexpr, W_R: tl.constexpr, REAL: tl.constexpr,
):
    """One row: words (3·(W + W_R),), and the bits of its two scales."""
    row = tl.load(real + tl.program_id(0)) if REAL else tl.program_id(0).to(tl.int64)
    place = tl.load(places + tl.program_id(0))
    c_kv, k_r, words = c_kv + row * D_C, k_r + row * D_R, words + place * 3 * (W + W_R)
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
    tl.store(scales + place * 2, c_bits.to(tl.int16))
    tl.store(scales + place * 2 + 1, r_bits.to(tl.int16))
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


def _check(
    c_kv: Tensor, k_r: Tensor, places: Tensor, real: Tensor | None, kernel: object,
    stores: dict[str, tuple[Tensor, torch.dtype, int]],
) -> None:
    """ValueError unless rows (B, T, ·) can go to `places` of stores (slots, max_tokens, ·)."""
    for name, x in (("c_kv", c_kv), ("k_r", k_r)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: dtype {x.dtype}, expected float32, bfloat16 or float16")
        check_device(name, x, kernel)
    if c_kv.ndim != 3 or c_kv.shape[:2] != k_r.shape[:2]:
        raise ValueError(f"c_kv, k_r: shapes {tuple(c_kv.shape)}, {tuple(k_r.shape)}, expected "
                         "(B, T, d_c), (B, T, d_r)")
    for name, (x, dtype, n) in stores.items():
        if x.dtype != dtype or x.ndim != 3 or x.shape[2] != n or not x.is_contiguous():
            raise ValueError(f"{name}: {x.dtype} of shape {tuple(x.shape)}, expected {dtype} of "
                             f"(slots, max_tokens, {n}) without gaps")
    R, given = len(places), c_kv.shape[0] * c_kv.shape[1]
    if R > given or (R < given and real is None) or (real is not None and len(real) != R):
        raise ValueError(f"places: {R}, expected one for each of {given} rows, or of those in "
                         "`real`")
    if any(x.dtype != torch.int64 for x in (places, real) if x is not None):
        raise ValueError("places, real: expected int64")


@on_its_device
def write_latent_fused(
    c_kv: Tensor, k_r: Tensor, rows: Tensor, places: Tensor, real: Tensor | None = None
) -> None:
    """`LatentCache.write` of one layer: c_kv (B, T, d_c), k_r (B, T, d_r) into rows (slots,
    max_tokens, d_c + d_r), all fp32, bf16 or fp16; places and real (R,) int64.
    """
    d_c, d_r = c_kv.shape[-1], k_r.shape[-1]
    # under autocast new rows are in its dtype
    free = torch.is_autocast_enabled(c_kv.device.type)
    dtype = rows.dtype if free else torch.promote_types(c_kv.dtype, k_r.dtype)
    _check(c_kv, k_r, places, real, _write_kernel, {"rows": (rows, dtype, d_c + d_r)})
    if len(places):
        _write_kernel[(len(places),)](
            c_kv.contiguous(), k_r.contiguous(), rows, places, places if real is None else real,
            d_c, d_r, triton.next_power_of_2(d_c), triton.next_power_of_2(d_r), real is not None,
            num_warps=2)


@on_its_device
def write_six_bit_fused(
    c_kv: Tensor, k_r: Tensor, words: Tensor, scales: Tensor, places: Tensor,
    real: Tensor | None = None,
) -> None:
    """`SixBitCache.write` of one layer: the same, into words (slots, max_tokens, 3·(w + w_r)) int16
    and scales (slots, max_tokens, 2) bf16.

    A row with NaN or infinity gets a scale that is NaN or infinity, and reads back as NaN.
    """
    d_c, d_r = c_kv.shape[-1], k_r.shape[-1]
    w, w_r = -(-d_c // 8), -(-d_r // 8)
    _check(c_kv, k_r, places, real, _pack_kernel, {
        "words": (words, torch.int16, 3 * (w + w_r)), "scales": (scales, torch.bfloat16, 2)})
    if len(places):
        _pack_kernel[(len(places),)](
            c_kv.contiguous(), k_r.contiguous(), words, scales.view(torch.int16), places,
            places if real is None else real, d_c, d_r, min(2, 2 * w // d_r), w, w_r,    # lent_bits
            real is not None, num_warps=2)

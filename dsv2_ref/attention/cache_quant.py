# SPDX-License-Identifier: MIT
"""The latent cache at six bits a number: quantise, pack, attend to the packed rows.

Section 3.2.3 has one sentence about it: for deployment the KV cache is quantised "to 6 bits for
each element on average". The scheme is ours; dsv2_ref/bench/cache_quality.py measures it beside
its rivals. A row of 512 + 64 numbers takes 436 bytes, everything counted, where bf16 takes 1152:
6.06 bits a number. The 93.3 % that the paper saves over DeepSeek 67B is only reached with it.

One scale a token for the latent and one for the RoPE key: a number is an integer times a scale.
A scale for every group of numbers would be finer, but a decoding kernel then multiplies every
number by one, where here it multiplies scores and weights; and groups cost bits.

Where should the bits go? With six bits everywhere the RoPE key, a ninth of the row, does over nine
tenths of the harm (KL against exact logits, two small trained models). So two of every eight
latents make do with 5 bits and lend the sixth to the RoPE key. In the proportion of V2,
d_c = 8·d_r, each RoPE number then has 8 bits, in the same 436 bytes (d_c = 4·d_r: 7 bits).

Three int16 words hold eight codes of six bits; `pack` draws the layout bit by bit. The two bf16
scales of a token stand in a tensor of their own, so that rows of 512 + 64 keep a stride of
432 = 27·16 bytes, and every plane of words begins at a multiple of 16. Sizes that 8 does not
divide are padded; `nbytes` counts that too.

How it differs from others: 1. scales are rounded up, never down, so no number is clipped and the
error is at most half a step; 2. 64 codes span 63 steps with zero as a code of its own: the largest
number is the one that lies half a step off; 3. a row with NaN or infinity is refused on a CPU, and
on a GPU, which would have to wait, read back as NaN; 4. new tokens attend to their own stored row,
in prefill too: otherwise chunks would change the result; 5. no statistics of any text are needed,
and nothing is rotated: what a change of weights can do beforehand is in latent_basis.py.

Shapes: B batch, T new tokens, S = cached + new tokens, n_h heads; W = 3·(w + w_r) words.
Copy with: kv_cache.py.  Needs: torch.

Wiring, once copied:
    import torch
    from cache_quant import SixBitCache, attend_packed
    cache = SixBitCache(n_layers=1, batch=2, max_tokens=40, d_c=64, d_r=16)
    cache.write(0, torch.randn(2, 9, 64), torch.randn(2, 9, 16))     # c_kv (B, T, d_c), k_r
    q_c, q_r = torch.randn(2, 9, 4, 32), torch.randn(2, 9, 4, 16)    # (B, T, n_h, d_h), (…, d_r)
    W_UK, W_UV = torch.randn(4, 32, 64), torch.randn(4, 24, 64)      # (n_h, d_h or d_v, d_c)
    o = attend_packed(q_c, q_r, *cache.rows(0), W_UK, W_UV, scale=48**-0.5)    # (B, T, n_h, d_v)
    cache.advance()
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref.attention.kv_cache import Cache

LENDERS = [2, 5]        # of every eight latents


def lent_bits(d_c: int, d_r: int) -> int:
    """Bits that each RoPE number borrows from the latents: 2 if they have as many to lend."""
    return min(2, 2 * -(-d_c // 8) // d_r)


def steps(d_c: int, d_r: int, device: torch.device | str = "cpu") -> Tensor:
    """The distance of a latent's neighbouring codes in scales, (d_c,): 2 where a bit is lent."""
    tile = torch.arange(d_c, device=device) // -(-d_c // 8)
    lends = (tile == LENDERS[0]) | (tile == LENDERS[1])
    return 1 + (lends & (lent_bits(d_c, d_r) > 0)).int()


def _scale(name: str, least: Tensor) -> Tensor:
    """The smallest bf16 number >= `least`, (..., 1)."""
    scale = least.to(torch.bfloat16)
    up = (scale.view(torch.int16) + 1).view(torch.bfloat16)      # the next one, for numbers >= 0
    scale = torch.where(scale < least, up, scale)
    # a GPU would have to wait: there such a scale makes the row, and then the logits, NaN
    if scale.device.type == "cpu" and not scale.isfinite().all():
        what = "NaN" if least.isnan().any() else "infinity or a number above 1e39"
        raise ValueError(f"{name}: {what} in a row to be cached, expected finite numbers")
    return scale


def quantise(c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_kv (..., d_c), k_r (..., d_r) -> integers n_c, n_r of those shapes, scales (..., 2) bf16.

    The row is about (n_c · scales[0], n_r · scales[1]): wrong by at most half a step of `steps`
    scales, up to rounding in the dtype.  ValueError for NaN or infinity.
    """
    d_c, d_r = c_kv.shape[-1], k_r.shape[-1]
    wide = torch.promote_types(c_kv.dtype, torch.float32)
    c_kv, k_r, step = c_kv.to(wide), k_r.to(wide), steps(d_c, d_r, c_kv.device).to(wide)
    half = 32 << lent_bits(d_c, d_r)                             # RoPE codes are -half to half - 1
    # the largest code is a half step short of a round one: clipped there, it errs by half a step
    s_c = _scale("c_kv", (c_kv.abs() / (32 - step / 2)).amax(-1, keepdim=True))
    s_r = _scale("k_r", (k_r.abs() / (half - 0.5)).amax(-1, keepdim=True))
    n_c = (c_kv / (_nonzero(s_c, wide) * step)).round()
    n_c = torch.minimum(n_c, 32 / step - 1).clamp(min=-32) * step
    n_r = (k_r / _nonzero(s_r, wide)).round().clamp(-half, half - 1)
    return n_c.int(), n_r.int(), torch.cat((s_c, s_r), -1)


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """To divide by: a row of zeros has scale 0."""
    return scale.to(dtype).masked_fill(scale == 0, 1.0)


def dequantise(
    n_c: Tensor, n_r: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What attention reads: integers (..., d_c), (..., d_r) and scales (..., 2) -> c_kv, k_r."""
    wide = torch.promote_types(dtype, torch.float32)
    s_c, s_r = scales.to(wide).split(1, -1)                      # (..., 1) each
    return (n_c * s_c).to(dtype), (n_r * s_r).to(dtype)


def pack(n_c: Tensor, n_r: Tensor) -> Tensor:
    """Integers of `quantise` -> words (..., W) int16, in planes; w = ⌈d_c/8⌉ and w_r = ⌈d_r/8⌉:

        A (w) | B (w) | C (w) | A_r (w_r) | B_r (w_r) | C_r (w_r)

        word   bits 15-10   bits 9-6                        bits 5-0
        A[j]   v1           v2's bits 3-0                   v0
        B[j]   v4           v5's bits 3-0                   v3
        C[j]   v7           v5's bits 5-4, v2's bits 5-4    v6

    v_t is the code of channel t·w + j: field t of all words is a tile of neighbouring channels.
    Latents v0 v1 v3 v4 v6 v7: n = code - 32. Lenders v2 v5: n = 2·(lower five bits - 16), bit 5 is
    lent. Bits lent by all v2, then by all v5, are bit 0 of all RoPE codes, then bit 1; A_r B_r C_r
    hold their upper six bits, n = code - 2^(5 + lent).
    """
    lent = lent_bits(n_c.shape[-1], n_r.shape[-1])
    latents, rope = _tiles(n_c + 32), n_r + (32 << lent)         # (..., 8, w), (..., d_r)
    if lent:
        borrowed = torch.cat([rope >> k & 1 for k in range(lent)], -1)
        borrowed = F.pad(borrowed, (0, 2 * latents.shape[-1] - borrowed.shape[-1]))
        latents[..., LENDERS, :] = latents[..., LENDERS, :] >> 1 | borrowed.unflatten(
            -1, (2, -1)) << 5
    return torch.cat((_three_words(latents), _three_words(_tiles(rope >> lent))), -1)


def pack_rows(c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
    """c_kv (..., d_c), k_r (..., d_r) -> words (..., W) int16, scales (..., 2) bf16."""
    n_c, n_r, scales = quantise(c_kv, k_r)
    return pack(n_c, n_r), scales


def unpack(words: Tensor, d_c: int, d_r: int) -> tuple[Tensor, Tensor]:
    """Words (..., W) int16 -> the integers n_c (..., d_c) and n_r (..., d_r), int32."""
    lent, w = lent_bits(d_c, d_r), -(-d_c // 8)
    latents = _eight_values(words[..., : 3 * w])                 # (..., 8, w)
    rope = _eight_values(words[..., 3 * w :]).flatten(-2)[..., :d_r]
    if lent:
        lenders = latents[..., LENDERS, :]
        borrowed = (lenders >> 5).flatten(-2)[..., : lent * d_r].unflatten(-1, (lent, d_r))
        rope = rope << lent
        for k in range(lent):
            rope = rope | borrowed[..., k, :] << k
        latents[..., LENDERS, :] = (lenders & 31) << 1
    return latents.flatten(-2)[..., :d_c] - 32, rope - (32 << lent)


def _tiles(codes: Tensor) -> Tensor:
    """(..., n) -> (..., 8, w): channel t·w + j at [t, j], zeros behind the last."""
    w = -(-codes.shape[-1] // 8)
    return F.pad(codes, (0, 8 * w - codes.shape[-1])).unflatten(-1, (8, w))


def _three_words(tiles: Tensor) -> Tensor:
    """Codes of six bits (..., 8, w) -> planes A, B, C (..., 3·w) int16."""
    v = tiles.unbind(-2)
    words = torch.cat((
        v[0] | (v[2] & 15) << 6 | v[1] << 10,
        v[3] | (v[5] & 15) << 6 | v[4] << 10,
        v[6] | v[2] >> 4 << 6 | v[5] >> 4 << 8 | v[7] << 10,
    ), -1)
    return ((words ^ 0x8000) - 0x8000).to(torch.int16)           # the same bits, as signed numbers


def _eight_values(words: Tensor) -> Tensor:
    """Planes A, B, C (..., 3·w) int16 -> codes of six bits (..., 8, w)."""
    a, b, c = (words.int() & 0xFFFF).unflatten(-1, (3, -1)).unbind(-2)
    v2, v5 = a >> 6 & 15 | (c >> 6 & 3) << 4, b >> 6 & 15 | (c >> 8 & 3) << 4
    return torch.stack((a & 63, a >> 10, v2, b & 63, b >> 10, v5, c & 63, c >> 10), -2)


class SixBitCache(Cache):
    """One packed row a token and layer. `rows` gives words and scales, which `attend_packed` reads.

    `dtype` is that of the plain rows that `dequantised` gives.
    """

    kind = "six_bit"

    def __init__(
        self, n_layers: int, batch: int, max_tokens: int, d_c: int, d_r: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        self.d_c, self.d_r, self.dtype = d_c, d_r, dtype
        shape = (n_layers, max(batch, 0), max(max_tokens, 0))
        W = 3 * (-(-d_c // 8) + -(-d_r // 8))
        # all-zero scales make rows that were never written finite
        super().__init__(torch.zeros(*shape, W, dtype=torch.int16, device=device),
                         torch.zeros(*shape, 2, dtype=torch.bfloat16, device=device))

    @property
    def words(self) -> Tensor:
        """(l, B, max_tokens, W) int16."""
        return self.stores[0]

    @property
    def scales(self) -> Tensor:
        """(l, B, max_tokens, 2) bf16."""
        return self.stores[1]

    def stored(self, c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
        """c_kv (B, T, d_c), k_r (B, T, d_r) -> words and scales."""
        return pack_rows(c_kv, k_r)                                          # (B, T, W), (B, T, 2)

    def dequantised(self, layer: int) -> tuple[Tensor, Tensor]:
        """c_kv (B, S, d_c), k_r (B, S, d_r) as stored, for attention that reads plain rows."""
        words, scales = self.rows(layer)
        return dequantise(*unpack(words, self.d_c, self.d_r), scales, self.dtype)


def attend_packed(
    q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None, tile: int = 256,
) -> Tensor:
    """`attend_absorbed` on packed rows, `tile` tokens at a time: what a decoding kernel does.

    q_c (B, T, n_h, d_h), q_r (B, T, n_h, d_r), words (B, S, W), scales (B, S, 2), W_UK (n_h, d_h,
    d_c), W_UV (n_h, d_v, d_c), positions (B, T) of the queries; None: the last T of the S tokens.
    The softmax runs online: m is the largest score so far, and what was summed before is shrunk
    whenever m grows.  -> (B, T, n_h, d_v).
    """
    (B, T, n_h, d_r), S, d_c = q_r.shape, words.shape[1], W_UK.shape[-1]
    if positions is None:
        positions = torch.arange(S - T, S, device=words.device)[None]
    # integers, whose scale comes later, would leave fp16's range; bf16's they do not
    dtype = torch.float32 if q_c.dtype == torch.float16 else q_c.dtype
    q_latent = torch.einsum("bthd,hdc->bhtc", q_c, W_UK).reshape(B, n_h * T, d_c).to(dtype)
    q_rope = q_r.transpose(1, 2).reshape(B, n_h * T, d_r).to(dtype)
    wide = torch.promote_types(q_c.dtype, torch.float32)
    m = torch.full((B, n_h, T, 1), -torch.inf, dtype=wide, device=words.device)
    total, o = torch.zeros_like(m), torch.zeros(B, n_h, T, d_c, dtype=wide, device=words.device)
    for start in range(0, S, tile):
        n_c, n_r = (n.to(dtype) for n in unpack(words[:, start : start + tile], d_c, d_r))
        s_c, s_r = scales[:, start : start + tile].to(wide).transpose(1, 2).split(1, 1)
        # integers meet the query; their scale, one a token, comes once to each score
        scores = (q_latent @ n_c.transpose(1, 2)) * s_c + (q_rope @ n_r.transpose(1, 2)) * s_r
        keys = torch.arange(start, start + n_c.shape[1], device=words.device)
        hidden = keys > positions[:, None, :, None]                          # (B or 1, 1, T, tile)
        scores = (scores.unflatten(1, (n_h, T)) * scale).masked_fill(hidden, -torch.inf)
        new = torch.maximum(m, scores.amax(-1, keepdim=True))    # finite: every query sees key 0
        weights, shrink = (scores - new).exp(), (m - new).exp()              # (B, n_h, T, tile)
        total = total * shrink + weights.sum(-1, keepdim=True)
        weighted = (weights * s_c[:, None]).to(n_c.dtype).flatten(1, 2) @ n_c
        o, m = o * shrink + weighted.unflatten(1, (n_h, T)), new
    return torch.einsum("bhtc,hvc->bthv", (o / total).to(q_c.dtype), W_UV)

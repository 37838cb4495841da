# SPDX-License-Identifier: MIT
"""Decoding with MLA on a GPU: every cached row is read once and used as key and as value.

Section 2.1.2: the absorbed form, attention/mla.py's `attend_absorbed`, is multi-query attention.
All heads of a token meet one row [c_kv ; k_r] of d_c + d_r numbers (576), whose first d_c are the
value too. Each row costs 1152 bytes in bf16 and 2·(2·d_c + d_r) = 2176 operations per head: with 16
heads (V2-Lite) 30 operations per byte, far below the 184 where a Hopper GPU's memory and matrix
units balance, so the time is that of reading the cache; with 128 heads (V2) 242, so it is that of
multiplying. The kernel holds what must not be read twice (the queries and one sum per head, 16 x
512) and streams the rows past it:

  split      A sequence is cut into `splits` pieces, each a program of its own, so that a batch of
             one fills the GPU too. A program reads its piece in tiles of BN rows, several on their
             way at any time (num_stages).
  online     It does not know the largest score beforehand: m is the largest so far, and what was
             summed is shrunk whenever m grows (Dao et al., FlashAttention).
  combine    A split leaves its softmax's average o and the logarithm of its sum, lse. The whole is
             the average of the o weighted by 2^lse: a second, small kernel.

W_UK and W_UV stay outside, as matrix products over the batch, exactly as in the naive twin.

How this file differs from famous ones (FlashMLA, FlashInfer, vLLM's Triton kernel):
  1. `tl.trans` of the same registers or shared memory is the other operand: one load, no copy.
  2. Nothing in the loop is masked on loading. Behind the end of a sequence the last row is read
     again, and its score is -inf: garbage behind the end is never touched, not even a NaN.
  3. Pages: the number of the *next* tile's page is loaded one tile ahead and carried through the
     loop. Looked up where it is needed, it would stop the pipeline at one buffer.
  4. Positions instead of lengths: query t sees keys 0 .. positions[b, t]. That gives ragged
     batches, several new tokens per sequence, and empty sequences (-1), whose output is 0.
  5. Any sizes: those that are not a power of two are masked.
The form with `swap` multiplies rows x queries instead of queries x rows, so that 64 rows fill the
matrix unit where 16 heads would not. No tile was timed on a GPU yet; the bench tries them all.

Shapes: B batch, T new tokens, S cached + new, n_h heads, n = T·n_h rows of queries; BH, BN, BC, BR
tile sizes of queries, keys, d_c and d_r.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from latent_decode import attend_latent
    q_c, q_r = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 4, 16)   # (B, T, n_h, d_h), (…, d_r)
    c_kv, k_r = torch.randn(2, 50, 64), torch.randn(2, 50, 16)       # (B, S, d_c), (B, S, d_r)
    W_UK, W_UV = torch.randn(4, 32, 64), torch.randn(4, 24, 64)      # (n_h, d_h or d_v, d_c)
    positions = torch.tensor([[49], [20]])     # the second sequence has 21 tokens so far
    o = attend_latent(q_c, q_r, c_kv, k_r, W_UK, W_UV, 48**-0.5, positions)     # (B, T, n_h, d_v)
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.target import check_device, multiprocessors, on_its_device, target_of


class Tile(NamedTuple):
    """How much one program takes: BH queries, BN keys at a time; `blocks` fit a multiprocessor."""

    BH: int
    BN: int
    warps: int
    stages: int
    blocks: int
    swap: bool = False


def tile_for(n: int, dtype: torch.dtype, target: str, d_c: int = 512) -> Tile:
    """Of a kernel for n rows of queries; chosen by what compiles to what, not timed yet.

    Registers and bytes of shared memory at 512 + 64 in bf16, triton 3.7: nothing spills.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1, 1)             # exact rather than fast
    if d_c > 512:
        return Tile(16, 16, 4, 2, 1)             # 245 registers, 70,144 B at 1024 + 64
    if target == "gfx942":
        return Tile(16, 32, 2, 2, 1)             # both warps compute all scores
    if target != "sm_90":
        return Tile(16, 32, 4, 3, 1)             # 93,184 B
    if n > 32:
        return Tile(64, 64, 8, 2, 1)             # 255 registers, 221,184 B: 64 x 512 sums on wgmma
    return Tile(16, 32, 4, 3, 2)                 # 168 registers, 93,184 B: two blocks


def number_of_splits(tokens: int, programs: int, slots: int, BN: int) -> int:
    """Into how many pieces to cut sequences of `tokens` keys.

    `programs` run for each piece (batch x tiles of queries), `slots` at a time on the GPU. Time in
    tiles of BN keys: as many rounds as the slots need, each of a piece and what it costs to begin
    and to end one (8 tiles), and the combining (1 tile for 32 pieces). Not fitted to a GPU yet.
    """
    return _splits_of_tiles(max(-(-tokens // BN), 1), programs, slots)


@lru_cache(maxsize=4096)         # a step adds a token, and seldom a tile
def _splits_of_tiles(tiles: int, programs: int, slots: int) -> int:
    def time(splits: int) -> float:
        rounds = -(-programs * splits // slots)
        return rounds * (-(-tiles // splits) + 8) + (splits > 1) * splits / 32

    most = min(tiles, 256)
    few = {*range(1, 17), most, *(-(-tiles // k) for k in range(1, 17))}     # k tiles a piece
    few |= {slots * rounds // programs for rounds in range(1, 9)}            # that fill the slots
    return min((splits for splits in sorted(few) if 1 <= splits <= most), key=time)


@triton.jit
def share_of_split(seen, BN: tl.constexpr):
    """What this program reads, keys lo .. hi - 1, of the `end` that any of its queries sees."""
    end = tl.max(seen, 0)
    piece = tl.cdiv(tl.cdiv(end, BN), tl.num_programs(1)) * BN
    lo = tl.program_id(1) * piece
    return lo, tl.minimum(lo + piece, end), end


@triton.jit
def softmax_step(s, m, AXIS: tl.constexpr):
    """Weights 2^(s - m) under the new maximum, and by how much to shrink what was summed before.

    m = -inf, nothing seen yet: the weights are 0, never 2^(-inf + inf).
    """
    new = tl.maximum(m, tl.max(s, AXIS))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - tl.expand_dims(finite, AXIS))
    return p, tl.expand_dims(tl.exp2(m - finite), AXIS), new


@triton.jit
def _step(q_c, q_r, c, r, keys, seen, scale, m, l, acc, SWAP: tl.constexpr, DOT: tl.constexpr):
    """One tile of keys c (BN, BC), r (BN, BR) for all queries."""
    if SWAP:                                                     # q_c (BC, BH), acc (BC, BH)
        s = tl.dot(c, q_c, input_precision=DOT)
        s = tl.dot(r, q_r, s, input_precision=DOT) * scale       # (BN, BH)
        s = tl.where(keys[:, None] < seen[None, :], s, float("-inf"))
        p, shrink, m = softmax_step(s, m, 0)
        acc = tl.dot(tl.trans(c), p.to(c.dtype), acc * shrink, input_precision=DOT)
    else:                                                        # q_c (BH, BC), acc (BH, BC)
        s = tl.dot(q_c, tl.trans(c), input_precision=DOT)
        s = tl.dot(q_r, tl.trans(r), s, input_precision=DOT) * scale         # (BH, BN)
        s = tl.where(keys[None, :] < seen[:, None], s, float("-inf"))
        p, shrink, m = softmax_step(s, m, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * shrink, input_precision=DOT)
    return m, l * shrink + p, acc            # l stays apart by key until the end: one sum, not many


@triton.jit
def _load_rows(base, rows, columns, stride, N: tl.constexpr):
    """(BN, ·): N numbers of each row, zeros behind them where N is no power of two."""
    at = base + rows[:, None] * stride + columns[None, :]
    if columns.shape[0] == N:
        return tl.load(at)
    return tl.load(at, mask=columns[None, :] < N, other=0.0)


@triton.jit
def load_seen(positions, b, i, n, n_h, S, stride_pb, stride_pt):
    """How many keys each row of queries sees; row i belongs to token i // n_h."""
    at = positions + b * stride_pb + i // n_h * stride_pt
    return tl.minimum(tl.load(at, mask=i < n, other=-1).to(tl.int32) + 1, S)


# what changes from step to step, or from batch to batch, is no reason to compile anew
@triton.jit(do_not_specialize=["S", "stride_pb", "stride_pt", "stride_tb"])
def decode_kernel(
    q_c, q_r, c_kv, k_r, positions, table, o, lse, scale, S, n, n_h,
    stride_cb, stride_cs, stride_rb, stride_rs, stride_pb, stride_pt, stride_tb,
    D_C: tl.constexpr, D_R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, SWAP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid (⌈n/BH⌉, splits, B): o (B, splits, n, d_c) and lse (B, splits, n) of each piece."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BH + tl.arange(0, BH)
    seen = load_seen(positions, b, i, n, n_h, S, stride_pb, stride_pt)
    lo, hi, end = share_of_split(seen, BN)
    x, y = tl.arange(0, BC), tl.arange(0, BR)
    real = (i < n)[:, None]
    q_c = tl.load(q_c + (b * n + i)[:, None] * D_C + x, mask=real & (x < D_C), other=0.0)
    q_r = tl.load(q_r + (b * n + i)[:, None] * D_R + y, mask=real & (y < D_R), other=0.0)
    if SWAP:
        q_c, q_r = tl.trans(q_c), tl.trans(q_r)
    m = tl.full([BH], float("-inf"), tl.float32)
    l = tl.zeros([BN, BH] if SWAP else [BH, BN], tl.float32)
    acc = tl.zeros([BC, BH] if SWAP else [BH, BC], tl.float32)
    page = b                                     # without pages a sequence is one page
    if PAGE:
        table += b * stride_tb
        page = tl.load(table + lo // PAGE, mask=lo < hi, other=0).to(tl.int64)
    for start in tl.range(lo, hi, BN):
        first = start % PAGE if PAGE else start
        rows = first + tl.minimum(tl.arange(0, BN), end - 1 - start)
        c = _load_rows(c_kv + page * stride_cb, rows, x, stride_cs, D_C)
        r = _load_rows(k_r + page * stride_rb, rows, y, stride_rs, D_R)
        if PAGE:
            page = tl.load(table + tl.minimum(start + BN, end - 1) // PAGE).to(tl.int64)
        m, l, acc = _step(q_c, q_r, c, r, start + tl.arange(0, BN), seen, scale, m, l, acc,
                          SWAP, DOT)
    l = tl.sum(l, 0 if SWAP else 1)
    some = tl.where(l == 0.0, 1.0, l)            # nothing seen: o = 0, lse = -inf
    to = (b * tl.num_programs(1) + tl.program_id(1)) * n + i
    tl.store(lse + to, m + tl.log2(some), mask=i < n)
    acc = tl.trans(acc / some[None, :]) if SWAP else acc / some[:, None]
    tl.store(o + to[:, None] * D_C + x, acc, mask=real & (x < D_C))


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    o, lse, out, n, splits, D_C: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):
    """Grid (B·n, ⌈d_c/BC⌉): the average of a row's BS >= splits pieces, weighted by 2^lse."""
    row = tl.program_id(0).to(tl.int64)
    x, s = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BS)
    at = (row // n * splits + s) * n + row % n
    part = tl.load(lse + at, mask=s < splits, other=float("-inf"))
    m = tl.max(part, 0)
    weights = tl.exp2(part - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    inside = (s < splits)[:, None] & (x < D_C)[None, :]
    rows = tl.load(o + at[:, None] * D_C + x[None, :], mask=inside, other=0.0)
    mean = tl.sum(weights[:, None] * rows, 0)
    tl.store(out + row * D_C + x, mean.to(out.dtype.element_ty), mask=x < D_C)


def combine(o: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Pieces o (B, splits, n, d_c) and the base-2 logarithms of their sums -> (B, n, d_c)."""
    B, splits, n, d_c = o.shape
    if splits == 1:
        return o[:, 0].to(dtype)
    out = torch.empty(B, n, d_c, dtype=dtype, device=o.device)
    BS, BC = (16, 512) if splits <= 16 else (triton.next_power_of_2(max(splits, 256)), 64)
    BC = min(triton.next_power_of_2(d_c), BC)
    combine_kernel[B * n, triton.cdiv(d_c, BC)](o, lse, out, n, splits, d_c, BC, BS, num_warps=4)
    return out


def pieces(
    q: Tensor, tokens: int, tile: Tile, splits: int | None
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Room for o and lse of q (B, T, n_h, d_c), and the grid that fills it."""
    B, n, d_c = q.shape[0], q.shape[1] * q.shape[2], q.shape[3]
    tiles = triton.cdiv(n, tile.BH)
    if splits is None:
        slots = multiprocessors(q.device) * tile.blocks
        splits = number_of_splits(tokens, B * tiles, slots, tile.BN)
    o = torch.empty(B, splits, n, d_c, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, splits, n, dtype=torch.float32, device=q.device)
    return o, lse, (tiles, splits, B)


@on_its_device
def decode_latent(
    q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, positions: Tensor, scale: float,
    table: Tensor | None = None, splits: int | None = None, tile: Tile | None = None,
) -> Tensor:
    """Queries (B, T, n_h, d_c), (B, T, n_h, d_r) on cached rows -> (B, T, n_h, d_c).

    Query t of sequence b sees keys 0 .. positions[b, t] (B, T); at -1 none, and its output is 0.
    Rows c_kv (B, S, d_c), k_r (B, S, d_r). With pages c_kv (pages, tokens, d_c), k_r (pages,
    tokens, d_r), `tokens` a multiple of 64, and table (B, ·): page table[b, p] holds the p-th
    `tokens` rows of sequence b. `splits` and `tile` are chosen unless they are given.
    """
    (_, T, n_h, d_c), d_r = q_c.shape, q_r.shape[-1]
    tile = tile or tile_for(T * n_h, q_c.dtype, target_of(q_c.device), d_c)
    PAGE = 0 if table is None else c_kv.shape[1]
    check_cache(q_c, q_r, positions, c_kv, k_r, table, PAGE, decode_kernel)
    S = c_kv.shape[1] if table is None else PAGE * table.shape[1]
    if q_r.dtype != q_c.dtype or c_kv.dtype != q_c.dtype or k_r.dtype != q_c.dtype:
        raise ValueError(f"cache: dtypes {c_kv.dtype} and {k_r.dtype} with queries {q_c.dtype} and "
                         f"{q_r.dtype}, expected one dtype")
    c_kv, k_r = (x if x.stride(-1) == 1 else x.contiguous() for x in (c_kv, k_r))
    o, lse, grid = pieces(q_c, S, tile, splits)
    table = positions if table is None else table.contiguous()
    decode_kernel[grid](
        q_c.contiguous(), q_r.contiguous(), c_kv, k_r, positions, table, o, lse,
        scale * 1.4426950408889634, S, T * n_h, n_h,             # 2^(x·log2 e) = e^x
        *c_kv.stride()[:2], *k_r.stride()[:2], *positions.stride(), table.stride(0),
        d_c, d_r, max(32, triton.next_power_of_2(d_c)), max(16, triton.next_power_of_2(d_r)),
        tile.BH, tile.BN, PAGE, tile.swap, "ieee" if q_c.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages)
    return combine(o, lse, q_c.dtype).unflatten(1, (T, n_h))


def check_cache(
    q_c: Tensor, q_r: Tensor, positions: Tensor, a: Tensor, b: Tensor, table: Tensor | None,
    page: int, kernel: object,
) -> None:
    """ValueError for what `kernel` cannot read; a and b are the two tensors of the cache."""
    if q_c.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q_c: dtype {q_c.dtype}, expected float16, bfloat16 or float32")
    if q_c.shape[:3] != q_r.shape[:3] or positions.shape != q_c.shape[:2]:
        raise ValueError(f"q_c, q_r, positions: shapes {tuple(q_c.shape)}, {tuple(q_r.shape)}, "
                         f"{tuple(positions.shape)}, expected (B, T, n_h, ·) twice and (B, T)")
    rows = len(a) if table is None else len(table)
    if a.shape[:2] != b.shape[:2] or rows != len(q_c):
        raise ValueError(f"cache: shapes {tuple(a.shape)} and {tuple(b.shape)} with {rows} "
                         f"sequences, expected the same (·, tokens, ·) and {len(q_c)} sequences")
    if table is not None and (page == 0 or page % 64):
        raise ValueError(f"page: {page} tokens, expected a multiple of 64")
    check_device("q_c", q_c, kernel)


def no_gradient(name: str, *inputs: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(f"{name}: an input requires a gradient, expected none "
                         "(torch.no_grad() for decoding, attend_expanded for training)")


def attend_latent(
    q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """`attend_absorbed` of mla.py, on a GPU; the same shapes. There is no gradient."""
    T, S = q_c.shape[1], c_kv.shape[1]
    no_gradient("attend_latent", q_c, q_r, c_kv, k_r)
    if positions is None:
        positions = torch.arange(S - T, S, device=q_c.device)[None]
    q_latent = torch.einsum("bthd,hdc->bthc", q_c, W_UK)
    o = decode_latent(q_latent, q_r, c_kv, k_r, positions.expand(len(q_c), T), scale)
    return torch.einsum("bthc,hvc->bthv", o, W_UV)

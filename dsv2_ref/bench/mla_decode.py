# SPDX-License-Identifier: MIT
"""Decoding with MLA on one GPU: one new token a sequence on a cache of bf16 rows.

Ours (kernels/latent_decode.py, kernel and combining) against

  copy         torch's copy of half the cache: as many bytes, half read and half written; a bound
  bmm          the absorbed form in torch: two matrix products, softmax, one matrix product
  flashinfer   BatchMLAPagedAttentionWrapper, planned beforehand, pages of 64; if it is installed

16 heads (V2-Lite) are bound by reading the cache, 128 (V2) by the matrix units. Queries are in the
latent already: W_UK and W_UV are the same products for everyone, and in nobody's time.

`candidates` has the times of all the tiles that could be the default, on contiguous rows and on
pages in random order. Every form that is timed is compared with fp32 first; one that is wrong or
does not launch has the reason in place of a time. Ours comes first, then with the others, then with
the tiles: a tile that ends the process takes no time that was known.
"""

import os
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # for `quick`, before triton

from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import (
    PEER_TOLERANCE,
    TOLERANCE,
    Step,
    Times,
    check,
    growing,
    rotated,
    row,
    sound,
)
from dsv2_ref.kernels.latent_decode import Tile, decode_latent, tile_for
from dsv2_ref.kernels.target import target_of

SCALE = 192**-0.5 * 1.2608**2                                 # of V2, with YaRN's factor
PAGE = 64
SPARE = 2**28                                                 # rotated copies, workspaces


class Case(NamedTuple):
    """One new token for each of B sequences of S cached ones."""

    B: int
    S: int
    n_h: int
    d_c: int = 512
    d_r: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.n_h} heads, {self.B}x{self.S}"

    @property
    def flops(self) -> int:
        return 2 * self.B * self.S * self.n_h * (2 * self.d_c + self.d_r)

    def nbytes(self, row_bytes: int) -> int:
        """Of the cache, and of queries and outputs."""
        own = self.B * self.n_h * (2 * self.d_c + self.d_r) * self.dtype.itemsize
        return self.B * self.S * row_bytes + own

    @property
    def needs(self) -> int:
        """Two caches, half of one for the copy, bmm's scores, and fp32 of eight sequences."""
        own, eight = self.nbytes((self.d_c + self.d_r) * self.dtype.itemsize), min(8, self.B)
        scores = self.n_h * self.S * (8 + 2 * self.dtype.itemsize)
        return 3 * own + self.B * scores + eight * (8 * self.S * (self.d_c + self.d_r)
                                                    + scores) + SPARE


SHAPES = [(128, 4096), (128, 8192), (1, 131072), (1, 8192)]
CASES = [Case(B, S, n_h) for n_h in (16, 128) for B, S in SHAPES]
QUICK = [Case(2, 128, 3, 64, 16, torch.float32), Case(1, 64, 40, 64, 16, torch.float32)]
TILES = {
    16: [Tile(16, 32, 4, 3, 2), Tile(16, 32, 4, 5, 1), Tile(16, 32, 2, 3, 2),
         Tile(16, 64, 4, 3, 1), Tile(16, 64, 4, 2, 1, swap=True)],
    128: [Tile(64, 64, 8, 2, 1), Tile(64, 32, 8, 3, 1), Tile(32, 64, 8, 2, 1, swap=True)],
}


class Inputs(NamedTuple):
    q_c: Tensor                       # (B, 1, n_h, d_c)
    q_r: Tensor                       # (B, 1, n_h, d_r)
    rows: Tensor                      # (B, S, d_c + d_r)
    positions: Tensor                 # (B, 1)
    table: Tensor                     # (B, S / 64): pages of `rows` in random order


def run(quick: bool = False) -> dict[str, Any]:
    """A row a case; ValueError without a CUDA device (unless `quick`)."""
    return measured("mla_decode", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    nbytes = case.nbytes((case.d_c + case.d_r) * case.dtype.itemsize)
    made = rotated(lambda i: inputs(case, device, i), nbytes, device)
    variants = {
        f"{'paged ' * paged}{label(tile)}": lambda x, tile=tile, paged=paged: ours(
            case, x, tile, paged)
        for tile in TILES[16 if case.n_h <= 32 else 128] for paged in (False, True)}
    error = checked(case, made[0])
    expected = cache(lambda paged: exact(made[0], paged))

    def stages() -> Iterator[dict[str, Step | str]]:
        yield {"ours": lambda x: ours(case, x), "copy": copy_of(made[0].rows)}
        yield sound({"bmm": bmm, "flashinfer": FlashInfer(case)}, made[0],
                    lambda _: expected(False), PEER_TOLERANCE)
        yield sound(variants, made[0], lambda name: expected(name.startswith("paged")), TOLERANCE)

    default = label(tile_for(case.n_h, case.dtype, target_of(device)))
    for ms in growing(stages(), made, device):
        yield decided(case, ms, nbytes, error, variants.keys(), default)


def checked(case: Case, x: Inputs) -> float:
    """The relative RMS error of ours; RuntimeError where it is wrong."""
    return check(ours(case, x), exact(x), f"decode_latent, {case.name}")


def inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=case.dtype)

    B, S, d = case.B, case.S, case.d_c + case.d_r
    pages = torch.randperm(B * S // PAGE, generator=g, device=device, dtype=torch.int32)
    # scores of a few units, as trained models have
    return Inputs(normal(B, 1, case.n_h, case.d_c) * 0.3, normal(B, 1, case.n_h, case.d_r),
                  normal(B, S, d), torch.full((B, 1), S - 1, device=device), pages.view(B, -1))


def ours(case: Case, x: Inputs, tile: Tile | None = None, paged: bool = False) -> Tensor:
    """(B, 1, n_h, d_c); paged, on other rows of the same cache."""
    rows = x.rows.view(-1, PAGE, case.d_c + case.d_r) if paged else x.rows
    return decode_latent(x.q_c, x.q_r, rows[..., : case.d_c], rows[..., case.d_c :], x.positions,
                         SCALE, x.table if paged else None, tile=tile)


def bmm(x: Inputs) -> Tensor:
    """What `attend_absorbed` does between W_UK and W_UV."""
    d_c = x.q_c.shape[-1]
    c, r = x.rows[..., :d_c], x.rows[..., d_c:]
    scores = torch.baddbmm(x.q_c[:, 0] @ c.mT, x.q_r[:, 0], r.mT) * SCALE
    return (scores.softmax(-1, dtype=torch.float32).to(c.dtype) @ c)[:, None]


def exact(x: Inputs, paged: bool = False) -> Tensor:
    """In fp32, a few sequences at a time."""
    rows = x.rows
    if paged:
        rows = rows.view(-1, PAGE, rows.shape[-1])[x.table.long()].flatten(1, 2)
    parts = zip(*(t.split(8) for t in (x.q_c, x.q_r, rows)), strict=True)
    return torch.cat([bmm(Inputs(*(t.float() for t in part), x.positions, x.table))
                      for part in parts])


def copy_of(like: Tensor) -> Callable[[Any], Tensor]:
    """A step that reads half of `x.rows` (as large as `like`) and writes it elsewhere."""
    half = like.view(-1)[: like.numel() // 2]
    target = torch.empty_like(half)
    return lambda x: target.copy_(x.rows.view(-1)[: target.numel()])


def label(tile: Tile) -> str:
    return (f"{tile.BH}x{tile.BN} w{tile.warps} s{tile.stages}" + " swapped" * tile.swap)


def decided(
    case: Case, ms: Times, nbytes: int, error: float, tiles: Collection[str], default: str
) -> dict[str, Any]:
    """The row of a case: comparators in `ms`, the tiles apart, and which of them is best."""
    main = {name: t for name, t in ms.items() if name not in tiles}
    candidates = {name: t for name, t in ms.items() if name in tiles}
    timed = {name: t for name, t in candidates.items() if not isinstance(t, str)}
    best = {kind: min((n for n in timed if n.startswith("paged") == (kind == "paged")),
                      key=timed.get, default=None) for kind in ("contiguous", "paged")}
    return row(case.name, main, case.flops, nbytes, error, batch=case.B, tokens=case.S,
               heads=case.n_h, d_c=case.d_c, d_r=case.d_r, dtype=str(case.dtype)[6:],
               default=default, candidates=candidates, best_tile=best)


class FlashInfer:
    """A step; planned on its first call, which is not timed."""

    def __init__(self, case: Case) -> None:
        self.case, self.wrapper = case, None

    def __call__(self, x: Inputs) -> Tensor:
        c = self.case
        if self.wrapper is None:
            self.plan(x)
        rows = x.rows.view(-1, PAGE, c.d_c + c.d_r)
        return self.wrapper.run(x.q_c[:, 0], x.q_r[:, 0], rows[..., : c.d_c],
                                rows[..., c.d_c :])[:, None]

    def plan(self, x: Inputs) -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        c, device = self.case, x.rows.device
        wrapper = BatchMLAPagedAttentionWrapper(
            torch.empty(2**27, dtype=torch.int8, device=device), backend="auto")
        starts, pages = torch.arange(c.B + 1, device=device, dtype=torch.int32), c.S // PAGE
        wrapper.plan(starts, starts * pages,
                     torch.arange(c.B * pages, device=device, dtype=torch.int32),
                     torch.full((c.B,), c.S, device=device, dtype=torch.int32), c.n_h, c.d_c,
                     c.d_r, PAGE, False, SCALE, c.dtype, c.dtype)
        self.wrapper = wrapper

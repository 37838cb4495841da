# SPDX-License-Identifier: MIT
"""Decoding from the six-bit cache on one GPU, against our own bf16 kernel on as many tokens.

  ours    kernels/six_bit_decode.py on packed rows: 436 bytes per token of 512 + 64 numbers
  bf16    kernels/latent_decode.py on bf16 rows: 1152 bytes
  copy    torch's copy of half the packed rows: as many bytes, half read and half written; a bound

`candidates` has the times of all the tiles that could be the default, contiguous and paged, as in
mla_decode.py. Every form is compared with fp32 on the dequantised rows before it is timed.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_ref.attention.cache_quant import unpack
from dsv2_ref.bench import mla_decode
from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import TOLERANCE, Step, check, growing, rotated, sound
from dsv2_ref.bench.mla_decode import PAGE, SCALE, SHAPES, decided, label
from dsv2_ref.kernels.latent_decode import Tile
from dsv2_ref.kernels.six_bit_decode import decode_six_bit, tile_for
from dsv2_ref.kernels.target import target_of


class Case(mla_decode.Case):
    @property
    def needs(self) -> int:
        """The bf16 rows beside the packed ones, which are less, and eight sequences unpacked."""
        return 2 * super().needs + 24 * min(8, self.B) * self.S * (self.d_c + self.d_r)


CASES = [Case(B, S, 16) for B, S in SHAPES] + [Case(128, 8192, 128)]
QUICK = [Case(2, 64, 3, 64, 16, torch.float32)]
TILES = {
    16: [Tile(16, 64, 4, 3, 2), Tile(16, 64, 4, 4, 1), Tile(16, 32, 4, 4, 2),
         Tile(16, 32, 2, 3, 4), Tile(16, 64, 8, 3, 1)],
    128: [Tile(32, 64, 8, 3, 1), Tile(16, 64, 4, 3, 2)],
}


class Inputs(NamedTuple):
    q_c: Tensor                       # (B, 1, n_h, d_c)
    q_r: Tensor                       # (B, 1, n_h, d_r)
    rows: Tensor                      # (B, S, W) int16: any words are a row
    scales: Tensor                    # (B, S, 2)
    plain: mla_decode.Inputs          # queries and bf16 rows of the same sizes


def run(quick: bool = False) -> dict[str, Any]:
    """A row a case; ValueError without a CUDA device (unless `quick`)."""
    return measured("six_bit_decode", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    nbytes = case.nbytes(6 * (case.d_c + case.d_r) // 8 + 4)
    made = rotated(lambda i: inputs(case, device, i), nbytes, device)
    variants = {
        f"{'paged ' * paged}{label(tile)}": lambda x, tile=tile, paged=paged: _ours(
            case, x, tile, paged)
        for tile in TILES[16 if case.n_h <= 16 else 128] for paged in (False, True)}
    error = checked(case, made[0])
    expected = cache(lambda paged: _exact(made[0], paged))

    def stages() -> Iterator[dict[str, Step | str]]:
        yield {"ours": lambda x: _ours(case, x), "copy": mla_decode.copy_of(made[0].rows)}
        yield sound({"bf16": lambda x: mla_decode.ours(case, x.plain)}, made[0],
                    lambda _: mla_decode.exact(made[0].plain), TOLERANCE)
        yield sound(variants, made[0], lambda name: expected(name.startswith("paged")), TOLERANCE)

    default = label(tile_for(case.n_h, case.dtype, target_of(device)))
    for ms in growing(stages(), made, device):
        yield decided(case, ms, nbytes, error, variants.keys(), default)


def checked(case: Case, x: Inputs) -> float:
    """The relative RMS error of ours; RuntimeError where it is wrong."""
    return check(_ours(case, x), _exact(x), f"decode_six_bit, {case.name}")


def inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    plain, g = mla_decode.inputs(case, device, seed), torch.Generator(device).manual_seed(seed)
    words = torch.randint(-(2**15), 2**15, (case.B, case.S, 3 * (case.d_c + case.d_r) // 8),
                          generator=g, device=device, dtype=torch.int16)
    size = torch.tensor([0.05, 0.015], device=device)     # numbers of the size of one
    scales = size * torch.rand(case.B, case.S, 2, generator=g, device=device).add(0.5)
    return Inputs(plain.q_c, plain.q_r, words, scales.bfloat16(), plain)


def _ours(case: Case, x: Inputs, tile: Tile | None = None, paged: bool = False) -> Tensor:
    words, scales, table = x.rows, x.scales, None
    if paged:
        words, scales = words.view(-1, PAGE, words.shape[-1]), scales.view(-1, PAGE, 2)
        table = x.plain.table
    return decode_six_bit(x.q_c, x.q_r, words, scales, x.plain.positions, SCALE, table, tile=tile)


def _exact(x: Inputs, paged: bool = False) -> Tensor:
    """In fp32 on the numbers that the words stand for, a few sequences at a time."""
    words, scales = x.rows, x.scales
    if paged:
        words, scales = (t.view(-1, PAGE, t.shape[-1])[x.plain.table.long()].flatten(1, 2)
                         for t in (words, scales))
    outputs = []
    for q_c, q_r, w, s in zip(*(t.split(8) for t in (x.q_c, x.q_r, words, scales)), strict=True):
        n_c, n_r = unpack(w, q_c.shape[-1], q_r.shape[-1])
        rows = torch.cat((n_c * s[..., :1].float(), n_r * s[..., 1:].float()), -1)
        outputs.append(mla_decode.bmm(mla_decode.Inputs(q_c.float(), q_r.float(), rows,
                                                        x.plain.positions, x.plain.table)))
    return torch.cat(outputs)

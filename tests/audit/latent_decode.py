# SPDX-License-Identifier: MIT
"""What the kernels of latent_decode.py must compile to: see machine_code.py."""

from typing import Any

import torch
from audit.machine_code import Entry

from dsv2_ref.kernels.latent_decode import Tile, tile_for

MODULE = "dsv2_ref.kernels.latent_decode"
POINTERS = {"positions": "*i64", "table": "*i32", "o": "*fp32", "lse": "*fp32"}
NUMBERS = dict.fromkeys(("n", "n_h", "stride_cb", "stride_cs", "stride_rb", "stride_rs"), "i32:16")
NUMBERS |= dict.fromkeys(("S", "stride_pb", "stride_pt", "stride_tb"), "i32")
INSTRUCTION = {"sm_90": "HMMA", "sm_80": "HMMA", "gfx942": "MFMA"}


def power(n: int, least: int) -> int:
    """Columns of a tile: a power of two. Values take 32, or else all warps would repeat them."""
    return max(least, 1 << (n - 1).bit_length())


def entry(
    name: str, tile: Tile, target: str = "sm_90", page: int = 0, d_c: int = 512, d_r: int = 64,
    **promises: Any,
) -> Entry:
    BC, BR = power(d_c, 32), power(d_r, 16)
    signature = dict.fromkeys(("q_c", "q_r", "c_kv", "k_r"), "*bf16") | POINTERS | NUMBERS
    if d_c % 16 or d_r % 16:
        signature |= dict.fromkeys(("n", "n_h", "stride_cb", "stride_cs", "stride_rb",
                                    "stride_rs"), "i32")
    return Entry(
        name=f"{name} {target}{' paged' * (page > 0)}", kernel=f"{MODULE}:decode_kernel",
        signature=signature | {"scale": "fp32"},
        constexprs=dict(D_C=d_c, D_R=d_r, BC=BC, BR=BR, BH=tile.BH, BN=tile.BN, PAGE=page,
                        SWAP=tile.swap, DOT="tf32"),
        num_warps=tile.warps, num_stages=tile.stages, target=target,
        **{"instruction": INSTRUCTION[target], "ctas": tile.blocks,
           # the number of the next page alone comes without the pipeline
           "plain_loads": None if target == "gfx942" else int(page > 0),
           "flops": 2 * tile.BH * tile.BN * (2 * BC + BR)} | promises)


FEW = tile_for(16, torch.bfloat16, "sm_90")
MANY = tile_for(128, torch.bfloat16, "sm_90")
# both groups of warps compute all scores, which plain Triton does not let one avoid
TWICE = dict(instruction="HGMMA", ratio=(2 * 576 + 512) / (576 + 512), buffers=2)
ENTRIES = [
    entry("16 heads", FEW, buffers=2),
    entry("16 heads", FEW, page=64, buffers=2),
    entry("128 heads", MANY, **TWICE),
    entry("128 heads", MANY, page=64, **TWICE),
    entry("16 heads", tile_for(16, torch.bfloat16, "sm_80"), "sm_80", buffers=2),
    entry("16 heads", tile_for(16, torch.bfloat16, "gfx942"), "gfx942", ratio=TWICE["ratio"]),
    entry("odd sizes", FEW, d_c=40, d_r=10, plain_loads=None),
    # wider latents: more warps than products, so some are made twice
    *(entry(f"{n} heads, {d_c} wide", tile_for(n, torch.bfloat16, target, d_c), target, d_c=d_c,
            shared=99 * 1024, ratio=1.52)
      for n, d_c, target in ((128, 768, "sm_90"), (16, 1024, "sm_90"), (128, 1024, "sm_80"))),
    # what the bench tries beside them
    entry("16 heads, 5 stages", Tile(16, 32, 4, 5, 1), buffers=4),
    entry("16 heads, 64 keys", Tile(16, 64, 4, 3, 1), buffers=2),
    entry("16 heads, swapped", Tile(16, 64, 4, 2, 1, swap=True), instruction="HGMMA", buffers=2),
    entry("16 heads, swapped", Tile(16, 64, 4, 2, 1, swap=True), page=64, instruction="HGMMA",
          buffers=2),
    Entry(
        name="combine sm_90", kernel=f"{MODULE}:combine_kernel",
        signature={"o": "*fp32", "lse": "*fp32", "out": "*bf16", "n": "i32:16", "splits": "i32"},
        constexprs=dict(D_C=512, BC=64, BS=256), num_warps=4, num_stages=3, ctas=2),
    Entry(
        name="combine few sm_90", kernel=f"{MODULE}:combine_kernel",
        signature={"o": "*fp32", "lse": "*fp32", "out": "*bf16", "n": "i32:16", "splits": "i32"},
        constexprs=dict(D_C=512, BC=512, BS=16), num_warps=4, num_stages=3, ctas=2),
]

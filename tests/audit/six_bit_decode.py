# SPDX-License-Identifier: MIT
"""What the kernel of six_bit_decode.py must compile to: see machine_code.py."""

from typing import Any

import torch
import triton.language as tl
from audit.latent_decode import INSTRUCTION, power
from audit.machine_code import Entry

from dsv2_ref.kernels.latent_decode import Tile
from dsv2_ref.kernels.six_bit_decode import tile_for

POINTERS = {"q_c": "*bf16", "q_r": "*bf16", "words": "*i16", "scales": "*i32", "positions": "*i64",
            "table": "*i32", "o": "*fp32", "lse": "*fp32"}
NUMBERS = {"scale": "fp32", "n": "i32:16", "n_h": "i32:16"}
NUMBERS |= dict.fromkeys(("S", "stride_wb", "stride_ws", "stride_sb", "stride_pb", "stride_pt",
                          "stride_tb"),
                         "i32")


def entry(
    name: str, tile: Tile, target: str = "sm_90", page: int = 0, d_c: int = 512, d_r: int = 64,
    **promises: Any,
) -> Entry:
    w, w_r = -(-d_c // 8), -(-d_r // 8)
    BW, BR, lent = power(w, 32), power(w_r, 16), min(2, 2 * w // d_r)
    columns = 2 * 8 * BW + 8 * BR + (2 * BW if lent else 0)
    return Entry(
        name=f"{name} {target}{' paged' * (page > 0)}",
        kernel="dsv2_ref.kernels.six_bit_decode:six_bit_kernel", signature=POINTERS | NUMBERS,
        constexprs=dict(D_C=d_c, D_R=d_r, LENT=lent, W=w, W_R=w_r, BW=BW, BR=BR, BH=tile.BH,
                        BN=tile.BN, PAGE=page, STEP=8 if d_c == 512 else 1, TYPE=tl.float16,
                        PTX=target == "sm_90", DOT="tf32", stride_ss=1),
        num_warps=tile.warps, num_stages=tile.stages, target=target,
        **{"instruction": INSTRUCTION[target], "ctas": tile.blocks,
           "plain_loads": None if target == "gfx942" else int(page > 0),
           "flops": 2 * tile.BH * tile.BN * columns} | promises)


FEW = tile_for(16, torch.bfloat16, "sm_90")
MANY = tile_for(128, torch.bfloat16, "sm_90")
ENTRIES = [
    entry("16 heads", FEW, buffers=2),
    entry("16 heads", FEW, page=64, buffers=2),
    entry("128 heads", MANY, buffers=2),
    entry("16 heads", tile_for(16, torch.bfloat16, "sm_80"), "sm_80", buffers=2),
    # both warps compute all scores: 768 of 1280 columns
    entry("16 heads", tile_for(16, torch.bfloat16, "gfx942"), "gfx942", ratio=1.6),
    entry("odd sizes", FEW, d_c=40, d_r=10, plain_loads=None),
    # what the bench tries beside them
    entry("16 heads, 32 keys", Tile(16, 32, 4, 4, 2), buffers=3),
    entry("16 heads, 8 warps", Tile(16, 64, 8, 3, 1), buffers=2),
]

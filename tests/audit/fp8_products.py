# SPDX-License-Identifier: MIT
"""What the kernels of fp8_products.py compile to, and may take: see machine_code.py."""

from audit.machine_code import Entry

from dsv2_ref.kernels.fp8_products import TILES, Tile

MODULE = "dsv2_ref.kernels.fp8_products"
INSTRUCTION = {"sm_90": {"few": "HMMA", "many": "HGMMA"},
               "sm_80": {"few": "HMMA", "many": "HMMA"},
               "gfx942": {"few": "MFMA", "many": "MFMA"}}
W_O, DOWN, ODD = (2048, 2048), (5120, 12288), (577, 481)
RAGGED = (577, 2000)                                          # r, c: of Lite, of V2, and ragged


def linear(name: str, rows: str, shape: tuple[int, int] = W_O, target: str = "sm_90",
           tiles: str | None = None, kind: str = "*bf16", each: int | None = None,
           **budget: object) -> Entry:
    r, c = shape
    tile = Tile(*TILES[tiles or target][rows])
    given = dict(instruction=None if kind == "*fp32" else INSTRUCTION[target][rows],
                 flops=2 * tile.BM * tile.BR * tile.BK, ctas=tile.blocks)
    signature = dict(x=kind, codes="*i8", scale="*fp32", out=kind if each is None else "*fp32",
                     M="i32")
    constexprs = dict(r=r, c=c, EACH=each or -(-c // 128), BM=tile.BM, BR=tile.BR,
                      BK=tile.BK, PTX=target != "gfx942" and kind != "*fp32")
    return Entry(name, f"{MODULE}:_linear_kernel", signature, constexprs, tile.warps, tile.stages,
                 target, **given | budget)


def quantised(name: str, shape: tuple[int, int], **budget: object) -> Entry:
    tile = Tile(*TILES["sm_90"]["fp8"])
    signature = dict(x="*fp8e4nv", x_scale="*fp32", codes="*fp8e4nv", scale="*fp32", out="*bf16",
                     M="i32")
    constexprs = dict(r=shape[0], c=shape[1], BM=tile.BM, BR=tile.BR)
    given = dict(instruction="QGMMA", flops=2 * tile.BM * tile.BR * 128)
    return Entry(name, f"{MODULE}:_quantised_kernel", signature, constexprs, tile.warps,
                 tile.stages, **given | budget)


_SUM = dict(parts="*fp32", out="*bf16", n="i32")
_DEQUANTISE = dict(codes="*i8", scale="*fp32", out="*bf16")

ENTRIES = [
    linear("few", "few", each=8, buffers=3, plain_loads=1),
    linear("many", "many", buffers=(2, 3), plain_loads=1),
    linear("few_v2", "few", DOWN, buffers=3, plain_loads=1),
    linear("many_v2", "many", DOWN, plain_loads=1),
    linear("few_fp16", "few", kind="*fp16", buffers=3, plain_loads=1),
    *(linear(f"{rows}_odd", rows, ODD, tiles="small", instruction="HMMA")
      for rows in ("few", "many")),
    linear("many_ragged", "many", RAGGED),
    *(linear(f"{rows}_fp32", rows, tiles="small", kind="*fp32", flops=None)
      for rows in ("few", "many")),
    *(linear(f"{rows}_{t}", rows, target=t) for t in ("sm_80", "gfx942")
      for rows in ("few", "many")),
    # 99 KB, and two blocks in 100
    *(linear(f"{rows}_consumer", rows, target="sm_80", tiles="consumer", shared=50_000)
      for rows in ("few", "many")),
    quantised("quantised", W_O, plain_loads=None),
    quantised("quantised_v2", DOWN),
    quantised("quantised_ragged", RAGGED),
    *(Entry(f"sum_{t}", f"{MODULE}:_sum_kernel", _SUM, dict(SPLITS=4, BLOCK=1024), 4, 3, t)
      for t in INSTRUCTION),
    *(Entry(f"dequantise_{t}", f"{MODULE}:_dequantise_kernel", _DEQUANTISE,
            dict(r=2048, c=512, BR=32), 4, 3, t) for t in INSTRUCTION),
]

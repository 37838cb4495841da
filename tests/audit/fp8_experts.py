# SPDX-License-Identifier: MIT
"""What the kernels of fp8_experts.py compile to, and may take: see machine_code.py."""

from audit.machine_code import Entry

from dsv2_ref.kernels.fp8_products import TILES, Tile

INSTRUCTION = {"sm_90": "HGMMA", "sm_80": "HMMA", "gfx942": "MFMA"}
LITE, V2, ODD = (2048, 1408, 64, 6), (5120, 1536, 160, 6), (1030, 705, 5, 3)
RAGGED = (2000, 1360, 5, 3)


def entry(name: str, product: str, tiles: str, sizes: tuple[int, ...] = LITE,
          target: str = "sm_90", card: str | None = None, kind: str = "*bf16",
          **budget: object) -> Entry:
    """`product` is up or rows; `card` whose tiles are taken, if not the target's."""
    d, w, E, K = sizes
    tile = Tile(*TILES[card or target][tiles])
    signature = dict.fromkeys(("order", "offsets"), "*i32")
    if product == "up":
        signature |= dict(x=kind, gate_codes="*i8", gate_scale="*fp32", up_codes="*i8",
                          up_scale="*fp32", h=kind)
    else:
        signature |= dict(h=kind, codes="*i8", scale="*fp32", gates="*fp32", out=kind)
    constexprs = dict(E=E, d=d, w=w, BM=tile.BM, BR=tile.BR, BK=tile.BK,
                      PTX=target != "gfx942" and kind != "*fp32")
    if product == "up":
        constexprs |= dict(K=K)
    flops = 2 * tile.BM * tile.BR * tile.BK * (2 if product == "up" else 1)
    given = dict(instruction="HMMA" if target == "sm_90" and tiles == "few" else
                 INSTRUCTION[target], flops=flops, ctas=tile.blocks)
    return Entry(name, f"dsv2_ref.kernels.fp8_experts:_{product}_kernel", signature, constexprs,
                 tile.warps, tile.stages, target, **given | budget)


MANY = {"up": "pair", "rows": "many"}
ENTRIES = [
    *(entry(f"{p}_few_{name}", p, "few", sizes, buffers=3)
      for p in MANY for name, sizes in (("lite", LITE), ("v2", V2))),
    *(entry(f"{p}_many_{name}", p, MANY[p], sizes)
      for p in MANY for name, sizes in (("lite", LITE), ("v2", V2), ("ragged", RAGGED))),
    *(entry(f"{p}_{tiles}_odd", p, tiles, ODD, card="small", instruction="HMMA")
      for p in MANY for tiles in ("few", MANY[p])),
    *(entry(f"{p}_{tiles}_fp32", p, tiles, card="small", kind="*fp32", instruction=None, flops=None)
      for p in MANY for tiles in ("few", MANY[p])),
    *(entry(f"{p}_{tiles}_{t}", p, tiles, target=t)
      for p in MANY for tiles in ("few", MANY[p]) for t in ("sm_80", "gfx942")),
    *(entry(f"{p}_{tiles}_consumer", p, tiles, target="sm_80", card="consumer", shared=50_000)
      for p in MANY for tiles in ("few", MANY[p])),
]

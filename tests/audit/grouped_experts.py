# SPDX-License-Identifier: MIT
"""What the kernels of grouped_experts.py and route_tokens.py compile to, and may take.

Sizes of V2-Lite and V2, which the tiles divide, and odd ones, which need masks and pointers.
"""

from audit.machine_code import Entry

from dsv2_ref.kernels.grouped_experts import TILES

INSTRUCTION = {"sm_90": "HGMMA", "sm_80": "HMMA", "gfx942": "MFMA"}
LITE, V2, ODD = (2048, 1408, 64, 6), (5120, 1536, 160, 6), (1030, 705, 5, 3)
POINTERS = {
    "up": "x W_gate W_up gate_out up_out h_out", "rows": "A W B V out",
    "back": "dy W_down gate up dgate dup gated_h", "weights": "A X dW",
}
DESCRIPTORS = {                                   # argument -> its block
    "up": {"W_gate": "NK", "W_up": "NK"}, "down": {"A": "MK", "B": "MK", "W": "NK", "V": "NK"},
    "inputs": {"A": "MK", "B": "MK", "W": "KN", "V": "KN"}, "back": {"W_down": "KN"},
    "weights": {},
}


def _entry(name: str, product: str, tiles: str, sizes: tuple[int, ...], target: str = "sm_90",
           kind: str = "*bf16", **budget: object) -> Entry:
    """One of up, down, inputs, back, weights."""
    d, w, E, K = sizes
    tma = tiles in ("sm_90", "few")
    kernel = "rows" if product in ("down", "inputs") else product
    BM, BN, BK, warps, stages, _ = TILES[tiles]["narrow" if product in ("up", "back") else "wide"]
    size = dict(M=BM, N=BN, K=BK)
    signature = {"order": "*i32", "offsets": "*i32"}
    signature |= {argument: kind for argument in POINTERS[kernel].split()}
    constexprs: dict[str, object] = dict(BM=BM, BN=BN, BK=BK)
    if kernel != "weights":
        constexprs |= dict(E=E, TMA=tma)
    if kernel in ("rows", "back"):
        signature["gates"] = "*fp32"
    if kernel == "rows":
        constexprs |= dict(outer=d, inner=w, BACK=product == "inputs")
    else:
        constexprs |= dict(K=K, d=d, w=w)
    if kernel == "up":
        constexprs |= dict(SAVE=True)
    if kernel == "back":
        signature["dg"] = "*fp32"
    if kernel == "weights":
        constexprs |= dict(along_w=d, along_d=1)
    if tma:
        for argument, block in DESCRIPTORS[product].items():
            signature[argument] = f"tensordesc<bf16[{size[block[0]]}, {size[block[1]]}]>"
    flops = 2 * BM * BN * BK * (2 if kernel == "up" else 1)
    given = dict(instruction="HMMA" if BM == 16 else INSTRUCTION[target], target=target,
                 flops=(flops, 2 * flops) if target == "gfx942" else flops)    # it may unroll
    return Entry(name, f"dsv2_ref.kernels.grouped_experts:_{kernel}_kernel", signature, constexprs,
                 warps, stages, **given | budget)


def _route(name: str, kernel: str, signature: dict[str, str], constexprs: dict[str, object],
           target: str, warps: int = 4) -> Entry:
    return Entry(name, f"dsv2_ref.kernels.{kernel}_kernel", signature, constexprs, warps, 3, target)


_SELECT = {"s": "*fp32", "indices": "*i64", "N": "i32"}
_SORT = {"indices": "*i64", "keep": "*u8", "slots": "i32", "blocks": "i32"}
_ROUTE = {"z": "*fp32", "s_out": "*fp32", "indices": "*i64", "gates": "*fp32", "order": "*i32",
          "offsets": "*i32", "factor": "fp32", "N": "i32"}
_SIMILARITY = {"u": "*bf16", "centroids": "*fp32", "z": "*fp32", "N": "i32"}
_SUM = {"rows": "*bf16", "keep": "*i1", "u": "*bf16", "shared": "*bf16", "y": "*bf16"}

ENTRIES = [
    _entry("up_lite", "up", "sm_90", LITE, buffers=3, plain_loads=0),
    _entry("down_lite", "down", "sm_90", LITE, buffers=3, plain_loads=0),
    _entry("back_lite", "back", "sm_90", LITE, buffers=3, plain_loads=0),
    _entry("inputs_lite", "inputs", "sm_90", LITE, buffers=3, plain_loads=0),
    _entry("weights_lite", "weights", "sm_90", LITE, buffers=3, plain_loads=8),
    *(_entry(f"{p}_v2", p, "sm_90", V2, buffers=3) for p in DESCRIPTORS),
    *(_entry(f"{p}_few", p, "few", LITE, buffers=2, ctas=2) for p in DESCRIPTORS),
    # 8 bytes: triton 3.6 puts two registers aside there, outside the loops
    *(_entry(f"{p}_{t}", p, t, LITE, t, ctas=2, stack=8 if p == "inputs" else 0)
      for p in DESCRIPTORS for t in ("sm_80", "gfx942")),
    *(_entry(f"{p}_fp32", p, "small", LITE, kind="*fp32", instruction=None, flops=None,
             stack=8 if p == "inputs" else 0) for p in DESCRIPTORS),
    *(_entry(f"{p}_{t}_odd", p, "small", ODD, t) for p in DESCRIPTORS for t in INSTRUCTION),
    *(_route(f"sum_{t}", "route_tokens:_sum", _SUM,
             dict(d=2048, K=6, KEEP=True, ADD=True, BLOCK=1024), t)
      for t in INSTRUCTION),
    *(_route(f"similarity_lite_{t}", "route_tokens:_similarity", _SIMILARITY,
             dict(E=64, d=2048, TOKENS=1, BLOCK=1024), t)
      for t in INSTRUCTION),
    *(_route(f"similarity_v2_{t}", "route_tokens:_similarity", _SIMILARITY,
             dict(E=160, d=5120, TOKENS=16, BLOCK=256), t)
      for t in INSTRUCTION),
    *(_route(f"route_lite_{t}", "route_tokens:_route", _ROUTE,
             dict(E=64, K=6, D=1, M=1, BLOCK=1, DEVICES=1, EACH=64), t, 1)
      for t in INSTRUCTION),
    *(_route(f"route_v2_{t}", "route_tokens:_route", _ROUTE,
             dict(E=160, K=6, D=8, M=3, BLOCK=16, DEVICES=8, EACH=32), t)
      for t in INSTRUCTION),
    *(_route(f"select_{t}", "route_tokens:_select", _SELECT,
             dict(E=160, K=6, D=8, M=3, BLOCK=32, DEVICES=8, EACH=32), t)
      for t in INSTRUCTION),
    *(_route(f"count_{t}", "route_tokens:_count", _SORT | {"counts": "*i32"},
             dict(E=160, KEEP=True, BLOCK=64, EXPERTS=256), t)
      for t in INSTRUCTION),
    *(_route(f"place_{t}", "route_tokens:_place", _SORT | {"edges": "*i32", "order": "*i32"},
             dict(E=160, KEEP=True, BLOCK=64, EXPERTS=256), t)
      for t in INSTRUCTION),
]

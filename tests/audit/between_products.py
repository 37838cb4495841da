# SPDX-License-Identifier: MIT
"""What the kernels of between_products.py compile to, at the sizes of V2-Lite and V2."""

from audit.machine_code import CARDS, Entry

TABLES = {name: "i32" for name in ("cos_b", "cos_t", "sin_b", "sin_t")}
ROTATE = {**{name: "*bf16" for name in ("q_r", "k_r", "q_out", "k_out")}, "cos": "*fp32",
          "sin": "*fp32", "tokens": "i32", "T": "i32"} | TABLES
SIZES = dict(N_H=16, D=64, ROWS=16, WIDTH=64)
NORM = {"h": "*bf16", "u": "*bf16", "weight": "*bf16", "total": "*bf16", "normed": "*bf16",
        "eps": "fp32"}


def _entry(name: str, kernel: str, signature: dict[str, str], constexprs: dict[str, object],
           target: str, warps: int = 4) -> Entry:
    return Entry(f"{name}_{target}", f"dsv2_ref.kernels.between_products:_{kernel}_kernel",
                 signature, constexprs, warps, 3, target)


ENTRIES = [entry for target in CARDS for entry in (
    _entry("rotate", "rotate", ROTATE, SIZES | dict(BACK=False), target),
    _entry("rotate_back", "rotate", ROTATE, SIZES | dict(BACK=True), target),
    _entry("swiglu", "swiglu", {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "n": "i32"},
           dict(SIZE=1024), target),
    _entry("norm_lite", "add_norm", NORM, dict(D=2048, WIDTH=2048), target),
    _entry("norm_v2", "add_norm", NORM, dict(D=5120, WIDTH=8192), target, 8),
)]

# SPDX-License-Identifier: MIT
"""What the kernels of between_products.py compile to, at the sizes of V2-Lite and V2."""

from audit.machine_code import CARDS, Entry

TABLES = {name: "i32" for name in ("cos_b", "cos_t", "sin_b", "sin_t")}
ROTATE = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "rows": "i32", "T": "i32",
          "n_h": "i32"} | TABLES
NORM = {"h": "*bf16", "u": "*bf16", "weight": "*bf16", "total": "*bf16", "normed": "*bf16",
        "eps": "fp32"}


def _entry(name: str, kernel: str, signature: dict[str, str], constexprs: dict[str, object],
           target: str, warps: int = 4) -> Entry:
    return Entry(f"{name}_{target}", f"dsv2_ref.kernels.between_products:_{kernel}_kernel",
                 signature, constexprs, warps, 3, target)


ENTRIES = [entry for target in CARDS for entry in (
    _entry("rotate", "rotate", ROTATE, dict(D=64, BACK=False, ROWS=16, WIDTH=64), target),
    _entry("rotate_back", "rotate", ROTATE, dict(D=64, BACK=True, ROWS=16, WIDTH=64), target),
    _entry("swiglu", "swiglu", {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "n": "i32"},
           dict(SIZE=1024), target),
    _entry("norm_lite", "add_norm", NORM, dict(D=2048, WIDTH=2048), target),
    _entry("norm_v2", "add_norm", NORM, dict(D=5120, WIDTH=8192), target, 8),
)]

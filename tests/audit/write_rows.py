# SPDX-License-Identifier: MIT
"""What the kernels of write_rows.py compile to: at V2's sizes, and at odd ones."""

from audit.machine_code import CARDS, Entry

ROWS = {"c_kv": "*bf16", "k_r": "*bf16", "places": "*i64", "real": "*i64"}
STORES = {"write": {"rows": "*bf16"}, "pack": {"words": "*i16", "scales": "*i16"}}
SIZES = {
    "write": {"v2": dict(D_C=512, D_R=64, BC=512, BR=64), "odd": dict(D_C=19, D_R=7, BC=32, BR=8)},
    "pack": {"v2": dict(D_C=512, D_R=64, LENT=2, W=64, W_R=8),
             "odd": dict(D_C=19, D_R=7, LENT=0, W=3, W_R=1)},
}

ENTRIES = [Entry(f"{kernel}_{name}_{target}", f"dsv2_ref.kernels.write_rows:_{kernel}_kernel",
                 ROWS | stores, SIZES[kernel][name] | dict(REAL=name == "odd"), 2, 3, target)
           for kernel, stores in STORES.items() for name in ("v2", "odd") for target in CARDS]

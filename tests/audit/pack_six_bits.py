# SPDX-License-Identifier: MIT
"""What the kernel of pack_six_bits.py compiles to: at V2's sizes, and at odd ones."""

from audit.machine_code import CARDS, Entry

SIGNATURE = {"c_kv": "*bf16", "k_r": "*bf16", "words": "*i16", "scales": "*i16"}
SIZES = {"v2": dict(D_C=512, D_R=64, LENT=2, W=64, W_R=8),
         "odd": dict(D_C=19, D_R=7, LENT=0, W=3, W_R=1)}

ENTRIES = [Entry(f"{name}_{target}", "dsv2_ref.kernels.pack_six_bits:_pack_kernel", SIGNATURE,
                 sizes, 2, 3, target)
           for name, sizes in SIZES.items() for target in CARDS]

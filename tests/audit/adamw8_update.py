# SPDX-License-Identifier: MIT
"""What the kernel of adamw8_update.py must compile to: see machine_code.py.

It has no matrix product and no loop; what counts is that memory is read and written in the widest
pieces, 8 weights a thread, by few instructions: 132 multiprocessors at 1.7 GHz issue about 68 for
each weight in the time in which 10 bytes pass at 4.2 TB/s.
"""

from audit.machine_code import Entry

from dsv2_ref.kernels.adamw8_update import ROWS, constants

MODULE = "dsv2_ref.kernels.adamw8_update"
SIGNATURE = {"m": "*i8", "v": "*u8", "m_largest": "*fp32", "v_largest": "*fp32", "clip": "*fp32"}
SIGNATURE |= dict.fromkeys(("n", "blocks", "low", "high"), "i32")
SIGNATURE |= dict.fromkeys(("beta_1", "new_1", "beta_2", "new_2", "keep", "rate", "eps"), "fp32")
BF16 = "*i16"                                     # their bits


def entry(
    target: str, kind: str = BF16, whole: bool = True, blocks: int = 8, **budget: int
) -> Entry:
    return Entry(
        name=f"{target} {'bf16' if kind == BF16 else 'fp32'}{' ragged' * (not whole)}",
        kernel=f"{MODULE}:_update_kernel", signature=SIGNATURE | {"W": kind, "gradient": kind},
        constexprs={"WHOLE": whole, **constants(target != "gfx942")}, num_warps=ROWS, num_stages=3,
        target=target, ctas=blocks, shared=4096, **budget)


# 12: weight, gradient, m, v, two scales and the factor read; five of them written
ENTRIES = [
    *(entry(target, accesses=12, length=750) for target in ("sm_90", "sm_80")),
    *(entry(target, "*fp32", accesses=15, length=600) for target in ("sm_90", "sm_80")),
    *(entry(target, whole=False, blocks=6, length=1100) for target in ("sm_90", "sm_80")),
    entry("sm_90", "*fp32", whole=False, blocks=6, length=1100),
    entry("gfx942", accesses=12, length=800),
    entry("gfx942", "*fp32", accesses=12),
    entry("gfx942", whole=False),
]

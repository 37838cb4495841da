# SPDX-License-Identifier: MIT
"""What the kernels of flash_attention.py must compile to: see machine_code.py."""

from audit.machine_code import Entry

from dsv2_ref.kernels.flash_attention import TILES, padded

MODULE = "dsv2_ref.kernels.flash_attention"
POINTERS = {
    "forward": "Q_c Q_r K_c K_r V O", "dq": "Q_c Q_r K_c K_r V O dO dQ_c dQ_r",
    "dkdv": "Q_c Q_r K_c K_r V dO dK_c dV",
}
FP32 = {"forward": "LSE", "dq": "LSE Delta", "dkdv": "LSE Delta dK_r"}
NUMBERS = {"forward": ("scale_2",), "dq": ("scale", "scale_2"), "dkdv": ("scale", "scale_2")}
BUFFERS = {"sm_90": {"forward": 2, "dq": 2, "dkdv": (2, 3)},        # 2: lse and delta
           "sm_80": {"forward": 2, "dq": 1, "dkdv": 1}}             # mma.sync needs one fewer


def entry(
    kernel: str, target: str, widths: tuple[int, int, int] = (128, 64, 128), H: int = 16,
    positions: bool = False,
) -> Entry:
    BM, BN, num_warps, num_stages = TILES[target][kernel]
    signature = dict.fromkeys(POINTERS[kernel].split(), "*bf16")
    signature |= dict.fromkeys(FP32[kernel].split(), "*fp32")
    signature |= {"cu_q": "*i32", "cu_k": "*i32", "N": "i32"}
    signature |= dict.fromkeys(NUMBERS[kernel], "fp32")
    constexprs = {**dict(zip(("D_H", "D_R", "D_V"), widths)), "H": H, "BM": BM, "BN": BN}
    if positions:
        signature["positions"] = "*i32"
    else:
        constexprs["positions"] = None
    # how often each width is multiplied with, for every query and key
    times = {"forward": (1, 1, 1), "dq": (2, 2, 1), "dkdv": (2, 2, 2)}[kernel]
    products = sum(n * padded(width) for n, width in zip(times, widths))
    return Entry(
        name=f"{kernel} {target} {widths}{' positions' * positions}",
        kernel=f"{MODULE}:_{'' if kernel == 'forward' else 'backward_'}{kernel}",
        signature=signature, constexprs=constexprs, num_warps=num_warps, num_stages=num_stages,
        target=target, instruction={"sm_90": "HGMMA", "sm_80": "HMMA", "gfx942": "MFMA"}[target],
        flops=2 * BM * BN * products, buffers=BUFFERS.get(target, {}).get(kernel),
        plain_loads=None if target == "gfx942" else 0,
    )


KERNELS = ("forward", "dq", "dkdv")
ENTRIES = [entry(kernel, target) for target in ("sm_90", "sm_80", "gfx942") for kernel in KERNELS]
ENTRIES += [entry(kernel, "sm_90", (40, 24, 56), H=3, positions=kernel == "dkdv")
            for kernel in KERNELS]

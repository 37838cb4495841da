# SPDX-License-Identifier: MIT
"""Unit tests and notebooks as several kinds of processors would run them: `make matrix`.

torch, oneDNN and MKL choose their code by what the processor can do, and each sums in an order of
its own; so does every number of threads. They can be told to use less than there is, and so one
machine stands for several. (MKL heeds its variable on Intel processors alone.)

`python tests/matrix.py ARGUMENT…` gives pytest those arguments instead, under each setting.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def limited(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn,
            "MKL_ENABLE_INSTRUCTIONS": mkl}


# a limit is of interest where the processor has the flag of what lies above it
LIMITS = [
    ("AVX-512 without AMX", "amx_tile", limited("avx512", "AVX512_CORE", "AVX512")),
    ("AVX2", "avx512f", limited("avx2", "AVX2", "AVX2")),
    ("SSE", "avx2", limited("default", "SSE41", "SSE4_2")),
]


def processor_flags() -> set[str]:
    """What Linux says of the processor; elsewhere nothing, and only the default is run."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def settings(flags: set[str]) -> dict[str, dict[str, str]]:
    """Name -> environment."""
    kinds = [("default", {})] + [(name, limit) for name, above, limit in LIMITS if above in flags]
    return {f"{name}, {threads} thread{'s' * (threads > 1)}":
            limit | {"DSV2_THREADS": str(threads), "OMP_NUM_THREADS": str(threads),
                     "OMP_WAIT_POLICY": "passive"}      # two pytest workers share the cores
            for name, limit in kinds for threads in (1, 2)}


def main(arguments: list[str]) -> int:
    workers = ["-q", "-n", "2", "--dist", "loadscope"]
    runs = {"unit tests": workers,
            "notebooks": ["--nbval", "--nbval-cell-timeout", "240", *workers, "notebooks"]}
    if arguments:
        runs = {" ".join(arguments): arguments}
    summary, failed = [], 0
    for setting, environment in settings(processor_flags()).items():
        for what, options in runs.items():
            print(f"\n==== {setting}: {what}", flush=True)
            done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT,
                                  env=os.environ | environment, check=False)
            failed += done.returncode != 0
            summary.append(f"{'FAILED' if done.returncode else 'passed'}  {setting}: {what}")
    print("\n==== summary", *summary, f"{len(summary) - failed} of {len(summary)} passed", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

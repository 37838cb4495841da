# SPDX-License-Identifier: MIT
"""`make matrix`: unit tests and notebooks under several settings of the CPU.

Libraries choose their code by what the CPU can do, and sum in another order with each: a test that
holds on one CPU alone judges the machine and not the code. Narrower instructions than the machine
has can be asked for; wider ones cannot. `python tests/matrix.py NAME ...` runs some settings.
"""

import os
import subprocess
import sys

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
       "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
SETTINGS = {
    "all this CPU has, 1 thread": {},
    "all this CPU has, 2 threads": {"DSV2_THREADS": "2", "OMP_NUM_THREADS": "2"},
    "AVX2, 1 thread": AVX2,
    "AVX2, 2 threads": AVX2 | {"DSV2_THREADS": "2", "OMP_NUM_THREADS": "2"},
    "SSE, 1 thread": SSE,
}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope"]
RUNS = {"unit tests": [*PYTEST, "tests"],
        "notebooks": [*PYTEST, "--nbval", "--nbval-cell-timeout", "240", "notebooks"]}


def main(names: list[str]) -> int:
    """0 if everything passed under every setting, else 1; each is named with its outcome."""
    outcomes = []
    for name in names or SETTINGS:
        for what, command in RUNS.items():
            print(f"== {name}: {what}", flush=True)
            environment = {"OMP_NUM_THREADS": "1"} | SETTINGS[name]
            code = subprocess.run(command, env=os.environ | environment, check=False).returncode
            outcomes.append(f"{'passed' if code == 0 else 'FAILED'}  {name}: {what}")
    print("\n".join(["", *outcomes]))
    return int(any(line.startswith("FAILED") for line in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

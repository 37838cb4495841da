# SPDX-License-Identifier: MIT
"""The four benches of kernels on a GPU, one after the other in one process.

It takes a few minutes, tells its progress on stderr and writes data/results/gpu-DATE.json, which
notebook 13 draws. One that fails is recorded with its reason, and the rest go on. `train` and
`ablations` use a GPU too, and are run by themselves.
"""

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from dsv2_ref.bench.harness.gpu import device_for, record
from dsv2_ref.checkout import in_checkout
from dsv2_ref.files.whole import write_text

NAMES = ("attention", "mla_decode", "six_bit_decode", "experts")


def run(quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """One JSON-able record of all, also a file in data/results; with `quick` nothing is written."""
    if not quick:
        folder = folder or in_checkout("data/results")         # before the work, not after it
    device = device_for("all", quick)
    start = time.perf_counter()
    result = {"name": "all", "quick": quick, **record(device), "benches": {}}
    for name in NAMES:
        result["benches"][name] = _one(name, quick)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = time.perf_counter() - start
    if not quick:
        file = folder / f"gpu-{result['date']}.json"
        write_text(file, json.dumps(result, indent=1) + "\n")
        print(f"written: {file}", file=sys.stderr)
    return result


def _one(name: str, quick: bool) -> dict[str, Any]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        result = importlib.import_module(f"dsv2_ref.bench.{name}").run(quick=quick)
    except Exception as error:               # whatever it is, the others are still worth their run
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return result

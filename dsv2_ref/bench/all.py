# SPDX-License-Identifier: MIT
"""Every GPU benchmark in one process, one after the other: the one command to run on a GPU.

It takes a few minutes, tells its progress on stderr and writes data/results/gpu-DATE.json, which
notebook 13 draws. One that fails is recorded with its reason, and the rest go on.
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
from dsv2_ref.files.whole import write_text

NAMES = ("attention", "mla_decode", "six_bit_decode", "experts")
RESULTS = Path(__file__).parents[2] / "data" / "results"


def run(quick: bool = False, folder: Path = RESULTS) -> dict[str, Any]:
    """One JSON-able record of all; with `quick` nothing is written."""
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

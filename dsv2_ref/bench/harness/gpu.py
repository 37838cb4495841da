# SPDX-License-Identifier: MIT
"""Timing kernels on one GPU, several of them in turns, beside what the card does at most.

A benchmark takes its device from `device_for`, asserts with `check` that what it is about to time
is right, times everything in one call of `medians`, and returns

    {"name": ..., "quick": ..., **record(device), "rows": [row(...), ...]}

How a time is taken: before each timed call the GPU reads a buffer several times the size of its
L2 cache. That takes a fraction of a millisecond, in which the CPU launches the call, so that no
launch is in the time; it leaves nothing of the inputs in the cache, and nothing behind that would
still have to be written. The inputs rotate as well. A time is that between two events.

On a CPU (a benchmark's `quick`) the same calls are timed by the clock: that shows that they run.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.training.machine import machine

TOLERANCE = 5e-3        # relative RMS, of bf16 against fp32

Step = Callable[[Any], object]          # takes one of the rotating inputs
Times = dict[str, float | str]          # milliseconds, or why there are none


def device_for(name: str, quick: bool) -> torch.device:
    """The CUDA device; for `quick` a CPU serves too. ValueError without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not quick:
        raise ValueError(f"bench {name}: no CUDA device here, expected one (--quick runs tiny "
                         f"sizes on a CPU)")
    return torch.device("cpu")


@cache
def record(device: torch.device) -> dict[str, Any]:
    """Device, versions, date, and the copy and matmul rates of this run."""
    if device.type == "cpu":
        return machine() | {"device": "cpu", **rates(device)}
    properties = torch.cuda.get_device_properties(device)
    return machine() | {
        "device": properties.name, "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory, "driver": _driver(),
        "triton": _triton(), **rates(device),
    }


def rates(device: torch.device) -> dict[str, float]:
    """What the card does at most: bytes read and written by a copy, a large matrix product."""
    quick = device.type == "cpu"
    numbers, n = (2**18, 128) if quick else (2**29, 8192)
    half = torch.float32 if quick else torch.bfloat16
    source = torch.randn(numbers, device=device).to(half)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(half) for _ in range(2))
    ms = medians({"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b},
                 [None], device)
    return {"copy_tb_per_s": 2 * source.nbytes / milliseconds(ms, "copy") / 1e9,
            "matmul_tflops": 2 * n**3 / milliseconds(ms, "matmul") / 1e9}


def rotated(make: Callable[[int], Any], nbytes: int, device: torch.device) -> list[Any]:
    """make(0), make(1), ...: 2 to 32 inputs of `nbytes`, together three times the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [make(i) for i in range(min(max(2, -(-3 * l2 // nbytes)), 32))]


def medians(
    steps: dict[str, Step], inputs: Sequence[Any], device: torch.device,
    n: int = 20, warmup: int = 3,
) -> Times:
    """Median milliseconds of n calls of each step, one of each in turn, on rotating inputs.

    A step that raises in its warm-up is left out, and its name then has the reason as a string.
    """
    found: Times = {}
    for name, step in steps.items():
        try:
            for i in range(warmup):
                step(inputs[i % len(inputs)])
            _wait(device)
        except Exception as error:           # a comparator may refuse for any reason
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    running = {name: step for name, step in steps.items() if name not in found}
    timed: dict[str, list] = {name: [] for name in running}
    for i in range(n):
        for name, step in running.items():
            timed[name].append(_timed(step, inputs[i % len(inputs)], device))
    _wait(device)
    return found | {name: statistics.median(t() for t in times) for name, times in timed.items()}


def _timed(step: Step, x: Any, device: torch.device) -> Callable[[], float]:
    """Run a step once; what comes back gives its milliseconds, once the device has finished."""
    if device.type == "cpu":
        start = time.perf_counter()
        step(x)
        ms = 1e3 * (time.perf_counter() - start)
        return lambda: ms
    _head_start(device).sum()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step(x)
    after.record()
    return lambda: before.elapsed_time(after)


@cache
def _head_start(device: torch.device) -> Tensor:
    """1 GiB to read: about 0.3 ms, and several times any L2 cache."""
    return torch.zeros(2**28, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN where `got` has one."""
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def check(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """The relative RMS error; RuntimeError if it is not below `tolerance`."""
    error = rms_error(got, expected)
    if not error < tolerance:
        raise RuntimeError(f"{what}: relative RMS error {error:.1e}, expected less than "
                           f"{tolerance:.0e}")
    return error


def milliseconds(ms: Times, name: str) -> float:
    """The time of a step that must not have failed."""
    if isinstance(ms[name], str):
        raise RuntimeError(f"{name}: {ms[name]}")
    return ms[name]


def row(
    case: str, ms: Times, flops: float, nbytes: float, error: float, ours: str = "ours",
    **sizes: Any,
) -> dict[str, Any]:
    """One line of a record: `flops` and `nbytes` are what the work needs at least.

    `ratio` is the best comparator's time over that of `ours`: above 1, ours is faster.
    """
    times = {name: t for name, t in ms.items() if not isinstance(t, str)}
    theirs = {name: t for name, t in times.items() if name != ours}
    best = min(theirs, key=theirs.get, default=None)
    return {
        "case": case, **sizes, "flops": flops, "bytes": nbytes, "error": error, "ms": ms,
        "ours": ours, "tflops": flops / milliseconds(ms, ours) / 1e9,
        "tb_per_s": nbytes / milliseconds(ms, ours) / 1e9, "best": best,
        "ratio": None if best is None else times[best] / times[ours],
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _triton() -> str:
    import triton

    return triton.__version__

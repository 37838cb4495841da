# SPDX-License-Identifier: MIT
"""Timing kernels on one GPU, several of them in turns, beside what the card does at most.

A benchmark asserts with `check` that what it is about to time is right, times with `medians` and
makes a `row` of it; cases.py runs its cases one by one. Three kinds of steps: ours, `peers` that do
the same work, and `bounds` that do not: a copy of as many bytes is a limit, and never the best.

How a time is taken: before each timed call the GPU reads a buffer several times the size of its
L2 cache. That takes a fraction of a millisecond, in which the CPU launches the call, so that no
launch is in the time; it leaves nothing of the inputs in the cache, and nothing behind that would
still have to be written. The inputs rotate as well. A time is that between two events.

On a CPU (a benchmark's `quick`) the same calls are timed by the clock: that shows that they run.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.training.machine import machine

TOLERANCE = 5e-3        # of ours: relative RMS, of bf16 against fp32
PEER_TOLERANCE = 2e-2   # of others: scores or weights rounded to bf16 alone make 6e-3

Step = Callable[[Any], object]          # takes one of the rotating inputs
Times = dict[str, float | str]          # milliseconds, or why there are none


def device_for(name: str, quick: bool) -> torch.device:
    """The CUDA device; for `quick` a CPU serves too. ValueError without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)         # asking which is the current one starts it
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
    steps: dict[str, Step | str], inputs: Sequence[Any], device: torch.device,
    n: int | None = None, warmup: int | None = None,
) -> Times:
    """Median milliseconds of n calls of each step, one of each in turn, on rotating inputs.

    A step that raises, in its warm-up or while it is timed, is left out from there on, and its name
    has the reason as a string; a string in place of a step is such a reason already. Without n and
    warmup 20 and 3; once and without on a CPU, where kernels are interpreted.
    """
    usual = (1, 0) if device.type == "cpu" else (20, 3)
    n, warmup = (x if given is None else given for given, x in zip((n, warmup), usual))
    found: Times = {name: step for name, step in steps.items() if isinstance(step, str)}

    def guarded(name: str, work: Callable[..., Any], *args: Any) -> Any:
        if name not in found:
            try:
                return work(*args)
            except Exception as error:       # a comparator may refuse for any reason
                found[name] = reason(error)

    for name, step in steps.items():
        for i in range(warmup):
            guarded(name, step, inputs[i % len(inputs)])
        guarded(name, _wait, device)
    timed: dict[str, list] = {name: [] for name in steps}
    for i in range(n):
        for name, step in steps.items():
            timed[name].append(guarded(name, _timed, step, inputs[i % len(inputs)], device))
    _wait(device)
    return {name: guarded(name, _median, timed[name]) for name in steps} | found


def _median(times: list[Callable[[], float]]) -> float:
    return statistics.median(t() for t in times)


def growing(
    stages: Iterable[dict[str, Step | str]], inputs: Sequence[Any], device: torch.device,
    **settings: Any,
) -> Iterator[Times]:
    """`medians` of the first stage's steps, then of the first two stages', and so on.

    An error that takes the whole process with it, as an illegal address does, then takes the stage
    it is in and those after it: what is most worth to know goes into the first one. `stages` may
    be a generator, which checks what it is about to add.
    """
    steps: dict[str, Step | str] = {}
    for stage in stages:
        steps |= stage
        yield medians(steps, inputs, device, **settings)


def sound(
    steps: dict[str, Step], x: Any, expected: Callable[[str], Tensor], tolerance: float
) -> dict[str, Step | str]:
    """The steps, with a reason in place of each that does not give expected(name)."""
    found: dict[str, Step | str] = {}
    for name, step in steps.items():
        try:
            check(step(x), expected(name), name, tolerance)
            found[name] = step
        except Exception as error:           # it may be refused by this very GPU
            found[name] = reason(error)
    return found


def reason(error: Exception) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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


def squares(got: Tensor, expected: Tensor) -> Tensor:
    """(2,) in fp64: the sums of the squares of the difference and of `expected`.

    In pieces: a second copy of a large gradient in fp64 takes more than the gradient.
    """
    pieces = zip(*(t.detach().flatten().split(2**24) for t in (got, expected)), strict=True)
    sums = [torch.stack(((a.double() - b.double()).square().sum(), b.double().square().sum()))
            for a, b in pieces]
    return torch.stack(sums).sum(0)


def rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN where `got` has one."""
    return ratio(squares(got, expected))


def ratio(sums: Tensor) -> float:
    """The relative RMS error of those sums."""
    return (sums[0] / sums[1]).sqrt().item()


def check(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """The relative RMS error; RuntimeError if it is not below `tolerance`."""
    if got.shape != expected.shape:
        raise RuntimeError(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    return below(rms_error(got, expected), what, tolerance)


def below(error: float, what: str, tolerance: float = TOLERANCE) -> float:
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
    bounds: Sequence[str] = ("copy",), **sizes: Any,
) -> dict[str, Any]:
    """One line of a record: `flops` and `nbytes` are what the work needs at least.

    `speed_of` has every other step's time over that of `ours`: above 1, ours is faster. `ratio` is
    that of the best peer; what is named in `bounds` does other work and is no peer.
    """
    mine = milliseconds(ms, ours)
    speed_of = {name: t / mine for name, t in ms.items() if not isinstance(t, str) and name != ours}
    peers = [name for name in ms if name not in (ours, *bounds)]
    best = min(speed_of.keys() & set(peers), key=speed_of.get, default=None)
    return {
        "case": case, **sizes, "flops": flops, "bytes": nbytes, "error": error, "ms": ms,
        "ours": ours, "peers": peers, "bounds": [name for name in bounds if name in ms],
        "tflops": flops / mine / 1e9, "tb_per_s": nbytes / mine / 1e9, "speed_of": speed_of,
        "best": best, "ratio": speed_of.get(best),
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

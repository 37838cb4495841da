# SPDX-License-Identifier: MIT
"""What this machine is, and what it does fast: its precision, its threads, its memory."""

import ctypes
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_CORES = torch.get_num_threads()


def fast_precision(device: torch.device | str) -> str:
    """"bf16" where matrices are faster in it (GPUs, CPUs with AMX), else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16"
    abilities = getattr(torch.cpu, "get_capabilities", dict)()      # newer versions of torch only
    return "bf16" if abilities.get("amx_bf16") else "fp32"


def keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of returning it after every step.

    Each step allocates the same large tensors; returned, their pages are zeroed by the kernel again
    and again: 14 to 33 % of a small bf16 step on a CPU, as measured. glibc only, no harm elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-3, 1 << 30)         # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)   # M_TRIM_THRESHOLD


def set_fastest_threads(work: Callable[[], object], tries: int = 2) -> None:
    """Use one thread or all, whichever does `work` faster just now; it is done 2·tries times.

    Threads that wait for each other are many times slower than one when another program wants a
    core. For work by the clock alone: the number of threads changes the last bits of sums.
    """
    best: dict[int, float] = {}
    for threads in {torch.get_num_threads(), _CORES, 1}:
        torch.set_num_threads(threads)
        for _ in range(tries):
            began = time.perf_counter()
            work()
            best[threads] = min(best.get(threads, math.inf), time.perf_counter() - began)
    torch.set_num_threads(min(best, key=best.get))


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bf16 matmuls, fp32 weights and sums; nothing for "fp32"."""
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16,
                                                   enabled=precision == "bf16"):
        # a norm of bf16 activations by fp32 gains is computed in fp32, just not in one kernel
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def memory(device: torch.device | str) -> tuple[int | None, int | None]:
    """Bytes of memory that are free and that there are in all; None where the system does not say.

    On a GPU what torch holds without using it counts as free.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 1024 * kib["MemAvailable"], 1024 * kib["MemTotal"]
    except (OSError, LookupError, ValueError):                  # not Linux
        pass
    try:
        return None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):               # Windows
        return None, None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """What a dated result has to name: the day, what it ran on, and the versions."""
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        "date": date.today().isoformat(), "cpu": _cpu_name(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("numpy", "tokenizers", "safetensors")}, **gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

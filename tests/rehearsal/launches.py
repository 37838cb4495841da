# SPDX-License-Identifier: MIT
"""Triton launches as they would be on the card: specialised, checked, and not run.

Triton's own binder says what a launch specialises on. Each different key is a compilation, of
seconds, in the first process that meets it; `compiled` counts them, and with `build` each is really
compiled for sm_90 and judged by its resources.
"""

import contextlib
import math
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

TARGET = GPUTarget("cuda", 90, 32)
SHARED, REGISTERS = 232_448, 65_536          # bytes of a block; of all its threads together


class _Pointer:
    """What Triton's binder asks of a tensor. Allocations begin at multiples of 512 bytes."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype, self.shape = x, x.dtype, x.shape

    def data_ptr(self) -> int:
        return 512 + self.x.storage_offset() * self.x.element_size()

    def stride(self) -> tuple[int, ...]:
        return self.x.stride()


def _bindable(x: object) -> object:
    if isinstance(x, Tensor):
        return _Pointer(x)
    if isinstance(x, TensorDescriptor):
        same = object.__new__(TensorDescriptor)      # its __init__ would read an address
        same.__dict__.update(x.__dict__, base=_Pointer(x.base))
        return same
    return x


class Recorder:
    """`launches` by kernel, `compiled` its keys, `wrong` one line for each launch that is."""

    def __init__(self, current: object = None, build: bool = False) -> None:
        self.current, self.build = current, build            # a Card, whose device is current
        self.launches: Counter[str] = Counter()
        self.files: dict[str, str] = {}                      # kernel -> where it stands
        self.compiled: dict[tuple[str, str], dict[str, Any] | None] = {}
        self.wrong: list[str] = []
        self._backend, self._binders, self._keys = make_backend(TARGET), {}, {}

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        def run(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self._launch(fn, args, grid, kwargs)

        with mock.patch.object(jit.JITFunction, "run", run):
            yield self

    def variants(self) -> dict[str, int]:
        """Compilations of each kernel."""
        return dict(Counter(name for name, _ in self.compiled))

    def _launch(self, fn: Any, args: tuple, grid: Any, kwargs: dict[str, Any]) -> None:
        name = fn.__name__
        self.files[name] = fn.module.rpartition(".")[2]
        kwargs.setdefault("debug", fn.debug)
        if fn not in self._binders:
            self._binders[fn] = jit.create_function_from_signature(fn.signature, fn.params,
                                                                   self._backend)
        bound, special, options = self._binders[fn](
            *map(_bindable, args), **{n: _bindable(v) for n, v in kwargs.items()})
        grid = tuple(int(g) for g in (grid(bound) if callable(grid) else grid))
        self._check(name, bound, special, (*grid, 1, 1)[:3])
        self.launches[name] += 1
        key = name, jit.compute_cache_key(self._keys.setdefault(fn, {}), special, options)
        if key not in self.compiled:
            self.compiled[key] = None
            if self.build:
                packed = fn._pack_args(self._backend, kwargs, bound, special, options)
                self.compiled[key] = self._compile(fn, *packed)

    def _check(self, name: str, bound: dict, special: list, grid: tuple[int, ...]) -> None:
        def wrong(what: str) -> None:
            self.wrong.append(f"{name}: {what}")

        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16):
            wrong(f"grid {grid}, which no card launches")
        if math.prod(grid) >= 2**31:
            wrong(f"grid {grid}, whose product wraps in Triton's launcher")
        for (argument, value), (kind, *_) in zip(bound.items(), special, strict=False):
            if kind == "i64":
                wrong(f"{argument} = {value} is beyond int32")
            x = getattr(value, "x", None)
            if isinstance(value, TensorDescriptor):
                x = value.base.x
                if any(n >= 2**32 for n in value.shape) or any(n > 256 for n in value.block_shape):
                    wrong(f"{argument}: descriptor {value.shape} in {value.block_shape}")
            elif x is not None and value.data_ptr() % 16:
                wrong(f"{argument} is not aligned to 16 bytes")
            if x is not None:
                self._check_device(wrong, argument, x.device)

    def _check_device(self, wrong: Any, argument: str, device: torch.device) -> None:
        if device.type != "cuda":
            wrong(f"{argument} is on {device}")
        elif self.current is not None and device.index != self.current.current:
            wrong(f"{argument} is on {device}, the launch goes to cuda:{self.current.current}")

    def _compile(self, fn: Any, options: Any, signature: Any, constexprs: Any,
                 attributes: Any) -> dict[str, Any]:
        began = time.perf_counter()
        kernel = triton.compile(ASTSource(fn, signature, constexprs, attributes), target=TARGET,
                                options=options.__dict__)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], text=True,
                                   capture_output=True, check=True).stdout

        def most(what: str) -> int:
            return max(map(int, re.findall(rf"\b{what}:(\d+)", usage)))

        threads = 32 * kernel.metadata.num_warps
        found = {"registers": most("REG"), "stack": most("STACK"),
                 "shared": kernel.metadata.shared, "threads": threads,
                 "scratch": kernel.metadata.global_scratch_size,
                 "seconds": round(time.perf_counter() - began, 1)}
        for what, most_there_is in (("shared", SHARED), ("stack", 0), ("scratch", 0)):
            if found[what] > most_there_is:
                self.wrong.append(f"{fn.__name__}: {found[what]} bytes of {what}, expected at most "
                                  f"{most_there_is}")
        if found["registers"] * threads > REGISTERS:
            self.wrong.append(f"{fn.__name__}: {found['registers']} registers in {threads} threads")
        return found

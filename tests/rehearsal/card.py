# SPDX-License-Identifier: MIT
"""A pretended CUDA card: its tensors are fake, the host's are real, and waiting for it is counted.

Import this before anything of dsv2_ref: `torch.inference_mode`, which fake tensors do not know, is
`torch.no_grad` from here on.
"""

import contextlib
import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

torch.inference_mode = lambda mode=True: torch.no_grad()

aten, DEVICE = torch.ops.aten, torch.ops.prim.device.default
META = torch.device("meta")

# bytes of memory as the driver tells them; both have 132 multiprocessors
MEMORY = {"NVIDIA H200": 150_754_820_096, "NVIDIA H100": 85_520_809_984}


def not_run(*args: object, **kwargs: object) -> None:
    raise RuntimeError("a kernel of the pretended card was run")


# a build for cards has kernels of its own for these; without their names they would be composed of
# others here, and take more memory
_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"):
    _LIBRARY.impl(_name, not_run, "CUDA")


def on_card(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def place() -> str:
    """File and line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/dsv2_ref/" in path:
            return f"{path.rpartition('/dsv2_ref/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Card(FakeTensorMode):
    """Fake tensors for the card alone. `waits`: how often the host waited for it, by place."""

    avoid_device_init = True         # torch.cuda.is_available() says yes, and there is nothing

    def __init__(self, index: int) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.here = torch.device("cuda", index)
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE:
            return META
        device = kwargs.get("device")
        if device == META:           # C++ took it from a fake tensor, which is `meta` to it
            device, kwargs = self.here, kwargs | {"device": self.here}
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if not fake and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.bincount.default and on_card(args[0]):
            return self._bincount(*args, **kwargs)
        if func is aten._to_copy.default and device is not None and device.type == "cpu":
            self.wait("copied to the host")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not on_card(args[0]):
            self.wait("copied to the host")
            return args[0]
        if func is aten.nonzero.default:
            self.wait("nonzero")             # for how many there are; here all
            x = args[0]
            with self:
                return torch.empty(x.numel(), x.ndim, dtype=torch.int64, device=self.here)
        if func is aten.equal.default:
            self.wait("equal")
            return True
        if func is aten.split_with_sizes.default and len(args) == 2 and not any(args[1]):
            # sizes that were read on the card, as zeros: all is in the first part
            args = args[0], [args[0].shape[0], *args[1][1:]]
        if func is aten.index.Tensor and any(
                x is not None and x.dtype == torch.bool for x in args[1]):
            return self._chosen(*args)
        return super().__torch_dispatch__(func, kinds, args, kwargs)

    def wait(self, what: str) -> None:
        self.waits[f"{what} {place()}"] += 1

    def _number(self, x: Tensor) -> bool | int | float:
        """Whatever is read: yes for a truth, 0 for any other number."""
        self.wait("read")
        return True if x.dtype == torch.bool else 0.0 if x.dtype.is_floating_point else 0

    def _chosen(self, x: Tensor, indices: list[Tensor | None]) -> Tensor:
        """x[mask], all of it."""
        if len(indices) != 1:
            raise RuntimeError("x[mask, ...]: the pretended card knows x[mask] alone")
        self.wait("nonzero")
        with self:
            return torch.empty(indices[0].numel(), *x.shape[indices[0].ndim :], dtype=x.dtype,
                               device=self.here)

    def _bincount(self, x: Tensor, weights: object = None, minlength: int = 0) -> Tensor:
        self.wait("bincount")        # the largest and the smallest are read
        self.wait("bincount")
        with self:
            return torch.empty(minlength, dtype=torch.int64, device=self.here)


_of_fake = FakeTensor.__torch_dispatch__.__func__


def _seen_from_c(
    cls: type, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
) -> Any:
    if func is DEVICE:
        return META                  # the backward engine would ask for a stream of a real card
    return _of_fake(cls, func, kinds, args, kwargs or {})


class _Event:
    def __init__(self, **options: bool) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


class _Graph:
    """What is captured has run, for all there is to see; a replay runs nothing."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


def _listed(x: Tensor) -> Any:
    """FakeTensor.tolist, which asks for one number after the other."""
    return torch.zeros(x.shape, dtype=x.dtype).copy_(x).tolist()


def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True,
           seen: dict | None = None) -> torch.nn.Module:
    """nn.Module's, which would swap tensors in place: fake ones cannot."""
    seen = {} if seen is None else seen
    for child in module.children():
        child._apply(fn) if type(child)._apply is not _apply else _apply(child, fn, seen=seen)
    for name, W in module._parameters.items():
        if W is not None and id(W) not in seen:
            with torch.no_grad():
                seen[id(W)] = W, torch.nn.Parameter(fn(W), W.requires_grad)
        if W is not None:
            module._parameters[name] = seen[id(W)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _moves(here: torch.device) -> Any:
    """Tensor.to, for which a fake tensor is on the card: C++ thinks that it is elsewhere."""
    to, names = Tensor.to, (here, str(here), "cuda", torch.device("cuda"))

    def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        there = any(isinstance(v, (str, torch.device)) and v in names for v in given)
        if not there:
            return to(x, *args, **kwargs)
        args = [here if isinstance(v, (str, torch.device)) and v in names else v for v in args]
        kwargs = {n: here if isinstance(v, (str, torch.device)) and v in names else v
                  for n, v in kwargs.items()}
        if on_card(x) and not kwargs.get("copy"):
            args = [v for v in args if v != here]
            kwargs = {n: v for n, v in kwargs.items() if not (n == "device" and v == here)}
            rest = {n: v for n, v in kwargs.items() if n not in ("copy", "non_blocking")}
            if not args and not rest:
                return x
        return to(x, *args, **kwargs)

    return moved


_generator = torch.Generator


class _Generator(_generator):
    """On the host, whatever device is asked for."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return _generator.__new__(_generator, "cpu")


@contextlib.contextmanager
def card(name: str = "NVIDIA H200", index: int = 0) -> Iterator[Card]:
    """Within it there is a card of that name; `current` on it is the device that launches go to."""
    mode = Card(index)
    mode.current = 0
    properties = types.SimpleNamespace(
        name=f"{name} (pretended)", multi_processor_count=132, total_memory=MEMORY[name],
        L2_cache_size=50 * 2**20, major=9, minor=0, max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=232_448)

    def exchange(i: int) -> int:
        before, mode.current = mode.current, mode.current if i < 0 else i
        return before

    cuda = {
        "is_available": lambda: True, "device_count": lambda: index + 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (properties.total_memory,) * 2,
        "current_device": lambda: mode.current, "set_device": exchange,
        "synchronize": lambda device=None: None, "empty_cache": lambda: None, "Event": _Event,
        "_exchange_device": exchange, "_maybe_exchange_device": exchange,
        "max_memory_allocated": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "Stream": _Stream, "current_stream": lambda device=None: _Stream(),
        "stream": contextlib.nullcontext, "CUDAGraph": _Graph,
        "graph": lambda graph, **options: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        def pretend(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        pretend(FakeTensor, "__torch_dispatch__", classmethod(_seen_from_c))
        pretend(FakeTensor, "is_cuda", property(lambda x: x.device.type == "cuda"))
        pretend(FakeTensor, "is_meta", property(lambda x: False))
        pretend(FakeTensor, "get_device", lambda x: x.device.index if x.is_cuda else -1)
        pretend(torch, "Generator", _Generator)
        pretend(Tensor, "to", _moves(mode.here))
        pretend(FakeTensor, "tolist", _listed)
        pretend(Tensor, "cuda", functools.partialmethod(Tensor.to, mode.here))
        pretend(torch.nn.Module, "_apply", _apply)
        pretend(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
        for attribute, value in cuda.items():
            pretend(torch.cuda, attribute, value)
        stack.enter_context(mode)
        yield mode

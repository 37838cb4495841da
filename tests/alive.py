# SPDX-License-Identifier: MIT
"""Bytes of tensors from birth to end, as torch makes and drops them; the same on every CPU.

Sizes are those of storages, rounded up to 512 as torch's allocator for cards does. What is born in
a `phase` is counted under its name.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`now` and `peak` in bytes, `at_peak` by phase; of what is made within, and what is `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.now, self.peak = "before", 0, 0
        self.born: Counter[str] = Counter()          # alive, by the phase of their birth
        self.at_peak: dict[str, int] = {}
        self.peak_of: dict[str, int] = {}            # the most in each phase
        self._alive: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x)
        return out

    def see(self, x: Tensor) -> None:
        """Count a tensor's memory from now on to its end."""
        if x.device.type == "meta":              # has none
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._alive[key] = size, self.phase
        self.born[self.phase] += size
        self.now += size
        self.peak_of[self.phase] = max(self.now, self.peak_of.get(self.phase, 0))
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.born)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, phase = self._alive.pop(key)
        self.born[phase] -= size
        self.now -= size

    def clear(self) -> None:
        """Count anew; what is alive stays so, under "before"."""
        self._alive = {key: (size, "before") for key, (size, _) in self._alive.items()}
        self.born = Counter({"before": self.now})
        self.peak, self.at_peak, self.peak_of = self.now, dict(self.born), {}

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

# SPDX-License-Identifier: MIT
"""What every test shares: one thread (or DSV2_THREADS), so that sums are reproducible; skips that
say why.

Without a GPU kernels run in Triton's interpreter, which has to be known before Triton is imported
by anyone; what compiles kernels does so in a process of its own.
"""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # as for a shell's job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ.get("DSV2_THREADS", "1")))  # `make matrix` takes 2 too


class Module(pytest.Module):
    """A test file; one that imports a kernel is skipped where there is no triton (not on Linux)."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except self.CollectError as error:
            if getattr(error.__cause__, "name", None) == "triton":
                pytest.skip("needs triton")
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Module:
    return Module.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

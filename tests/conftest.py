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

# a shell's job in the background ignores Ctrl-C, and one under nohup the end of its terminal too
for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)           # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

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

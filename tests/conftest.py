# SPDX-License-Identifier: MIT
"""What every test shares: one thread, so that sums are reproducible, and GPU tests skipped.

Without a GPU kernels run in Triton's interpreter, which has to be known before Triton is imported
by anyone; what compiles kernels does so in a process of its own.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

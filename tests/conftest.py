# SPDX-License-Identifier: MIT
"""What every test shares: one thread (or DSV2_THREADS), and GPU tests skipped without a GPU.

Without a GPU kernels run in Triton's interpreter, which has to be known before Triton is imported
by anyone; what compiles kernels does so in a process of its own.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ.get("DSV2_THREADS", "1")))  # `make matrix` takes 2 too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

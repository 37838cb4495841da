# SPDX-License-Identifier: MIT
"""What nbval does not know: stderr is not compared, cells tagged `gpu` need a GPU, and a notebook
that imports triton needs that (it exists on Linux alone)."""

from importlib.util import find_spec

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    about_triton = {item.path for item in items
                    if "import triton" in getattr(getattr(item, "cell", None), "source", "")}
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        collector = item.parent
        if "stderr" not in collector.skip_compare:
            collector.skip_compare = (*collector.skip_compare, "stderr")
        if item.path in about_triton and find_spec("triton") is None:
            item.add_marker(pytest.mark.skip(reason="needs triton"))
        if "gpu" in cell.metadata.get("tags", []) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

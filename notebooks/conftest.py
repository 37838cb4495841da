# SPDX-License-Identifier: MIT
"""What nbval does not know: stderr is not compared, and cells tagged `gpu` need a GPU."""

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        collector = item.parent
        if "stderr" not in collector.skip_compare:
            collector.skip_compare = (*collector.skip_compare, "stderr")
        if "gpu" in cell.metadata.get("tags", []) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

# SPDX-License-Identifier: MIT
"""Processes that tests send functions to: a world of gloo ranks that is made once per module."""

import multiprocessing
from contextlib import contextmanager

from dsv2_ref.parallel.local import Processes

# imported once, by the process that all ranks are forked from
PRELOADED = ["torch", "torch.distributed.checkpoint", "torch.distributed.pipelining",
             "torch.distributed.tensor", "dsv2_ref.parallel.mesh", "pytest"]


@contextmanager
def world(size):
    """A world of `size` processes, which end with the block."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with Processes(size, limit=120.0, how="forkserver") as ranks:
        yield ranks

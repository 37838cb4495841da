# SPDX-License-Identifier: MIT
"""Processes that tests send functions to: a world of gloo ranks that is made once per module."""

import multiprocessing
import os
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 120.0                       # seconds that an answer may take
# imported once, by the process that all ranks are forked from
PRELOADED = ["torch", "torch.distributed.checkpoint", "torch.distributed.pipelining",
             "torch.distributed.tensor", "dsv2_ref.parallel.mesh", "pytest"]


def _serve(rank, size, place, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    try:
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                pipe.send((True, function(*arguments)))
            except BaseException:                        # told to whoever asked
                pipe.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


class Ranks:
    """`ranks(function, *arguments)` runs it in every process: a list of what each returned.

    The function is one of a module, not local; what it takes and returns can be pickled.
    """

    def __init__(self, size, place):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, place, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(LIMIT):
                self.kill()
                raise TimeoutError(f"rank {rank}: no answer in {LIMIT:.0f} s")
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            if not fine:
                raise AssertionError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def kill(self):
        for process in self.processes:
            process.kill()


@contextmanager
def world(size):
    """A world of `size` processes, which end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(size, Path(folder) / "meeting")
        try:
            yield ranks
            for pipe, process in zip(ranks.pipes, ranks.processes, strict=True):
                if process.is_alive():
                    pipe.send(None)
            for process in ranks.processes:
                process.join(20)
        finally:
            ranks.kill()

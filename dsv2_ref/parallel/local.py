# SPDX-License-Identifier: MIT
"""Processes on this machine that work together over gloo: several ranks without a cluster.

They take some seconds to start; real runs are started by torchrun. What they run has to stand in a
module: a process that is started anew cannot see the cells of a notebook.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


class Processes:
    """`processes(function, *arguments)` runs it in every rank: a list of what each returned.

    They are gloo processes on this machine, one thread each, which end with `close`, with a `with`
    block, or with this process. The function stands in a module; what it takes and returns can be
    pickled. TimeoutError after `limit` seconds, and all of them are killed.
    """

    def __init__(self, size: int, limit: float = 300.0, how: str = "spawn") -> None:
        self.limit = limit
        context = multiprocessing.get_context(how)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            meeting = f"file://{self._folder.name}/meeting"
            process = context.Process(target=_serve, args=(rank, size, meeting, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self.limit):
                self.kill()
                raise TimeoutError(f"rank {rank}: no answer in {self.limit:.0f} s")
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            if not fine:
                raise RuntimeError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(20)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in each of `size` processes that are made for it; their answers."""
    with Processes(size) as processes:
        return processes(function, *arguments)


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    try:
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                pipe.send((True, function(*arguments)))
            except Exception:                            # told to whoever asked
                pipe.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()

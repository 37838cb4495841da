# SPDX-License-Identifier: MIT
"""Processes on this machine that work together over gloo: to see a pipeline run without a cluster.

`run(2, pipeline_step, config, "zbv", 8)` starts two of them and gives what each found. They are
made afresh each time, which takes some seconds; real runs are started by torchrun. What they run
has to stand in a module: a process that is started anew cannot see the cells of a notebook.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.pipeline import Pipeline, sum_tied_gradient
from dsv2_ref.parallel.schedule import Slot, n_stages
from dsv2_ref.parallel.split import ranges_of, split
from dsv2_ref.parallel.stages import Stages


@dataclass
class Rows:
    """A micro-batch of random tokens."""

    tensors: tuple[Tensor, ...]          # tokens and targets, (B, T) each
    protected: Tensor                    # (B,) bool
    with_load: bool = False


@dataclass
class Found:
    """What one rank of a pipeline says of a step."""

    layers: list[range]                  # of its stages
    parameters: int                      # that it holds
    losses: dict[str, float]
    gradients: dict[str, Tensor]
    slots: list[Slot]                    # what it did when


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in each of `size` processes of one group; the list of the answers."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "meeting")
        with context.Pool(size) as pool:
            tasks = [(rank, size, place, function, arguments) for rank in range(size)]
            return pool.map_async(_serve, tasks, chunksize=1).get(timeout=300)


def _serve(task: tuple[int, int, str, Callable[..., Any], tuple[Any, ...]]) -> Any:
    rank, size, place, function, arguments = task
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def random_model(config: Config, seed: int = 0) -> DeepSeekV2:
    """A model in fp64 and training mode, the same in every process."""
    torch.manual_seed(seed)
    return DeepSeekV2(config).double().train()


def random_parts(config: Config, m: int, rows: int, T: int) -> list[tuple[Rows, float]]:
    """m micro-batches of `rows` sequences of T tokens, each 1/m of the batch; always the same."""
    g = torch.Generator().manual_seed(m)
    ids = torch.randint(config.vocab, (m, 2, rows, T), generator=g)
    protected = torch.rand(m, rows, generator=g) < 0.1
    return [(Rows((one[0], one[1]), p), 1 / m) for one, p in zip(ids, protected, strict=True)]


def pipeline_step(
    config: Config, schedule: str, m: int, rows: int = 2, T: int = 32, tries: int = 5
) -> Found:
    """A step of a pipeline through all processes of the group, done some times: the fastest one."""
    p, rank = dist.get_world_size(), dist.get_rank()
    ranges = ranges_of(schedule, split(config, n_stages(schedule, p), T), rank, p)
    stages = Stages(config, ranges).double().train()
    stages.take(random_model(config).state_dict())
    pipe, best, slots = Pipeline(stages, schedule), float("inf"), []
    for _ in range(tries):
        stages.zero_grad()
        losses, _ = pipe.backward(random_parts(config, m, rows, T))
        took = torch.tensor(pipe.timeline[-1].end - pipe.timeline[0].start)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if took < best:
            best, slots = took.item(), list(pipe.timeline)
    sum_tied_gradient(stages, schedule)
    return Found(ranges, sum(W.numel() for W in stages.parameters()),
                 {name: loss.item() for name, loss in losses.items()},
                 {name: W.grad for name, W in stages.named_parameters()}, slots)

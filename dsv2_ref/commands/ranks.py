# SPDX-License-Identifier: MIT
"""`train` on several processes: who they are (torchrun says it), and who speaks for all of them.

An error that all processes share is said once, on each machine. One that a process meets by itself
it says itself, and the others, whose messages it no longer answers, say that somebody has gone.
"""

import os
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dsv2_ref.commands.common import say
from dsv2_ref.commands.jobs import Job
from dsv2_ref.parallel.mesh import Mesh, Told, check_layout
from dsv2_ref.parallel.schedule import SCHEDULES
from dsv2_ref.parallel.split import Layout, layout_of
from dsv2_ref.training.pretrain import Stopped, TrainingDiverged
from dsv2_ref.training.world import World

LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout", "connectFullMesh",
        "NCCL", "Connection refused")


@dataclass(frozen=True)
class Wish:
    """How the processes are to share the work."""

    ep: int
    pp: int
    pipeline: str | None
    zero1: bool


def add_layout(parser: ArgumentParser) -> None:
    """On several processes: torchrun --nproc-per-node 4 -m dsv2_ref train --ep 2 --pp 2 ..."""
    add = parser.add_argument
    add("--ep", type=int, default=1, help="ranks that share the experts; under torchrun, as the "
        "three below. dp = ranks / (ep x pp) read other rows")
    add("--pp", type=int, default=1, help="ranks that share the layers")
    add("--schedule", dest="pipeline", choices=SCHEDULES, help="of the pipeline; default 1f1b")
    add("--zero1", action="store_true", help="ranks share the optimiser's moments")


@contextmanager
def world_of(wish: Wish, job: Job) -> Iterator[World]:
    """The processes that torchrun has started, or this one alone.

    ValueError of one line for what does not go together, before any process group is made.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        _check_alone(wish)
        yield World()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with said_once():
        layout = _layout(wish, job, size)
    with _one_voice(rank), _group(layout) as world:
        yield world


@contextmanager
def said_once() -> Iterator[None]:
    """For what goes wrong on all processes alike: the first of each machine says it."""
    try:
        yield
    except ValueError:
        if int(os.environ.get("LOCAL_RANK", "0")):
            raise SystemExit(2) from None
        raise


def restarted(world: World) -> bool:
    """Whether torchrun has started these processes again, after one of them had ended. By all.

    A launcher counts its own failures: on the other nodes the number stays 0.
    """
    return bool(world.asked(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))


def _check_alone(wish: Wish) -> None:
    for name, value, usual in (("--ep", wish.ep, 1), ("--pp", wish.pp, 1),
                               ("--schedule", wish.pipeline, None), ("--zero1", wish.zero1, False)):
        if value != usual:
            raise ValueError(f"{name}: {value} on one process, expected torchrun --nproc-per-node "
                             "N -m dsv2_ref train ...")


def _layout(wish: Wish, job: Job, size: int) -> Layout:
    if job.config is None:
        raise ValueError(f"{job.name}: on {size} processes, expected a preset on text or a saved "
                         "model")
    if wish.pipeline and wish.pp == 1:
        raise ValueError(f"--schedule: {wish.pipeline} without stages, expected --pp 2 or more")
    layout = layout_of(size, wish.ep, wish.pp, wish.pipeline or "1f1b", wish.zero1)
    check_layout(layout, job.config, job.recipe)
    return layout


@contextmanager
def _group(layout: Layout) -> Iterator[Mesh]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Mesh(layout, torch.device("cuda", torch.cuda.current_device()) if cuda else "cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def _one_voice(rank: int) -> Iterator[None]:
    """What all processes end with is said by the first; the others end silently."""
    code: Any = None
    try:
        yield
    except Told:
        code = 2
    except TrainingDiverged:
        if not rank:
            raise
        code = 1
    except Stopped as stopped:
        if not rank:
            raise
        code = stopped.code
    except RuntimeError as error:
        why = " ".join(str(error).split())
        if not any(words in why for words in LOST):
            raise
        say(f"dsv2_ref: rank {rank}: another process has ended, or cannot be reached "
            f"({why[-160:]}); what was saved is whole, expected --resume to go on")
        code = 1
    if code is not None:
        raise SystemExit(code)

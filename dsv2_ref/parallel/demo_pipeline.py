# SPDX-License-Identifier: MIT
"""What the ranks of notebook 17 run: a pipeline's step, ZeRO-1, two layouts of one model."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_ref.config import Config
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.hybrid import Hybrid
from dsv2_ref.parallel.mesh import Mesh
from dsv2_ref.parallel.pipeline import Pipeline, sum_tied_gradient
from dsv2_ref.parallel.schedule import Slot, Timeline, Times, n_stages
from dsv2_ref.parallel.split import Layout, ranges_of, split
from dsv2_ref.parallel.stages import Stages
from dsv2_ref.training.optim import moments
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer


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


def times_of(timeline: Timeline) -> Times:
    """The median time of each stage's F, I and W; a whole backward counts as two equal halves."""
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    for action, start, end in (slot for row in timeline.rows for slot in row):
        if action.kind == "B":
            took["I", action.stage].append((end - start) / 2)
            took["W", action.stage].append((end - start) / 2)
        else:
            took[action.kind, action.stage].append(end - start)
    stages = range(1 + max(stage for _, stage in took))
    return Times(*([median(took[kind, stage]) for stage in stages] for kind in "FIW"))


def trainer_of(config: Config, layout: Layout) -> Trainer:
    """One that trains on random tokens by AdamW in fp64, all processes in this layout."""
    recipe = Recipe(steps=2, batch=4, micro_batch=4 // layout.pp, sequence=16, optimizer="adamw",
                    precision="fp32", warmup=0.0)
    tokens = torch.randint(config.vocab, (200,), generator=torch.Generator().manual_seed(0))
    world = Mesh(layout)
    held = world.hold(random_model(config), recipe.sequence)
    return Trainer(held, recipe, tokens.numpy(), world=world)


class Kept(NamedTuple):
    """What a rank keeps after a step, in bytes."""

    weights: int
    moments: dict[str, int]              # by the weight's name; of those that it updates
    norm: float                          # of all weights, to compare ranks


def kept(config: Config, layout: Layout) -> Kept:
    trainer = trainer_of(config, layout)
    trainer.step()
    found: dict[str, int] = defaultdict(int)
    for name, t in moments(trainer.optimizers).items():
        found[name.removeprefix("moment.").rpartition(".")[0]] += t.nbytes if t.ndim else 0
    weights = list(trainer.model.parameters())
    norm = torch.cat([W.detach().flatten() for W in weights]).norm().item()
    return Kept(sum(W.nbytes for W in weights), dict(found), norm)


class Asked(NamedTuple):
    """A model asked between two training steps."""

    layers: tuple[int, int]              # that this rank trains, and that it writes text with
    planned: dict[str, int]              # bytes, by phase
    there: dict[str, int]
    text: list[int]
    losses: list[float]


def asked(config: Config, layout: Layout, prompt: list[int], n: int) -> Asked:
    """A step, `n` tokens of text in the inference layout, a step."""
    trainer = trainer_of(config, layout)
    losses = [trainer.step()["loss"]]
    engine = Hybrid(trainer)
    with engine.inference() as model:
        (text,) = generate(model, [prompt], n, stop=())
        layers = sum(len(part.blocks) for part in trainer.model.parts), len(model.blocks)
    losses.append(trainer.step()["loss"])
    return Asked(layers, vars(engine.plan()), engine.peaks, text, losses)

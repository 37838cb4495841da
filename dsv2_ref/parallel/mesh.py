# SPDX-License-Identifier: MIT
"""Training on pp · dp · ep ranks: a pipeline's stages, replicas, and shares of the experts.

The ranks are a block of pp × dp × ep, the experts' ranks the innermost, so that those who exchange
most are neighbours:

  pp   stages. A rank holds some layers, and is in a pipeline with the ranks of its row
  ep   shares of the experts. Ranks exchange rows of tokens in each layer, all to all
  dp   replicas of both

The dp · ep ranks of a stage read different *rows*: each micro-batch is cut into that many slices.
Who must add what up follows from who holds what:

  experts        are on dp ranks. Their gradients are complete for the rows of an ep group once the
                 exchange has gone backward; they are summed over dp
  all others     are on dp · ep ranks, and their gradients are summed over those
  tied matrix    embedding and head on two stages: each has its own part, and gets the sum of both
  norm           experts' squares over ep, stages' over pp, each parameter once

Every rank then decides from the same numbers: whether to leave an update out, and when to stop.

The weights of a run are those of one process with its seed: each rank makes the whole model, on the
CPU, and takes its share. So a whole model has to fit into the memory of the machine, once a rank.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from dsv2_ref.block import Traffic
from dsv2_ref.config import Config
from dsv2_ref.forms import Forms
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.expert import experts_begun_across, keep_across
from dsv2_ref.parallel.gather import gather, is_share, load_of_all, sum_over
from dsv2_ref.parallel.pipeline import Pipeline, sum_tied_gradient
from dsv2_ref.parallel.schedule import n_stages
from dsv2_ref.parallel.split import Layout, check, experts_each, ranges_of, split
from dsv2_ref.parallel.stages import Stages
from dsv2_ref.parallel.zero1 import share_optimizers
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.optim import alone, keeper
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import load_state
from dsv2_ref.training.shards import is_sharded, load_sharded, save_sharded
from dsv2_ref.training.world import World

T = TypeVar("T")


class Told(ValueError):
    """What the first process was refused; it says so itself."""


def check_layout(layout: Layout, config: Config, recipe: Recipe) -> None:
    """ValueError of one line for what cannot be, before any process group is made."""
    experts_each(config, layout.ep)
    micro, rows = recipe.micro_batch or recipe.batch, layout.rows
    micro = min(micro, recipe.batch)
    if micro % rows:
        raise ValueError(f"micro_batch: {micro} sequences, expected a multiple of dp x ep = {rows}")
    steps = range(recipe.batch_start or recipe.batch, recipe.batch + 1)
    last = {batch % micro or micro for batch in steps}          # of each batch there may be
    if layout.pp > 1:
        check(config, layout.schedule, layout.pp, recipe.batch // micro, recipe.recompute)
        if last != {micro} or len(steps) > 1:
            raise ValueError(f"batch: {steps.start} to {recipe.batch} sequences, expected one size "
                             f"with pp, a multiple of the micro-batch's {micro}")
    elif min(last) < rows:
        raise ValueError(f"micro_batch: {min(last)} sequences at the end of a batch, expected one "
                         f"at least for each of dp x ep = {rows}")


class Mesh(World):
    """The ranks of a layout; all of them make one, after the process group."""

    several = True
    suffix = ""                     # a state is a folder

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self.layout, self.device = layout, torch.device(device)
        self.mesh = init_device_mesh(self.device.type, (layout.pp, layout.dp, layout.ep),
                                     mesh_dim_names=("pp", "dp", "ep"))
        self.pp, self.dp, self.ep = self.mesh.get_coordinate()
        self.row = self.dp * layout.ep + self.ep
        self.rows = self.mesh["dp", "ep"]._flatten("rows").get_group()
        self.first = dist.get_rank() == 0

    # ---- what is held

    def hold(self, model: DeepSeekV2, sequence: int) -> Stages:
        c, layout = model.config, self.layout
        ranges, held = [range(c.n_layers)], None
        if layout.pp > 1:
            stages = split(c, n_stages(layout.schedule, layout.pp), sequence)
            ranges = ranges_of(layout.schedule, stages, self.pp, layout.pp)
        if layout.ep > 1:
            share = experts_each(c, layout.ep)
            held = range(self.ep * share, (self.ep + 1) * share)
        self.model = Stages(c, ranges, held).to(model.like.dtype)
        self.model.take(model.state_dict())
        self.model.to(self.device)
        for part in self.model.parts:
            part.across = self.across
        self._around: Callable[[], AbstractContextManager] = nullcontext
        if layout.pp > 1:
            self.pipeline = Pipeline(self.model, layout.schedule, self.mesh.get_group("pp"),
                                     lambda: self._around())
        return self.model

    def across(self, forms: Forms) -> Forms:
        if self.layout.ep > 1:
            experts = experts_begun_across(forms.experts, self.mesh.get_group("ep"))
            forms = replace(forms, experts=experts)
        if self.layout.rows > 1:
            forms = replace(forms, keep=keep_across(forms.keep, self.rows))
        return forms

    def with_whole(self, model: nn.Module, work: Callable[[DeepSeekV2], T]) -> T:
        weights = gather(self.mesh, model)

        def of_whole() -> T:
            with torch.device("meta"):
                whole = DeepSeekV2(model.config)
            whole.load_state_dict(weights, assign=True)
            return work(whole.to(self.device))

        return self.first_does(of_whole)

    def optimizers(
        self, kind: type[Optimizer], groups: list[dict], **options: Any
    ) -> list[Optimizer]:
        if not self.layout.zero1:
            return alone(kind, groups, **options)

        def replicas(W: Tensor) -> dist.ProcessGroup:
            return self.mesh.get_group("dp") if is_share(W.place[0]) else self.rows

        return share_optimizers(kind, groups, replicas, **options)

    # ---- a step

    def share(self, batch: Batch) -> Batch:
        """Contiguous rows, in order of the ranks; of equal numbers, or one more or less."""
        n, R = len(batch), self.layout.rows
        return batch.rows(slice(self.row * n // R, (self.row + 1) * n // R))

    def backward(
        self, parts: Iterable[tuple[Batch, float]], losses: Callable[[Batch], Named],
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> tuple[dict[str, Tensor], list[Traffic]]:
        parts, self._around = list(parts), around
        if self.layout.pp > 1:
            sums, load = self.pipeline.backward(parts)
        else:
            sums, load = super().backward(parts, losses, around)
        return sums, load_of_all(load, self.rows.size()) if parts[-1][0].with_load else []

    def reduce(self, tensors: list[Tensor]) -> None:
        named = {id(W.grad): name for name, W in self.model.named_parameters()
                 if W.grad is not None}
        experts = [t for t in tensors if is_share(named.get(id(t), ""))]
        others = [t for t in tensors if not is_share(named.get(id(t), ""))]
        sum_over(experts, self.mesh.get_group("dp"))
        sum_over(others, self.rows)              # losses too: all ranks of a pipeline have them
        if self.layout.pp > 1:
            sum_tied_gradient(self.model, self.layout.schedule, self.mesh.get_group("pp"))

    def norm(self, gradients: list[Tensor]) -> Tensor:
        named = {id(W.grad): name for name, W in self.model.named_parameters()
                 if W.grad is not None}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for g in gradients:
            if self._counts(named[id(g)]):
                wide = torch.promote_types(g.dtype, torch.float32)
                total += torch.linalg.vector_norm(g, dtype=wide).double().square()
        dist.all_reduce(total)
        return total.sqrt()

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one that a parameter's gradient is counted on."""
        layout = self.layout
        if name == "embedding.weight" and self.pp != 0:
            return False                         # tied: the first stage has it, too
        return self.dp == 0 and (self.ep == 0 or layout.ep > 1 and is_share(name))

    # ---- what all must agree on

    def first_does(self, work: Callable[[], T]) -> T:
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = work()
            except ValueError as error:
                told[1] = error
        refused = told[1]
        if self.first and refused:
            told[1] = str(refused)
        dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise refused or Told(told[1])
        return told[0]

    def clock(self, seconds: float) -> float:
        told = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return told.item()

    def asked(self, signal: int | None) -> int | None:
        told = torch.tensor(signal or 0, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.item() or None

    # ---- states

    def save(self, path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        shares = {name: self._of_whole(name, t) for name, t in tensors.items()}
        save_sharded(path, shares, state, self.first_does)

    def load(self, path: str | Path, trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Also what one process wrote, or other ranks did; whole files, as `newest` has found."""
        mine = {f"model.{name}" for name in trainer.model.state_dict()}
        mine |= {f"moment.{W.place[0]}" for optimizer in map(keeper, trainer.optimizers)
                 for group in optimizer.param_groups for W in group["params"]}

        def is_mine(name: str) -> bool:
            return (name if name.startswith("model.") else name.rpartition(".")[0]) in mine

        if not is_sharded(path):
            tensors, state = load_state(path)
            return {name: self._share(name, t) for name, t in tensors.items()
                    if is_mine(name)}, state

        def like(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            if not is_mine(name):
                return None
            own = self._share(name, torch.empty(size, dtype=dtype, device="meta"))
            return self._of_whole(name, torch.empty(own.shape, dtype=dtype))

        return load_sharded(path, like, check=False)

    def _share(self, name: str, t: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole model's state."""
        if self.layout.ep == 1 or not t.ndim or not is_share(name):
            return t
        return t.chunk(self.layout.ep)[self.ep]

    def _of_whole(self, name: str, t: Tensor) -> Tensor:
        """`_share`, told to be one."""
        if self.layout.ep == 1 or not t.ndim or not is_share(name):
            return t
        return DTensor.from_local(t.detach(), self.mesh["ep"], [Shard(0)], run_check=False)

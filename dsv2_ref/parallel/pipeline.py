# SPDX-License-Identifier: MIT
"""A pipeline: layers in stages on p ranks, micro-batches passing through them.

The engine is torch's (torch.distributed.pipelining): it sends, receives, and runs a schedule. What
is added here is what DeepSeek-V2 needs of it:

  1. Balance losses of all stages. They are made where the routers are, and travel with h as a
     second tensor, to which each stage adds its own. At the end it is part of the loss, so each
     router's share of the gradient comes back the way that h's does.
  2. Which sequences are protected from dropping, and the targets, are known on every stage.
  3. Sums, not means: each micro-batch counts by its share of the batch, and torch's division by
     the number of micro-batches is off.
  4. A tied embedding with two owners: its gradient is the sum of both (`sum_tied_gradient`).

Shapes: p ranks, S stages, m micro-batches, B rows of one on this rank, T tokens, d width.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from dsv2_ref.block import Traffic
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.schedule import Action, Slot, kind_of, n_stages, stages_of
from dsv2_ref.parallel.stages import Stages

LOSSES = ("language", "expert", "device", "communication")


class Rows(Protocol):
    """What is read of a micro-batch: `training.objective.Batch`, or another with these."""

    tensors: tuple[Tensor, ...]          # tokens and targets (B, T)
    protected: Tensor                    # (B,) bool
    with_load: bool


class _Stage(nn.Module):
    """A range of layers as torch wants it: tensors in, tensors out."""

    def __init__(self, part: DeepSeekV2, around: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.part, self.around = part, around
        self.with_load, self.load = False, []        # of the last micro-batch

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.part.like.dtype, torch.float32)

    def forward(
        self, h: Tensor, balance: Tensor | None = None, *, targets: Tensor, protected: Tensor
    ) -> tuple[Tensor, Tensor] | Tensor:
        """h (B, T, d), or tokens (B, T) -> h and balance (3,); from the last stage losses (4,)."""
        part = self.part
        with self.around():
            if part.first:
                h = part.embed(h)
            run = replace(part.start(h.shape[:2]), learns=part.training, protected=protected,
                          with_load=self.with_load)
            h, own, self.load = part.through(h, run)
            own = own.to(self.loss_dtype)
            balance = own if balance is None else balance + own
            if not part.last:
                return h.clone(memory_format=torch.contiguous_format), balance     # no views
            language = part.language_loss(h, targets)
        return torch.cat([language[None], balance])


class _Watched(pipelining.PipelineStage):
    """A stage that notes when it does what, and sends gradients as gloo and NCCL want them."""

    timeline: list[Slot]

    def _note(self, kind: str, batch: int, began: float) -> None:
        self.timeline.append(Slot(Action(kind, self.stage_index, batch), began,
                                  time.perf_counter()))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._note("F", fwd_chunk_id, began)
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Tensor | None = None,
                           full_backward: bool = True, last_backward: bool = False) -> None:
        began = time.perf_counter()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._note("B" if full_backward else "I", bwd_chunk_id, began)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        began = time.perf_counter()
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._note("W", bwd_chunk_id, began)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        gradients = self.bwd_cache[bwd_chunk_id]         # of a sum: one number, told as many
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)
        return super().get_bwd_send_ops(bwd_chunk_id)


class Pipeline:
    """One rank's stages at work in a group of p ranks, all with the same schedule.

    `around` makes what each forward pass runs in: autocast. `timeline` is of the last step: what
    this rank computed when, by its own clock; on a GPU, when it was asked to.
    """

    def __init__(
        self, stages: Stages, schedule: str, group: dist.ProcessGroup | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.stages, self.schedule, self.group = stages, schedule, group
        self.p, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.places = stages_of(schedule, self.p, self.rank)
        if len(stages.parts) != len(self.places):
            raise ValueError(f"stages: {len(stages.parts)} ranges of layers, expected "
                             f"{len(self.places)} for {schedule}")
        self.modules = [_Stage(part, around) for part in stages.parts]
        self.timeline: list[Slot] = []
        self._engines: dict[tuple[int, ...], Any] = {}

    def backward(self, parts: Iterable[tuple[Rows, float]]) -> tuple[dict[str, Tensor],
                                                                     list[Traffic]]:
        """Add the gradients of a step's micro-batches, each weighted by its share of the batch.

        All ranks of the group give the same. The losses by name, weighted and summed in fp64, the
        same on all; the load of this rank's layers for the last micro-batch, if that is asked for.
        """
        batches, shares = zip(*parts, strict=True)
        shapes = {tuple(batch.tensors[0].shape) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(f"micro-batches: of shapes {sorted(shapes)}, expected one shape")
        tokens, targets = (torch.cat(column)
                           for column in zip(*(batch.tensors for batch in batches), strict=True))
        protected = torch.cat([batch.protected for batch in batches])
        weights = torch.tensor(shares, dtype=torch.float64, device=tokens.device)
        for module in self.modules:
            module.with_load = batches[-1].with_load
        if kind_of(self.schedule).splits:        # W adds to these: in the weights' own layout
            for W in self.stages.parameters():
                W.grad = torch.zeros_like(W) if W.grad is None else W.grad
        self.timeline.clear()
        engine = self._engine(len(batches), *batches[0].tensors[0].shape)
        found = engine.step(tokens, target=weights, targets=targets, protected=protected)
        sums = torch.zeros(4, dtype=torch.float64, device=tokens.device)
        if found is not None:                                                # (4m,) on the last
            sums = (found.detach().double().view(-1, 4) * weights[:, None]).sum(0)
        dist.broadcast(sums, group=self.group, group_src=owner_of_last(self.schedule, self.p))
        load = [traffic for module in self.modules for traffic in module.load]
        return dict(zip(LOSSES, sums.unbind(), strict=True)), load

    def _engine(self, m: int, B: int, T: int) -> Any:
        """Torch's schedule for m micro-batches of (B, T) tokens; kept while they stay the same."""
        if (key := (m, B, T)) in self._engines:
            return self._engines[key]
        stages = [self._stage(place, module, B, T)
                  for place, module in zip(self.places, self.modules, strict=True)]
        kind = kind_of(self.schedule)
        single = kind.torch in ("ScheduleGPipe", "Schedule1F1B")
        engine = getattr(pipelining, kind.torch)(stages[0] if single else stages, m,
                                                 loss_fn=_weighted, scale_grads=False)
        self._engines = {key: engine}            # one: it owns buffers for all its messages
        return engine

    def _stage(self, place: int, module: _Stage, B: int, T: int) -> _Watched:
        """With the shapes of what comes and goes, so that torch need not find them out."""
        like, d = module.part.like, self.stages.config.d

        def message(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        passed = (message(B, T, d, dtype=like.dtype), message(3, dtype=module.loss_dtype))
        tokens = (torch.empty(B, T, dtype=torch.int64, device="meta"),)
        stage = _Watched(
            module, place, n_stages(self.schedule, self.p), like.device, group=self.group,
            input_args=tokens if module.part.first else passed,
            output_args=message(4, dtype=module.loss_dtype) if module.part.last else passed)
        stage.timeline = self.timeline
        return stage


def _weighted(losses: Tensor, share: Tensor) -> Tensor:
    """losses (4,), share (1,) fp64 -> () what is trained on."""
    return losses.sum() * share[0].to(losses.dtype)


def owner_of_last(schedule: str, p: int) -> int:
    """The rank of the last stage."""
    return 0 if kind_of(schedule).v else p - 1


def sum_tied_gradient(
    stages: Stages, schedule: str, group: dist.ProcessGroup | None = None
) -> None:
    """The gradient of a tied embedding becomes the sum of its two owners', on both, in place.

    For every rank of a pipeline's group, once a step; nothing happens where there is one owner.
    """
    p, rank = dist.get_world_size(group), dist.get_rank(group)
    owners = 0, owner_of_last(schedule, p)
    if not stages.config.tie_embeddings or owners[0] == owners[1] or rank not in owners:
        return
    mine, peer = stages.embedding.weight.grad, owners[rank == 0]
    other = torch.empty_like(mine)
    for message in dist.batch_isend_irecv([
        dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
    ]):
        message.wait()
    mine += other                                # a + b and b + a have the same bits


def torch_order(schedule: str, p: int, m: int) -> list[list[Action]]:
    """The actions of each of p ranks as torch runs them for m micro-batches; without processes."""
    kind, total = kind_of(schedule), n_stages(schedule, p)
    stages = [SimpleNamespace(stage_index=place, num_stages=total, group_size=p, group_rank=0,
                              submod=None, is_last=place == total - 1)
              for place in stages_of(schedule, p, 0)]
    single = kind.torch in ("ScheduleGPipe", "Schedule1F1B")
    made = getattr(pipelining, kind.torch)(stages[0] if single else stages, m)
    rows = []
    for rank in range(p):
        actions = []
        for action in filter(None, made.pipeline_order[rank]):
            together = action.sub_actions or (action,)
            actions += [Action(one.computation_type.value, one.stage_index, one.microbatch_index,
                               joined=one is not together[-1])
                        for one in together if one.computation_type.value in ("F", "B", "I", "W")]
        # torch's table of 1F1B counts the forwards of its last rank from 1; it runs them from 0
        first = min(action.batch for action in actions if action.kind == "F")
        rows.append([action._replace(batch=action.batch - first * (action.kind == "F"))
                     for action in actions])
    return rows

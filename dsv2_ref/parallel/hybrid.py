# SPDX-License-Identifier: MIT
"""The hybrid engine of section 4.2, in small: one model, one layout to train and one to write text.

Alignment trains and writes text in turn, and the two want different layouts. Training has stages,
shares of the experts and shares of the moments, so that a large model fits. A pipeline that writes
text would keep one stage busy and let all others wait, a token at a time; so each rank gets all the
layers, with all experts or with its share of them (then all ranks of an ep group write together).

    with hybrid.inference() as model:        # all layers are here, what only training needs is not
        generate(model, ...)
    trainer.step()                           # as if nothing had been

What one phase does not need waits in the host's memory: while text is written gradients are gone,
and moments and training's own weights are *offloaded*; when training goes on the inference weights
are freed and the others loaded again. Weights change their layout over the network, a tensor at a
time, without a file: the most there is at once is one layout, the other's part, and one tensor.

Models that are only asked now and then (a reference, a reward) are parked in the same way: `park`
and `fetch`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.gather import is_share
from dsv2_ref.parallel.mesh import Mesh
from dsv2_ref.parallel.stages import Stages
from dsv2_ref.training.optim import keeper
from dsv2_ref.training.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank's device: in each phase, and while the layout changes."""

    training: int        # weights and moments, between two steps; a step adds gradients
    changing: int        # both layouts of the weights, as far as they are there together
    inference: int       # weights of all layers; the cache of the text comes on top

    def lines(self) -> str:
        return ", ".join(f"{name} {value / 2**20:.2f} MiB" for name, value in vars(self).items())


class Hybrid:
    """The two layouts of a trainer's model; `Mesh` is its world. To be made by all ranks.

    `experts`: all of them are on each rank for inference, or the share of the training layout.
    """

    def __init__(self, trainer: Trainer, experts: str = "all") -> None:
        if experts not in ("all", "share"):
            raise ValueError(f"experts: {experts!r}, expected 'all' or 'share'")
        if not isinstance(trainer.world, Mesh):
            raise ValueError("world: of one process, expected a Mesh of several")
        self.trainer, self.mesh = trainer, trainer.world
        self.held = None if experts == "all" else trainer.model.held
        self.peaks: dict[str, int] = {}      # bytes that there were, by phase

    def plan(self) -> Plan:
        """Of this rank, once a step has been made."""
        weights = _bytes(self.trainer.model.parameters())
        inference = _bytes(_empty(self.trainer.model, self.held).parameters())
        return Plan(weights + _bytes(self._moments()), weights + inference, inference)

    @contextmanager
    def inference(self) -> Iterator[DeepSeekV2]:
        """The model in the inference layout, in eval mode. By all ranks, at the same time."""
        weights = list(self.trainer.model.parameters())
        for W in weights:
            W.grad = None
        self._note("training", weights, self._moments())
        host = park(self._moments())
        model = self.spread()
        self._note("changing", weights, model.parameters())
        host += park(weights)
        self._note("inference", model.parameters())
        try:
            yield model.eval()
        finally:
            for W in model.parameters():
                W.data = W.data.new_empty(0)
            fetch(host)

    def spread(self) -> DeepSeekV2:
        """A model of all layers on this rank, from the stages of all. By all ranks."""
        mesh, stages = self.mesh, self.trainer.model
        mine = {name: W.detach() for name, W in stages.state_dict().items()}
        pipeline, experts = mesh.mesh.get_group("pp"), mesh.mesh.get_group("ep")
        names: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]] * pipeline.size()
        dist.all_gather_object(names, [(n, W.shape, W.dtype) for n, W in mine.items()], pipeline)
        whole: dict[str, Tensor] = {}
        for owner, entries in enumerate(names):
            for name, shape, dtype in entries:
                if name in whole:                        # a tied matrix, or one under two names
                    continue
                here = owner == mesh.pp
                W = mine[name].clone() if here else torch.empty(shape, dtype=dtype,
                                                                device=mesh.device)
                dist.broadcast(W, group=pipeline, group_src=owner)
                if is_share(name) and self.held is None and experts.size() > 1:
                    parts = [torch.empty_like(W) for _ in range(experts.size())]
                    dist.all_gather(parts, W, group=experts)
                    W = torch.cat(parts)
                whole[name] = W
        model = _empty(stages, self.held)
        model.load_state_dict(whole, assign=True)
        if stages.config.tie_embeddings:
            model.head.weight = model.embedding.weight
        if self.held is not None:
            model.across = mesh.across
        return model

    def _moments(self) -> list[Tensor]:
        return [t for optimizer in map(keeper, self.trainer.optimizers)
                for values in optimizer.state.values() for t in values.values() if t.ndim]

    def _note(self, phase: str, *there: Iterable[Tensor]) -> None:
        self.peaks[phase] = sum(_bytes(tensors) for tensors in there)


def park(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Offload: copies in the host's memory, and nothing left on the device; see `fetch`."""
    host = []
    for t in tensors:
        copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t.detach())
        host.append((t, copy))
        t.data = t.data.new_empty(0)
    return host


def fetch(host: list[tuple[Tensor, Tensor]]) -> None:
    """Load again what `park` has put away, into the same tensors."""
    for t, copy in host:
        t.data = copy.to(t.device, copy=t.is_cuda)


def _empty(stages: Stages, held: range | None) -> DeepSeekV2:
    """All layers without weights, in the dtype of the stages; a router in its own comes later."""
    with torch.device("meta"):
        return DeepSeekV2(stages.config, held=held).to(stages.like.dtype)


def _bytes(tensors: Iterable[Tensor | nn.Parameter]) -> int:
    return sum(t.nbytes for t in tensors)

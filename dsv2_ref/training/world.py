# SPDX-License-Identifier: MIT
"""Who trains: the seam between a trainer and the processes that share its work.

Gradients and losses of a share are weighted by its part of the whole batch, so that their sum over
the processes is what one process alone would have found.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsv2_ref.block import Traffic
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.adamw8 import AdamW8
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.optim import alone, keeper
from dsv2_ref.training.run_folder import load_state, save_state

T = TypeVar("T")


class World:
    """The processes that train together: here one, alone. Several inherit and override.

    All of them read the same batch at the same place in the data and draw the same protected
    sequences; `share` is the one point where they part. What is marked "by all" is to be called by
    every process, in the same order.
    """

    first = True                 # whether this one writes the log and speaks
    several = False
    suffix = ".safetensors"      # of a state's name

    # ---- what is held

    def hold(self, model: DeepSeekV2, sequence: int) -> nn.Module:
        """What this process trains of a model, which all have made alike.

        sequence: tokens of one in training; the work of a layer depends on it.
        """
        return model

    def with_whole(self, model: nn.Module, work: Callable[[DeepSeekV2], T]) -> T:
        """What `work` finds of the whole model, on the first; told to all. By all."""
        return work(model)

    def optimizers(
        self, kind: type[Optimizer], groups: list[dict], **options: Any
    ) -> list[Optimizer]:
        """Optimisers of one kind for groups of parameters."""
        return alone(kind, groups, **options)

    # ---- a step

    def share(self, batch: Batch) -> Batch:
        """The rows of a micro-batch that this process reads; not none."""
        return batch

    def backward(
        self, parts: Iterable[tuple[Batch, float]], losses: Callable[[Batch], Named],
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> tuple[dict[str, Tensor], list[Traffic]]:
        """Add the gradients of micro-batches, each weighted by its share of the whole batch.

        `around` makes what a forward pass runs in: autocast. The losses by name, weighted and
        summed in fp64, and the load of the last micro-batch.
        """
        sums: dict[str, Tensor] = {}
        for part, share in parts:
            with around():
                found = losses(part)
            (found.total * share).backward()
            for name, loss in found.losses.items():
                loss = loss.detach().double() * share
                sums[name] = sums[name] + loss if name in sums else loss
        return sums, found.load

    def reduce(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """() the common norm of all gradients, after `reduce`; in fp32 at least."""
        wide = [torch.promote_types(g.dtype, torch.float32) for g in gradients]
        norms = [torch.linalg.vector_norm(g, dtype=w)
                 for g, w in zip(gradients, wide, strict=True)]
        return torch.linalg.vector_norm(torch.stack(norms))

    # ---- what all must agree on

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first, told to all; its ValueError is everyone's. By all."""
        return work()

    def clock(self, seconds: float) -> float:
        """Of these times, the first's. By all."""
        return seconds

    def asked(self, signal: int | None) -> int | None:
        """The signal that any of the processes was sent. By all."""
        return signal

    # ---- states

    def save(self, path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a training state, whole or not at all. By all."""
        save_state(path, tensors, state)

    def load(self, path: str | Path, trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` wrote, as far as this trainer holds it. By all."""
        return load_state(path)


def clip_gradients(weights: Iterable[Tensor], most: float, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients so that their common norm is at most `most`; () that norm before.

    norm: if it is known already, as that of several processes is.
    """
    weights = [W for W in weights if W.grad is not None]
    if norm is None:
        norm = World().norm([W.grad for W in weights])
    torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
    return norm


def update(optimizers: list[Optimizer], norm: Tensor, most: float) -> None:
    """One step of each; gradients, whose common norm is `norm` (), clipped to `most`.

    AdamW8 multiplies the factor in as it reads a gradient, which then needs no pass of its own.
    """
    for optimizer in optimizers:
        if isinstance(keeper(optimizer), AdamW8):
            optimizer.step(clip=(most / (norm + 1e-6)).clamp(max=1.0))      # torch's factor
        else:
            groups = optimizer.param_groups
            clip_gradients((W for group in groups for W in group["params"]), most, norm)
            optimizer.step()

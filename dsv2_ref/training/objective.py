# SPDX-License-Identifier: MIT
"""What is trained for: a function of a model and a batch that returns losses by name.

Pretraining is below. Another objective gets whatever its batches give (masks, rewards, old log
probabilities): the trainer hands on their tensors, a micro-batch of rows at a time.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2_ref.block import Traffic
from dsv2_ref.model import DeepSeekV2


@dataclass
class Batch:
    """Sequences that are read at once: what `next_batch` gave, rows of one length B."""

    tensors: tuple[Tensor, ...]          # in pretraining tokens and targets, (B, T) each
    protected: Tensor                    # (B,) bool, sequences that drop nothing
    with_load: bool = False              # whether the log wants to know the load

    def __len__(self) -> int:
        return len(self.protected)

    def rows(self, part: slice, device: torch.device | None = None) -> "Batch":
        return Batch(tuple(t[part].to(device) for t in self.tensors),
                     self.protected[part].to(device), self.with_load)


@dataclass
class Named:
    """What an objective returns: losses by name, scalar tensors, whose sum is trained on."""

    losses: dict[str, Tensor]
    load: list[Traffic] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        return sum(self.losses.values())


def pretraining(model: DeepSeekV2, batch: Batch) -> Named:
    """The next token and the three balance losses, in nats per token."""
    losses = model.losses(*batch.tensors, batch.protected, batch.with_load)
    names = ("language", "expert", "device", "communication")
    return Named({name: getattr(losses, name) for name in names}, losses.load)

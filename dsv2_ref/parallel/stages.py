# SPDX-License-Identifier: MIT
"""What one rank holds of a model: one or two ranges of its layers, and its share of the experts.

A parameter has the name here that it has in the whole model, whatever range it lies in: states,
optimisers and checkpoints of any layout speak of the same things by the same names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2, Losses


class Stages(nn.Module):
    """`parts`, models of the layers `ranges`, in ascending order; not empty.

    `held`: the routed experts whose weights are here, None for all.
    """

    def __init__(
        self, config: Config, ranges: Sequence[range], held: range | None = None
    ) -> None:
        super().__init__()
        self.config, self.held = config, held
        self.parts = tuple(DeepSeekV2(config, layers, held) for layers in ranges)
        self.blocks = nn.ModuleDict()            # a tuple registers nothing: names are made here
        for part in self.parts:
            for layer, block in zip(part.layers, part.blocks, strict=True):
                self.blocks[str(layer)] = block
            for name in ("embedding", "norm", "head"):
                if hasattr(part, name):
                    self._one(name, getattr(part, name), part)

    def _one(self, name: str, module: nn.Module, part: DeepSeekV2) -> None:
        """Register; a tied embedding that both parts have is one."""
        if not hasattr(self, name):
            setattr(self, name, module)
            return
        part.embedding = self.embedding
        part.head.weight = self.embedding.weight

    @property
    def like(self) -> Tensor:
        """A weight of the stream's device and dtype."""
        return self.parts[0].like

    @property
    def recompute(self) -> float:
        """Share of the blocks of each part whose activations are made again."""
        return self.parts[0].recompute

    @recompute.setter
    def recompute(self, share: float) -> None:
        for part in self.parts:
            part.recompute = share

    def describe(self) -> str:
        """One line: size, layers and experts that are here, device, dtype and what runs."""
        layers = " and ".join(f"{p.layers.start} to {p.layers.stop - 1}" for p in self.parts)
        experts = self.held or range(self.config.n_routed)
        n = sum(p.numel() for p in self.parameters())
        _, _, rest = self.parts[0].describe().partition("parameters ")
        return (f"on this rank {n / 1e6:.2f}M parameters (layers {layers}, experts "
                f"{experts.start} to {experts.stop - 1}) {rest}")

    def losses(self, *arguments: Any, **named: Any) -> Losses:
        """Those of the model, where all of its layers are in one part."""
        (part,) = self.parts
        return part.losses(*arguments, **named)

    def train(self, mode: bool = True) -> "Stages":
        super().train(mode)
        for part in self.parts:
            part.train(mode)
        return self

    @torch.no_grad()
    def take(self, whole: dict[str, Tensor]) -> None:
        """Copy this rank's share out of the weights of a whole model, by name."""
        for name, mine in self.state_dict().items():
            found = whole[name]
            if self.held is not None and ".experts.W_" in name:
                found = found[self.held.start : self.held.stop]
            mine.copy_(found)

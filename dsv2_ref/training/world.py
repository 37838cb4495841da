# SPDX-License-Identifier: MIT
"""Who trains: the seam between a trainer and the processes that share its work.

Gradients and losses of a share are weighted by its part of the whole batch, so that their sum over
the processes is what one process alone would have found.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsv2_ref.block import Traffic
from dsv2_ref.training.objective import Batch, Named


class World:
    """The processes that train together: here one, alone. Several inherit and override.

    All of them read the same batch at the same place in the data and draw the same protected
    sequences; `share` is the one point where they part.
    """

    first = True                         # whether this one writes the log
    state_name: str | None = "state"     # of this one's states in the folder; None: it has none

    def share(self, batch: Batch) -> Batch:
        """The rows of a micro-batch that this process reads; not none."""
        return batch

    def backward(
        self, parts: Iterable[tuple[Batch, float]], losses: Callable[[Batch], Named]
    ) -> tuple[dict[str, Tensor], list[Traffic]]:
        """Add the gradients of micro-batches, each weighted by its share of the whole batch.

        The losses by name, weighted and summed in fp64, and the load of the last micro-batch.
        """
        sums: dict[str, Tensor] = {}
        for part, share in parts:
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


def clip_gradients(weights: Iterable[Tensor], most: float, world: World | None = None) -> Tensor:
    """Scale all gradients so that their common norm is at most `most`; () that norm before."""
    weights = [W for W in weights if W.grad is not None]
    total = (world or World()).norm([W.grad for W in weights])
    torch.nn.utils.clip_grads_with_norm_(weights, most, total)
    return total

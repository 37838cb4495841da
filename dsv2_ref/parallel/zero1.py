# SPDX-License-Identifier: MIT
"""ZeRO-1: ranks that have the same parameters share the optimiser's state (section 3.1.3).

Each of R ranks keeps the moments of a part of the parameters, updates that part, and sends it to
the others. Gradients are summed on all of them before, so that nothing else changes: an update is
the one of a single process, and R times as many ranks need an Rth of the memory for moments.

The engine is torch's ZeroRedundancyOptimizer. It gives a parameter to one rank whole, the largest
ones first, each to the rank that has least: AdamW, AdamW in 8 bits and Muon, which needs whole
matrices, are all shared in this way. Two things are added here:

  1. It refuses parameters of several dtypes: one for each dtype (the router of a bf16 model is
     fp32).
  2. Not all parameters have the same replicas: experts are shared by the ranks that hold the same
     experts, all others by all ranks that read other rows. One for each of these groups.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)      # torch's own files, of torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer


def share_optimizers(
    kind: type[Optimizer], groups: list[dict], replicas: Callable[[Tensor], dist.ProcessGroup],
    **options: Any,
) -> list[Optimizer]:
    """Optimisers of one kind for groups of parameters, as torch takes them, shared by ranks.

    `replicas` is the group of ranks that hold the same parameter. An optimiser's `state` has the
    moments of this rank's part alone; `optim.param_groups` is that part.
    """
    apart: dict[tuple[object, dist.ProcessGroup], list[dict]] = {}
    for group in groups:
        parts: dict[tuple[object, dist.ProcessGroup], list[Tensor]] = {}
        for W in group["params"]:
            parts.setdefault((W.dtype, replicas(W)), []).append(W)
        for key, weights in parts.items():
            apart.setdefault(key, []).append(group | {"params": weights})
    made: list[Optimizer] = []
    for (_, ranks), own in apart.items():
        if ranks.size() == 1:
            made.append(kind(own, **options))
            continue
        shared = ZeroRedundancyOptimizer(own, kind, process_group=ranks, **options)
        shared.state = shared.optim.state
        made.append(shared)
    return made

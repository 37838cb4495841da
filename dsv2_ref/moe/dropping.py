# SPDX-License-Identifier: MIT
"""Token dropping: but for protected tokens, no device computes more than its share. Training only.

Section 2.2.4. The balance losses encourage balance, they cannot guarantee it, and the fullest
device sets the pace of all. So each device gets a budget, the average load (capacity factor 1.0),
and drops the slots of lowest affinity until it is within it. A dropped slot adds nothing to its
token: the residual stream, the shared experts and the token's other slots remain. The tokens of
about a tenth of the sequences are never dropped, so that training and evaluation, where nothing
is dropped, do not drift apart.

Where the paper is silent we choose:
  1. The unit is a routed slot, one (token, expert) pair, on the device that holds the expert.
  2. The budget is floor(capacity · slots / D) per micro-batch: B·T·K slots in all.
  3. Protected slots are ranked first. They count against the budget, and are all kept even where
     they exceed it.
  4. Among equal affinities the earlier slot is kept.

Not to be confused with a capacity per *expert*, which is what most frameworks offer.

Shapes: N flat tokens, K slots a token, E routed experts, D devices.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from dropping import keep_within_budget
    affinity, indices = torch.rand(40, 8).topk(3)          # (N, K) each, from the router
    protected = torch.arange(40) < 4                       # (N,) tokens that are never dropped
    keep = keep_within_budget(indices, affinity, n_routed=8, n_devices=4, protected=protected)
    gates = affinity * keep                                # or `keep` as the experts' argument
"""

import torch
from torch import Tensor


def keep_within_budget(
    indices: Tensor, affinity: Tensor, n_routed: int, n_devices: int,
    protected: Tensor | None = None, capacity: float = 1.0,
) -> Tensor:
    """Which slots survive.

    indices (N, K) experts, affinity (N, K) of those slots, protected (N,) bool tokens that are
    never dropped -> (N, K) bool.
    """
    capacity = min(capacity, n_devices)          # n_devices: room for all slots on one device
    budget = int(capacity * indices.numel() / n_devices)
    device = indices.flatten() // (n_routed // n_devices)                    # (N·K,)
    safe = torch.zeros_like(indices, dtype=torch.bool)
    if protected is not None:
        safe |= protected[:, None]
    safe = safe.flatten()

    # sort by affinity, then by protection, then by device: three stable sorts, the last one rules
    order = affinity.detach().flatten().argsort(descending=True, stable=True)
    order = order[(~safe[order]).to(torch.uint8).argsort(stable=True)]
    order = order[device[order].argsort(stable=True)]
    # not bincount, for whose result a GPU waits
    load = device.new_zeros(n_devices).scatter_add_(0, device, torch.ones_like(device))     # (D,)
    first = load.cumsum(0) - load
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - first[device[order]]
    return ((rank < budget) | safe).view_as(indices)

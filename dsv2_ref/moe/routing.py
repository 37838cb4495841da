# SPDX-License-Identifier: MIT
"""Which experts a token goes to, and with what weight.

Section 2.2.1-2.2.2, equations (21) and (22). Each routed expert has a centroid e_i; a token's
affinity to it is a softmax over all experts of u·e_i. The top K experts are mixed with their own
affinities. V2 adds *device-limited routing*: the experts of a layer lie on D devices, and a token
may reach at most M of them, so that its messages are bounded by M and not by K. Devices are ranked
by the best expert they hold, and the top K are taken inside the best M. The paper found M >= 3
about as good as no limit; V2 has D = 8, M = 3, K = 6. V2-Lite has no limit: plain greedy top-K.

How this differs from the famous versions:
  1. A device is scored by its single best expert. DeepSeek-V3 scores it by the sum of its two
     best, and many implementations of V2 silently do the same.
  2. Experts of forbidden devices are masked with -inf. Masked with 0, an expert whose affinity
     has underflowed to 0 can still be chosen from outside.
  3. The weights are the softmax over *all* experts, gathered: they sum to less than 1 and are not
     renormalised. V2's published weights carry a factor of 16 (`routed_scaling_factor`), which
     the equations leave out; it is applied here and nowhere else.
  4. Affinities are computed in at least fp32 whatever the model's dtype, autocast included: in
     bf16 two experts tie too easily, and a token changes its experts.

Shapes: N flat tokens, d width, E routed experts, K slots (experts) a token, D devices, M devices
a token.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from routing import Router
    router = Router(d=64, n_routed=8, top_k=3, n_devices=4, max_devices=2)
    x = torch.randn(10, 64)                      # (N, d), after the layer's norm
    routing = router(x)
    experts, gates = routing.indices, routing.gates      # (N, K) each
    s = routing.scores                           # (N, E), for the balance losses
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Where N tokens go: experts and gates of their K slots, and all affinities."""

    indices: Tensor    # (N, K) int64
    gates: Tensor      # (N, K) at least fp32; carries gradient
    scores: Tensor     # (N, E) at least fp32; rows sum to 1; carries gradient
    slots: tuple[Tensor, Tensor] | None = None     # sorted by expert, where that is done already


def affinities(u: Tensor, centroids: Tensor) -> Tensor:
    """u (N, d), centroids (E, d) -> softmax scores (N, E) in at least fp32."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        return F.linear(u.to(dtype), centroids.to(dtype)).softmax(-1)        # (N, E)           (22)


def select_greedy(s: Tensor, top_k: int, n_devices: int = 1, max_devices: int = 1) -> Tensor:
    """The K experts of highest affinity: (N, E) -> (N, K), best first. Devices play no part."""
    return s.topk(top_k, -1).indices


def select_device_limited(s: Tensor, top_k: int, n_devices: int, max_devices: int) -> Tensor:
    """The K best experts on the M best devices: (N, E) -> (N, K), best first.

    Expert i lies on device i // (E / n_devices).
    """
    groups = s.unflatten(-1, (n_devices, -1))                                # (N, D, E/D)
    best = groups.amax(-1).topk(max_devices, -1).indices                     # (N, M)
    allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    masked = groups.masked_fill(~allowed[..., None], -torch.inf)
    return masked.flatten(-2).topk(top_k, -1).indices


class Router(nn.Module):
    """Centroids of E experts. Greedy if `max_devices` is None, device-limited otherwise."""

    def __init__(
        self, d: int, n_routed: int, top_k: int, n_devices: int = 1,
        max_devices: int | None = None, scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if n_devices < 1 or n_routed % n_devices:
            raise ValueError(f"n_devices: {n_devices}, expected a divisor of n_routed = {n_routed}")
        if max_devices is not None and not 1 <= max_devices <= n_devices:
            raise ValueError(f"max_devices: {max_devices}, expected 1 to n_devices = {n_devices}")
        reachable = n_routed // n_devices * (max_devices or n_devices)
        if not 1 <= top_k <= reachable:
            raise ValueError(f"top_k: {top_k}, expected 1 to {reachable}, the experts in reach")
        self.top_k, self.scaling_factor = top_k, scaling_factor
        self.n_devices, self.max_devices = n_devices, max_devices
        self.weight = nn.Parameter(torch.empty(n_routed, d))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, u: Tensor, select: Callable[..., Tensor] | None = None,
        route: Callable[..., tuple] | None = None,
    ) -> Routing:
        """u (N, d), the normed stream -> Routing.

        `select` is a function equal to the selection that the router has by its `max_devices`;
        `route` one that makes all fields of Routing of u and the centroids.
        """
        if route is not None:
            return Routing(*route(u, self.weight, self.top_k, self.n_devices, self.max_devices,
                                  self.scaling_factor))
        if select is None:
            select = select_greedy if self.max_devices is None else select_device_limited
        s = affinities(u, self.weight)                                       # (N, E)
        indices = select(s.detach(), self.top_k, self.n_devices, self.max_devices)   # (N, K)
        g = s.gather(-1, indices) * self.scaling_factor                      # (N, K)           (21)
        return Routing(indices, g, s)

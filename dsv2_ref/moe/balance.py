# SPDX-License-Identifier: MIT
"""Three losses that keep experts, devices and messages balanced.

Section 2.2.3, equations (23)-(31). A router left to itself sends ever more tokens to the experts
that already learn fastest, until the others are dead ("routing collapse"). Each loss has the form
alpha · sum f·P: f says how often something *was* chosen, a count without gradient; P says how much
the router *wants* it, a mean of affinities with gradient. Pushing down the P of what is overused
is the whole mechanism. They differ in what is counted:

  expert         (23)-(25)  slots an expert got, relative to an equal share
  device         (26)-(28)  the same averaged over the experts of a device: equal computation
  communication  (29)-(31)  tokens *sent to* a device, once a device however many of its experts
                            they use: equal messages received, which equal computation does not give

With perfectly uniform routing each loss equals its alpha (the last if each token reaches exactly M
devices). V2 trains with 0.003 / 0.05 / 0.02, Lite with the first alone at 0.001.

How this file differs from the famous versions:
  1. f and P are taken over one sequence, as in the paper, not over the batch: two sequences that
     lean opposite ways do not cancel. Where the paper is silent: the losses are averaged over the
     sequences of a batch, and the model sums them over layers.
  2. f counts what the router chose, before any token dropping.

A slot is one (token, expert) pair.
Shapes: B sequences, T tokens each, E routed experts, K slots a token, D devices, M devices a token.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from balance import communication_balance_loss, device_balance_loss, expert_balance_loss
    s = torch.randn(2, 5, 8, requires_grad=True).softmax(-1)   # (B, T, E), the router's affinities
    indices = s.topk(3).indices                                # (B, T, K), before any dropping
    loss = expert_balance_loss(s, indices, alpha=0.003)
    loss = loss + device_balance_loss(s, indices, 0.05, n_devices=4)
    loss = loss + communication_balance_loss(s, indices, 0.02, n_devices=4, max_devices=2)
    loss.backward()                                            # added to the language model's
"""

import torch
from torch import Tensor


def expert_frequency(indices: Tensor, n_routed: int) -> Tensor:
    """indices (B, T, K) -> f (B, E): slots each expert got over an equal share; mean 1."""
    B, T, K = indices.shape
    counts = torch.zeros(B, n_routed, dtype=torch.float64, device=indices.device)
    one = torch.ones((), dtype=counts.dtype, device=indices.device)
    counts.scatter_add_(1, indices.flatten(1), one.expand(B, T * K))
    return counts * (n_routed / (K * T))                                     # (B, E)           (24)


def device_reach(indices: Tensor, n_routed: int, n_devices: int) -> Tensor:
    """indices (B, T, K) -> (B, T, D) bool: the devices a token is sent to, each counted once."""
    device = indices // (n_routed // n_devices)                              # (B, T, K)
    reach = torch.zeros(*indices.shape[:2], n_devices, dtype=torch.bool, device=indices.device)
    return reach.scatter_(-1, device, True)


def expert_balance_loss(s: Tensor, indices: Tensor, alpha: float) -> Tensor:
    """s (B, T, E) affinities, indices (B, T, K) -> scalar, averaged over sequences."""
    f = expert_frequency(indices, s.shape[-1]).to(s.dtype)                   # (B, E)
    P = s.mean(1)                                                            # (B, E)           (25)
    return alpha * (f * P).sum(-1).mean()                                    # ()               (23)


def device_balance_loss(s: Tensor, indices: Tensor, alpha: float, n_devices: int) -> Tensor:
    """s (B, T, E), indices (B, T, K) -> scalar; expert i lies on device i // (E / D)."""
    f = expert_frequency(indices, s.shape[-1]).to(s.dtype)                   # (B, E)
    f_dev = f.unflatten(-1, (n_devices, -1)).mean(-1)                        # (B, D)           (27)
    P_dev = s.mean(1).unflatten(-1, (n_devices, -1)).sum(-1)                 # (B, D)           (28)
    return alpha * (f_dev * P_dev).sum(-1).mean()                            # ()               (26)


def communication_balance_loss(
    s: Tensor, indices: Tensor, alpha: float, n_devices: int, max_devices: int
) -> Tensor:
    """s (B, T, E), indices (B, T, K) -> scalar; `max_devices` is M."""
    sent = device_reach(indices, s.shape[-1], n_devices).to(s.dtype)         # (B, T, D)
    f_comm = sent.mean(1) * (n_devices / max_devices)                        # (B, D)           (30)
    P_comm = s.mean(1).unflatten(-1, (n_devices, -1)).sum(-1)                # (B, D)           (31)
    return alpha * (f_comm * P_comm).sum(-1).mean()                          # ()               (29)

# SPDX-License-Identifier: MIT
"""One layer: attention, then a dense feed-forward network or experts behind a router.

A block is a function of its inputs. What a pass has in common comes in as a `Pass`; what the layer
has to say beside its output is returned: the three balance losses, and the traffic of its router.
So a block can be run again in the backward pass, or on another device, and nothing is counted
twice.

Shapes: B batch, T new tokens, N = B·T flat tokens, E routed experts, D devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsv2_ref.attention.kv_cache import Cache
from dsv2_ref.attention.mla import MultiHeadLatentAttention
from dsv2_ref.attention.rope import softmax_scale
from dsv2_ref.config import Config
from dsv2_ref.forms import Forms
from dsv2_ref.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    device_reach,
    expert_balance_loss,
)
from dsv2_ref.moe.experts import FeedForward, MixtureOfExperts
from dsv2_ref.moe.routing import Router, Routing


@dataclass(frozen=True)
class Pass:
    """What all blocks of one forward pass share."""

    cos: Tensor                          # (B or 1, T, d_r/2) of the new tokens
    sin: Tensor
    forms: Forms
    cache: Cache | None = None
    learns: bool = False                 # balance losses are taken and slots dropped
    protected: Tensor | None = None      # (B,) bool, sequences that drop nothing
    with_load: bool = False              # traffic is counted
    positions: Tensor | None = None      # (B, T), where `attend` wants them always
    lengths: Sequence[int] | None = None     # real tokens of each sequence where padding follows
                                             # them, which balance and traffic do not count


@dataclass(frozen=True)
class Traffic:
    """What one layer's router chose, in slots and tokens (before dropping)."""

    layer: int
    experts: Tensor      # (E,) slots each expert got
    devices: Tensor      # (D,) tokens each device was sent
    kept: Tensor | None  # (N, K) bool, slots that were not dropped; None for all
    routing: Routing     # indices, gates and scores, detached

    @property
    def dropped(self) -> float:
        """Share of all slots that was dropped."""
        return 0.0 if self.kept is None else 1.0 - self.kept.float().mean().item()

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's affinities in nats: ln E if the router has no preference."""
        return torch.special.entr(self.routing.scores).sum(-1).mean().item()


class RoutedFFN(nn.Module):
    """Router, token dropping, balance losses and experts of one layer.

    `held`: the routed experts whose weights are here, None for all; see `MixtureOfExperts`.
    """

    def __init__(self, config: Config, layer: int, held: range | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.router = Router(c.d, c.n_routed, c.top_k, c.n_devices, c.max_devices,
                             c.routed_scaling_factor)
        self.experts = MixtureOfExperts(c.d, c.expert_width, c.n_shared, c.n_routed, held)

    def forward(
        self, u: Tensor, x: Tensor, run: Pass
    ) -> tuple[Tensor, Tensor | None, Traffic | None]:
        """u (B, T, d) the stream, x its norm -> u + experts, balance (3,), traffic; see `Block`."""
        B, T, _ = u.shape
        x = x.flatten(0, 1)                                              # (N, d)
        routing = self.router(x, run.forms.select, run.forms.route)
        keep = self._keep(routing, run, T) if run.learns else None
        balance = self._balance(routing, B, run.lengths) if run.learns else None
        traffic = self._traffic(routing, keep, B, run.lengths) if run.with_load else None
        experts = run.forms.experts
        if routing.slots is not None:
            experts = partial(experts, slots=routing.slots)
        h = self.experts(u.flatten(0, 1), x, routing.indices, routing.gates, experts, keep,
                         run.forms.swiglu, run.forms.add_up)
        return h.unflatten(0, (B, T)), balance, traffic

    def _keep(self, routing: Routing, run: Pass, T: int) -> Tensor | None:
        c = self.config
        if c.drop_capacity is None:
            return None
        protected = None if run.protected is None else run.protected.repeat_interleave(T)
        # gates are affinities times one factor: the same order
        return run.forms.keep(routing.indices, routing.gates, c.n_routed, c.n_devices, protected,
                              c.drop_capacity)

    def _balance(self, routing: Routing, B: int, lengths: Sequence[int] | None) -> Tensor:
        """The expert, device and communication balance loss, (3,); 0 where alpha is."""
        s, indices = routing.scores.unflatten(0, (B, -1)), routing.indices.unflatten(0, (B, -1))
        if lengths is None:
            return self._balance_of(s, indices)
        return torch.stack([self._balance_of(s[b : b + 1, :n], indices[b : b + 1, :n])
                            for b, n in enumerate(lengths)]).mean(0)

    def _balance_of(self, s: Tensor, indices: Tensor) -> Tensor:
        """The same of sequences without padding, s (B, T, E) and indices (B, T, K)."""
        c = self.config
        losses = [s.new_zeros(())] * 3
        if c.alpha_expert:
            losses[0] = expert_balance_loss(s, indices, c.alpha_expert)
        if c.alpha_device:
            losses[1] = device_balance_loss(s, indices, c.alpha_device, c.n_devices)
        if c.alpha_comm:
            losses[2] = communication_balance_loss(s, indices, c.alpha_comm, c.n_devices, c.reach)
        return torch.stack(losses)

    def _traffic(
        self, routing: Routing, keep: Tensor | None, B: int, lengths: Sequence[int] | None
    ) -> Traffic:
        c = self.config
        indices, gates, scores = routing.indices, routing.gates.detach(), routing.scores.detach()
        if lengths is not None:
            T = len(indices) // B
            real = torch.cat([torch.arange(n) + b * T for b, n in enumerate(lengths)])
            indices, gates, scores = (t[real] for t in (indices, gates, scores))
            keep = None if keep is None else keep[real]
        slots = indices.flatten()
        experts = slots.new_zeros(c.n_routed).scatter_add_(0, slots, torch.ones_like(slots))
        sent = device_reach(indices[None], c.n_routed, c.n_devices)
        return Traffic(self.layer, experts, sent[0].sum(0), keep, Routing(indices, gates, scores))


class Block(nn.Module):
    """h + MLA(norm h), then h + FFN(norm h) with a dense FFN or experts."""

    def __init__(self, config: Config, layer: int, held: range | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.norm_attention = nn.RMSNorm(c.d, eps=c.norm_eps)
        scale = softmax_scale(c.d_h + c.d_r, c.yarn_factor or 1.0, c.yarn_mscale_all_dim)
        self.attention = MultiHeadLatentAttention(c.d, c.n_h, c.d_h, c.d_r, c.d_v, c.d_c, c.d_cq,
                                                  scale=scale)
        self.norm_ffn = nn.RMSNorm(c.d, eps=c.norm_eps)
        self.ffn = (RoutedFFN(c, layer, held) if c.is_moe(layer)
                    else FeedForward(c.d, c.dense_width))

    @property
    def router(self) -> Router:
        """Of a layer with experts."""
        return self.ffn.router

    @property
    def experts(self) -> MixtureOfExperts:
        """Of a layer with experts."""
        return self.ffn.experts

    def forward(
        self, h: Tensor, run: Pass, place: int = 0
    ) -> tuple[Tensor, Tensor | None, Traffic | None]:
        """h (B, T, d) -> h (B, T, d); balance losses (3,) if the pass learns; traffic if asked.

        `place` is the layer's number in the cache. The last two are None for a dense FFN.
        """
        u = self.attention(self.norm_attention(h), run.cos, run.sin, run.forms.attend, run.cache,
                           place, run.positions, rotate_both=run.forms.rotate_both)
        h, x = run.forms.add_norm(h, u, self.norm_ffn)
        if not self.config.is_moe(self.layer):
            return h + self.ffn(x, run.forms.swiglu), None, None
        return self.ffn(h, x, run)

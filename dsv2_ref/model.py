# SPDX-License-Identifier: MIT
"""The assembly: embedding, blocks, head. The mathematics is in attention/ and moe/.

Two doors. `losses(tokens, targets)` is the training one: the language-model loss, the balance
losses of every layer, token dropping. `model(tokens, cache)` is the other: logits of the new
tokens, reading a prompt through expanded attention and decoding through absorbed attention on the
latent cache. This file alone decides which of the equal algorithms runs, by counting
multiplications (attention) and by device and size (experts), and asks kernel_choice.py for the
kernel that does the same on a GPU; `describe` says what was decided.

Shapes: B batch, T new tokens, S = cached + new tokens, N = B·T flat tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2_ref.attention.cache_quant import SixBitCache, attend_packed
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import (
    MultiHeadLatentAttention,
    absorbed_is_cheaper,
    attend_absorbed,
    attend_expanded,
)
from dsv2_ref.attention.rope import (
    rope_frequencies,
    rope_magnitude,
    rope_tables,
    softmax_scale,
    yarn_frequencies,
)
from dsv2_ref.config import Config
from dsv2_ref.cross_entropy import IGNORED, linear_cross_entropy
from dsv2_ref.kernel_choice import attention_form, experts_form, selection_form
from dsv2_ref.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    device_reach,
    expert_balance_loss,
)
from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import FeedForward, MixtureOfExperts, choose_experts
from dsv2_ref.moe.routing import Router, Routing, select_device_limited

Cache = LatentCache | SixBitCache


@dataclass(frozen=True)
class Load:
    """What one layer's router chose, in slots and tokens (before dropping)."""

    layer: int
    experts: Tensor      # (E,) slots each expert got
    devices: Tensor      # (D,) tokens each device was sent
    dropped: float       # share of all slots that was dropped
    routing: Routing     # indices, gates and scores, detached

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's affinities in nats: ln E if the router has no preference."""
        return torch.special.entr(self.routing.scores).sum(-1).mean().item()


@dataclass
class Losses:
    """Losses in nats a token, each a scalar tensor; the three balance losses summed over layers."""

    language: Tensor
    expert: Tensor
    device: Tensor
    communication: Tensor
    load: list[Load] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        return self.language + self.expert + self.device + self.communication


@dataclass
class _Pass:
    """What the blocks of one forward pass share."""

    cos: Tensor
    sin: Tensor
    attend: Callable[..., Tensor]
    cache: Cache | None = None
    protected: Tensor | None = None                   # (B,) bool, sequences that drop nothing
    balance: list[Tensor] | None = None               # [expert, device, communication] so far
    load: list[Load] | None = None


class Block(nn.Module):
    """h + MLA(norm h), then h + FFN(norm h) with a dense FFN or experts."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.norm_attention = nn.RMSNorm(c.d, eps=c.norm_eps)
        scale = softmax_scale(c.d_h + c.d_r, c.yarn_factor or 1.0, c.yarn_mscale_all_dim)
        self.attention = MultiHeadLatentAttention(c.d, c.n_h, c.d_h, c.d_r, c.d_v, c.d_c, c.d_cq,
                                                  scale=scale)
        self.norm_ffn = nn.RMSNorm(c.d, eps=c.norm_eps)
        if c.is_moe(layer):
            self.router = Router(c.d, c.n_routed, c.top_k, c.n_devices, c.max_devices,
                                 c.routed_scaling_factor)
            self.experts = MixtureOfExperts(c.d, c.expert_width, c.n_shared, c.n_routed)
        else:
            self.ffn = FeedForward(c.d, c.dense_width)

    def forward(self, h: Tensor, run: _Pass) -> Tensor:
        """h (B, T, d) -> (B, T, d)."""
        h = h + self.attention(self.norm_attention(h), run.cos, run.sin, run.attend, run.cache,
                               self.layer)
        x = self.norm_ffn(h)
        if not self.config.is_moe(self.layer):
            return h + self.ffn(x)
        B, T, _ = h.shape
        x = x.flatten(0, 1)                                              # (N, d)
        routing = self.router(x, selection_form(select_device_limited, x))
        keep = self._keep(routing, run, T)
        if run.balance is not None:
            self._add_balance(routing, run.balance, B)
        if run.load is not None:
            run.load.append(self._load(routing, keep, B))
        c = self.config
        twin = choose_experts(x, c.top_k, c.n_routed, c.expert_width)
        form = experts_form(twin, x, self.experts.W_gate)
        h = self.experts(h.flatten(0, 1), x, routing.indices, routing.gates, form, keep)
        return h.unflatten(0, (B, T))

    def _keep(self, routing: Routing, run: _Pass, T: int) -> Tensor | None:
        c = self.config
        if not self.training or c.drop_capacity is None or run.balance is None:
            return None
        protected = None if run.protected is None else run.protected.repeat_interleave(T)
        # gates are affinities times one factor: the same order
        return keep_within_budget(routing.indices, routing.gates, c.n_routed, c.n_devices,
                                  protected, c.drop_capacity)

    def _add_balance(self, routing: Routing, balance: list[Tensor], B: int) -> None:
        c = self.config
        s, indices = routing.scores.unflatten(0, (B, -1)), routing.indices.unflatten(0, (B, -1))
        if c.alpha_expert:
            balance[0] = balance[0] + expert_balance_loss(s, indices, c.alpha_expert)
        if c.alpha_device:
            balance[1] = balance[1] + device_balance_loss(s, indices, c.alpha_device, c.n_devices)
        if c.alpha_comm:
            balance[2] = balance[2] + communication_balance_loss(
                s, indices, c.alpha_comm, c.n_devices, c.reach)

    def _load(self, routing: Routing, keep: Tensor | None, B: int) -> Load:
        c = self.config
        experts = torch.bincount(routing.indices.flatten(), minlength=c.n_routed)
        sent = device_reach(routing.indices.unflatten(0, (B, -1)), c.n_routed, c.n_devices)
        dropped = 0.0 if keep is None else 1.0 - keep.float().mean().item()
        detached = Routing(routing.indices, routing.gates.detach(), routing.scores.detach())
        return Load(self.layer, experts, sent.flatten(0, 1).sum(0), dropped, detached)


class DeepSeekV2(nn.Module):
    """DeepSeek-V2 of any size.  `model(tokens, cache=None)` gives logits (B, T, vocab)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = self.config = config
        self.recompute = 0.0     # share of the blocks whose activations are made again in training
        self.embedding = nn.Embedding(c.vocab, c.d)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d, eps=c.norm_eps)
        self.head = nn.Linear(c.d, c.vocab, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        for weight in self.parameters():
            if weight.ndim > 1:              # the norms stay at one
                nn.init.normal_(weight, std=c.init_std)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, vocab); appends to `cache` and advances it."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Cache | None = None,
               lengths: Sequence[int] | None = None) -> Tensor:
        """tokens (B, T) -> what the head reads, (B, T, d).

        With a cache, `lengths` says how many of the T tokens of each sequence are real, the rest
        being padding on the right whose output means nothing; None means all of them.
        """
        run = self._start(tokens, cache)
        if lengths is not None:
            if cache is None:
                raise ValueError("lengths: given without a cache, expected None")
            if len(lengths) != len(tokens) or not all(0 <= n <= tokens.shape[1] for n in lengths):
                raise ValueError(f"lengths: {list(lengths)}, expected {len(tokens)} numbers "
                                 f"from 0 to {tokens.shape[1]}")
        h = self._blocks(tokens, run)
        if cache is not None:
            cache.advance(tokens.shape[1] if lengths is None else list(lengths))
        return self.norm(h)

    def losses(
        self, tokens: Tensor, targets: Tensor, protected: Tensor | None = None,
        with_load: bool = False,
    ) -> Losses:
        """tokens, targets (B, T) -> Losses; targets of -100 do not count.

        In training mode the balance losses are taken and slots over a device's budget dropped,
        except in the sequences that `protected` (B,) bool names. In eval mode neither happens.
        `with_load` fills `.load`, one entry per MoE layer.
        """
        run = self._start(tokens, None)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: shape {tuple(targets.shape)}, expected the tokens' "
                             f"{tuple(tokens.shape)}")
        _check_ids("targets", targets, self.config.vocab, ignored=IGNORED)
        if protected is not None and protected.shape != tokens.shape[:1]:
            raise ValueError(f"protected: shape {tuple(protected.shape)}, expected "
                             f"{tuple(tokens.shape[:1])}, one a sequence")
        zero = torch.zeros((), device=tokens.device)
        run.balance = [zero, zero, zero] if self.training else None
        run.load = [] if with_load else None
        run.protected = protected
        h = self.norm(self._blocks(tokens, run)).flatten(0, 1)           # (N, d)
        language = linear_cross_entropy(h, self.head.weight, targets.flatten())
        return Losses(language, *(run.balance or [zero, zero, zero]), list(run.load or []))

    def new_cache(self, batch: int, max_tokens: int, kind: str = "latent") -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens`, read in the model's dtype."""
        if kind not in (kinds := {"latent": LatentCache, "six_bit": SixBitCache}):
            raise ValueError(f"kind: {kind!r}, expected 'latent' or 'six_bit'")
        c, weight = self.config, self.embedding.weight
        if max_tokens > (most := c.max_positions):
            raise ValueError(f"max_tokens: {max_tokens}, expected at most max_positions = {most}")
        return kinds[kind](c.n_layers, batch, max_tokens, c.d_c, c.d_r, weight.dtype, weight.device)

    def describe(self) -> str:
        """One line: size, device, dtype and which algorithms will run."""
        c, weight = self.config, self.embedding.weight
        n = sum(p.numel() for p in self.parameters())
        W_gate = getattr(getattr(self.blocks[-1], "experts", None), "W_gate", weight)
        with torch.no_grad():
            twins = (choose_experts(weight[:1].expand(rows, -1), c.top_k, c.n_routed,
                                    c.expert_width) for rows in (4096, 1))
            many, one = (experts_form(twin, weight, W_gate) for twin in twins)
            read, decode = (attention_form(attend, weight, cached=True)
                            for attend in (attend_expanded, attend_absorbed))
        return (f"{n / 1e6:.2f}M parameters on {weight.device} in {str(weight.dtype)[6:]}; "
                f"prompt: {read.__name__}, {many.__name__}; "
                f"decode: {decode.__name__}, {one.__name__}")

    def _start(self, tokens: Tensor, cache: Cache | None) -> _Pass:
        c, (B, T) = self.config, _check_tokens(tokens, self.config.vocab)
        positions = torch.arange(T, device=tokens.device)[None]
        S = T
        if cache is not None:
            if cache.batch != B:
                raise ValueError(f"cache: made for {cache.batch} sequences, got {B}")
            positions = cache.positions(T)                               # (B, T)
            S += max(cache.lengths)
        if S > (end := c.max_positions):
            raise ValueError(f"tokens: position {S - 1}, expected below max_positions = {end}")
        magnitude = 1.0
        frequencies = rope_frequencies(c.d_r, c.rope_theta)
        if c.yarn_factor is not None:
            frequencies = yarn_frequencies(c.d_r, c.rope_theta, c.yarn_factor, c.yarn_beta_fast,
                                           c.yarn_beta_slow, c.yarn_original_positions)
            magnitude = rope_magnitude(c.yarn_factor, c.yarn_mscale, c.yarn_mscale_all_dim)
        cos, sin = rope_tables(positions, frequencies, magnitude)        # (B or 1, T, d_r/2)
        absorb = cache is not None and absorbed_is_cheaper(T, S, c.d_h, c.d_r, c.d_v, c.d_c)
        attend = attend_absorbed if absorb else attend_expanded
        if absorb and isinstance(cache, SixBitCache):
            attend, cache = attend_packed, cache.packed
        attend = attention_form(attend, self.embedding.weight, cache is not None)
        return _Pass(cos, sin, attend, cache)

    def _blocks(self, tokens: Tensor, run: _Pass) -> Tensor:
        h = self.embedding(tokens)                                       # (B, T, d)
        again = round(self.recompute * len(self.blocks)) if self.training else 0
        for i, block in enumerate(self.blocks):
            h = checkpoint(block, h, run, use_reentrant=False) if i < again else block(h, run)
        return h


def _check_tokens(tokens: Tensor, vocab: int) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)}, expected (batch, tokens)")
    _check_ids("tokens", tokens, vocab)
    return tokens.shape[0], tokens.shape[1]


def _check_ids(name: str, ids: Tensor, vocab: int, ignored: int = 0) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: dtype {ids.dtype}, expected int64 or int32")
    low, high = (int(x) for x in ids.where(ids != ignored, 0).aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"{name}: id {low if low < 0 else high}, expected 0 to {vocab - 1}")

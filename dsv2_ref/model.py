# SPDX-License-Identifier: MIT
"""The assembly: embedding, blocks, head. The mathematics is in attention/ and moe/.

Two doors. `losses(tokens, targets)` is the training one: the language-model loss, the balance
losses of every layer, token dropping. `hidden(tokens, cache)` is the other, and `model(tokens,
cache)` its logits: a prompt is read through expanded attention, decoding goes through absorbed
attention on the latent cache. forms.py chooses between the equal algorithms, once a pass;
`describe` says what it chooses.

A model may be a range of layers, a stage of a pipeline: `embed` is the first stage's part,
`through` everyone's, `finish` the last one's.

What is checked: shapes and dtypes always; the values of ids on a CPU. On another device that
would wait for it. There an id outside the vocabulary makes its sequence's logits, or the loss, NaN,
which whoever reads the sampled token or the loss is told.

Shapes: B batch, T new tokens, S = cached + new tokens, N = B·T flat tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import Cache, LatentCache
from dsv2_ref.attention.mla import is_its_weight
from dsv2_ref.attention.rope import (
    rope_frequencies,
    rope_magnitude,
    rope_tables,
    yarn_frequencies,
)
from dsv2_ref.block import Block, Pass, Traffic
from dsv2_ref.config import Config
from dsv2_ref.cross_entropy import IGNORED, cross_entropy, linear_cross_entropy
from dsv2_ref.forms import Forms, choose, describe_fp8, kernels_serve, writing
from dsv2_ref.moe.experts import experts_loop, experts_padded

CACHES = {"latent": LatentCache, "six_bit": SixBitCache}
WAITING = experts_loop, experts_padded       # on a GPU, for how many slots each expert has


@dataclass
class Losses:
    """Losses in nats per token, each a scalar tensor; the balance losses summed over layers."""

    language: Tensor
    expert: Tensor
    device: Tensor
    communication: Tensor
    load: list[Traffic] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        return self.language + self.expert + self.device + self.communication


class DeepSeekV2(nn.Module):
    """DeepSeek-V2 of any size.  `model(tokens, cache=None)` gives logits (B, T, vocab).

    `layers`: those that are here, None for all of them. `held`: the routed experts whose weights
    are here, None for all; `across` then makes, of the forms for one process, those for all ranks.
    """

    def __init__(
        self, config: Config, layers: range | None = None, held: range | None = None
    ) -> None:
        super().__init__()
        c = self.config = config
        self.layers = range(c.n_layers) if layers is None else layers
        if not 0 <= self.layers.start < self.layers.stop <= c.n_layers or self.layers.step != 1:
            raise ValueError(f"layers: {self.layers}, expected a part of range(0, {c.n_layers})")
        self.first, self.last = self.layers.start == 0, self.layers.stop == c.n_layers
        self.recompute = 0.0     # share of the blocks whose activations are made again in training
        self.across: Callable[[Forms], Forms] | None = None
        if self.first or (self.last and c.tie_embeddings):      # a tied matrix has two owners
            self.embedding = nn.Embedding(c.vocab, c.d)
        self.blocks = nn.ModuleList(Block(c, layer, held) for layer in self.layers)
        if self.last:
            self.norm = nn.RMSNorm(c.d, eps=c.norm_eps)
            self.head = nn.Linear(c.d, c.vocab, bias=False)
            if c.tie_embeddings:
                self.head.weight = self.embedding.weight
        for weight in self.parameters():
            if weight.ndim > 1:              # the norms stay at one
                nn.init.normal_(weight, std=c.init_std)

    @property
    def like(self) -> Tensor:
        """A weight of the stream's device and dtype."""
        return self.embedding.weight if self.first else self.blocks[0].norm_attention.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, vocab); appends to `cache` and advances it."""
        h = self.hidden(tokens, cache)
        return self.head(h)

    def hidden(self, tokens: Tensor, cache: Cache | None = None,
               lengths: Sequence[int] | None = None) -> Tensor:
        """tokens (B, T) -> what the head reads, (B, T, d).

        With a cache, `lengths` says how many of the T tokens of each sequence are real, the rest
        being padding on the right whose output means nothing; None means all of them.
        """
        if lengths is not None and cache is None:
            raise ValueError("lengths: given without a cache, expected None")
        h = self.embed(tokens)
        run = self.start(tokens.shape, cache, lengths)
        try:
            h, _, _ = self.through(h, run)
            if cache is not None:
                cache.advance()
        except BaseException:
            if cache is not None:
                cache.undo()
            raise
        return self.finish(h)

    def losses(
        self, tokens: Tensor, targets: Tensor, protected: Tensor | None = None,
        with_load: bool = False,
    ) -> Losses:
        """tokens, targets (B, T) -> Losses; target t is the token after token t, -100 counts not.

        In training mode the balance losses are taken and slots over a device's budget dropped,
        except in the sequences that `protected` (B,) bool names. In eval mode neither happens.
        `with_load` fills `.load`, one entry per MoE layer.
        """
        h = self.embed(tokens)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: shape {tuple(targets.shape)}, expected the tokens' "
                             f"{tuple(tokens.shape)}")
        if protected is not None and (protected.shape, protected.dtype) != (tokens.shape[:1],
                                                                            torch.bool):
            raise ValueError(f"protected: {protected.dtype} of shape {tuple(protected.shape)}, "
                             f"expected bool {tuple(tokens.shape[:1])}, one per sequence")
        run = replace(self.start(tokens.shape), learns=self.training, protected=protected,
                      with_load=with_load)
        h, balance, load = self.through(h, run)
        return Losses(self.language_loss(h, targets), *balance.unbind(), load)

    def language_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """h (B, T, d) after the last layer, targets (B, T) -> mean cross entropy in nats."""
        targets, known = _checked_ids("targets", targets, self.config.vocab, IGNORED)
        h, targets = self.finish(h).flatten(0, 1), targets.flatten()     # (N, d), (N,)
        language = self.language(h, targets)
        if known is not None:
            language = language.masked_fill(~known.all(), torch.nan)
        return language

    def language(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of what the head makes of h (N, d) and targets (N,), in nats."""
        if is_its_weight(self.head):
            return linear_cross_entropy(h, self.head.weight, targets)
        return cross_entropy(self.head(h), targets)      # an adapter or a bias: all logits at once

    def new_cache(self, batch: int, max_tokens: int, kind: str = "latent") -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens`, read in the model's dtype."""
        if kind not in CACHES:
            raise ValueError(f"kind: {kind!r}, expected 'latent' or 'six_bit'")
        c, like = self.config, self.like
        if max_tokens > (most := c.max_positions):
            raise ValueError(f"max_tokens: {max_tokens}, expected at most max_positions = {most}")
        return writing(CACHES[kind](len(self.blocks), batch, max_tokens, c.d_c, c.d_r, like.dtype,
                                    like.device))

    def describe(self) -> str:
        """One line: size, device, dtype and which algorithms will run, by door."""
        n = sum(p.numel() for p in self.parameters())
        words = [f"training: {self._forms(8, 512, 512).names()}"]
        with torch.no_grad():
            words += [f"prompt: {self._forms(1, 4096, 4096, 'latent').names()}",
                      f"decode: {self._forms(1, 1, 4096, 'latent').names()}"]
            words += describe_fp8(self, self.like)
        if self.step_is_static():
            words += ["generation: steps in a CUDA graph"]
        return (f"{n / 1e6:.2f}M parameters on {self.like.device} in "
                f"{str(self.like.dtype)[6:]}; " + "; ".join(words))

    def step_is_static(self) -> bool:
        """Whether a decode step asks the device for nothing, so that a CUDA graph can hold it."""
        with torch.no_grad():
            return (kernels_serve(self.like) and self.across is None and self.first and self.last
                    and not torch.is_autocast_enabled(self.like.device.type)
                    and self._forms(1, 1, 4096, "latent").experts not in WAITING)

    def _forms(self, B: int, T: int, S: int, cached: str | None = None) -> Forms:
        routed = [block for block in self.blocks if self.config.is_moe(block.layer)]
        W_gate = routed[0].experts.W_gate if routed else None
        return choose(self.config, self.like, B, T, S, cached, W_gate, self.across is None)

    def start(
        self, shape: Sequence[int], cache: Cache | None = None, lengths: Sequence[int] | None = None
    ) -> Pass:
        """Begin a pass of tokens (B, T): rotations and forms; with a cache, room for them in it."""
        c, (B, T), device = self.config, shape, self.like.device
        if cache is None:
            positions, S = torch.arange(T, device=device)[None], T
            end = T
        else:
            if cache.batch != B:
                raise ValueError(f"cache: made for {cache.batch} sequences, got {B}")
            counts = [T] * B if lengths is None else lengths
            positions = cache.positions(T, lengths)                      # (B, T)
            end = max(old + new for old, new in zip(cache.lengths, counts, strict=True))
            S = max(cache.lengths) + T
        if end > c.max_positions:
            raise ValueError(f"tokens: position {end - 1}, expected below max_positions = "
                             f"{c.max_positions}")
        # not kept while torch exports: its tensors stand for others and hold no numbers
        rope = _rope.__wrapped__ if torch.compiler.is_exporting() else _rope
        cos, sin = rope_tables(positions, *rope(c, device))              # (B or 1, T, d_r/2)
        exact = torch.promote_types(self.like.dtype, torch.float32)      # cast once, not per layer
        cos, sin = cos.to(exact), sin.to(exact)
        forms = self._forms(B, T, S, None if cache is None else cache.kind)
        if self.across is not None:
            forms = self.across(forms)
        reads = cache is not None and forms.reads_positions
        return Pass(cos, sin, forms, cache, positions=positions if reads else None)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> h (B, T, d): where the first layer begins."""
        if not self.first:
            raise ValueError(f"layers: {self.layers}, expected those from 0 on to read tokens")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens: shape {tuple(tokens.shape)}, expected (batch, tokens)")
        tokens, known = _checked_ids("tokens", tokens, self.config.vocab)
        h = self.embedding(tokens)                                       # (B, T, d)
        return h if known is None else h.masked_fill(~known[..., None], torch.nan)

    def through(self, h: Tensor, run: Pass) -> tuple[Tensor, Tensor, list[Traffic]]:
        """h (B, T, d) -> h after these layers; their balance losses (3,); the traffic of each."""
        again = round(self.recompute * len(self.blocks)) if self.training else 0
        balance, load = torch.zeros(3, device=h.device), []
        for i, block in enumerate(self.blocks):
            if i < again:
                h, its_balance, traffic = checkpoint(block, h, run, i, use_reentrant=False)
            else:
                h, its_balance, traffic = block(h, run, i)
            if its_balance is not None:
                balance = balance + its_balance
            if traffic is not None:
                load.append(traffic)
        return h, balance, load

    def finish(self, h: Tensor) -> Tensor:
        """h after the last layer -> what the head reads."""
        if not self.last:
            raise ValueError(f"layers: {self.layers}, expected the last ones to end a pass")
        return self.norm(h)


@lru_cache(maxsize=64)
def _rope(c: Config, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies (d_r/2,) fp64 on a device, and what cos and sin are multiplied by."""
    with torch.inference_mode(False):        # or they could not be used in training
        if c.yarn_factor is None:
            return rope_frequencies(c.d_r, c.rope_theta).to(device), 1.0
        frequencies = yarn_frequencies(c.d_r, c.rope_theta, c.yarn_factor, c.yarn_beta_fast,
                                       c.yarn_beta_slow, c.yarn_original_positions)
        magnitude = rope_magnitude(c.yarn_factor, c.yarn_mscale, c.yarn_mscale_all_dim)
        return frequencies.to(device), magnitude


def _checked_ids(
    name: str, ids: Tensor, vocab: int, ignored: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """ids as int64, and which are known: None where all are, as was seen on a CPU."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: dtype {ids.dtype}, expected int64 or int32")
    ids = ids.long()
    known = (ids >= 0) & (ids < vocab)
    if ignored is not None:
        known = known | (ids == ignored)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        if not known.all():
            raise ValueError(f"{name}: id {int(ids[~known][0])}, expected 0 to {vocab - 1}")
        return ids, None
    return ids.where(known, 0 if ignored is None else ignored), known

# SPDX-License-Identifier: MIT
"""What a decoder keeps of the tokens it has read: per-head keys and values, or one latent row.

Multi-head attention keeps, for every token and layer, n_h keys and n_h values: 2·n_h·d_h numbers.
Grouped-query attention (GQA) keeps n_g of each, multi-query attention (MQA) one. Multi-head latent
attention (MLA) keeps one row [c_kv ; k_r] of d_c + d_r numbers, whatever the number of heads
(section 2.1.2 and Table 1): the latent after its norm, and the shared RoPE key after its rotation.
Both are stored as they will be used, so nothing is recomputed for an old token.

Memory is allocated once, for `max_tokens` tokens of each sequence. Sequences of one batch may have
different lengths: token t of the new ones goes to position lengths[b] + t, and `advance` says how
many of them were real. Padding is written too and then overwritten by the next real token, so the
only mask that attention needs is "key position <= query position".

The famous mistake is to cache the *expanded* keys and values of MLA, n_h·(d_h + d_r + d_v) numbers
a token: 71 times more for V2.

How this file differs from others: 1. lengths are plain Python ints, so asking for them never
makes a GPU wait; 2. a cache is one tensor, `nbytes` is what that tensor occupies, and
`nbytes_per_token` is the formula; a test compares the two.

Shapes: B batch, T new tokens, S = cached + new tokens, l layers, n_kv key-value heads.
Copy with: nothing.  Needs: torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class _Cache:
    """Lengths and space, common to both caches; `store` is (l, B, max_tokens, ...)."""

    store: Tensor

    def __init__(self, batch: int, max_tokens: int) -> None:
        for name, value in (("batch", batch), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        self.max_tokens = max_tokens
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for every layer and all `max_tokens` of every sequence."""
        return self.store.untyped_storage().nbytes()

    @property
    def nbytes_per_token(self) -> int:
        """Bytes one token takes over all layers: the formula of Table 1 times the element size."""
        n_layers, per_layer = self.store.shape[0], self.store.shape[3:].numel()
        return n_layers * per_layer * self.store.element_size()

    def positions(self, new_tokens: int) -> Tensor:
        """Positions of the next `new_tokens` of each sequence: (B, T), on the cache's device."""
        self._check_room(new_tokens)
        start = torch.tensor(self.lengths, device=self.store.device)
        return start[:, None] + torch.arange(new_tokens, device=self.store.device)

    def advance(self, new_tokens: int | Sequence[int]) -> None:
        """Count the new tokens as read, once all layers have appended them."""
        if isinstance(new_tokens, int):
            new_tokens = [new_tokens] * self.batch
        if len(new_tokens) != self.batch:
            raise ValueError(f"lengths: {len(new_tokens)} given, expected {self.batch}, one a row")
        self.lengths = [old + new for old, new in zip(self.lengths, new_tokens, strict=True)]

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.lengths = [0] * self.batch

    def _check_room(self, new_tokens: int) -> None:
        if (fullest := max(self.lengths)) + new_tokens > self.max_tokens:
            raise ValueError(
                f"cache is full: {fullest} + {new_tokens} tokens, expected at most "
                f"max_tokens = {self.max_tokens}"
            )

    def _append(self, layer: int, rows: Tensor) -> Tensor:
        """Write rows (B, T, ...) behind the old ones; return the first S of them, a view."""
        start, new, rows = self.lengths, rows.shape[1], rows.detach()
        self._check_room(new)
        if min(start) == max(start):
            self.store[layer, :, start[0] : start[0] + new] = rows
        else:
            for b, first in enumerate(start):
                self.store[layer, b, first : first + new] = rows[b]
        return self.store[layer, :, : max(start) + new]


class LatentCache(_Cache):
    """MLA: one row [c_kv ; k_r] of d_c + d_r numbers a token and layer."""

    def __init__(
        self, n_layers: int, batch: int, max_tokens: int, d_c: int, d_r: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(batch, max_tokens)
        self.d_c = d_c
        # zeros, not empty: a masked row is multiplied by weight 0, and 0·NaN would still be NaN
        self.store = torch.zeros(n_layers, batch, max_tokens, d_c + d_r, dtype=dtype, device=device)

    def append(self, layer: int, c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
        """c_kv (B, T, d_c), k_r (B, T, d_r) -> those of all S tokens, as views of the cache."""
        rows = self._append(layer, torch.cat((c_kv, k_r), -1))               # (B, S, d_c+d_r)
        return rows[..., : self.d_c], rows[..., self.d_c :]


class PerHeadCache(_Cache):
    """MHA, GQA, MQA: n_kv keys and n_kv values of d_h numbers a token and layer."""

    def __init__(
        self, n_layers: int, batch: int, max_tokens: int, n_kv: int, d_h: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(batch, max_tokens)
        shape = (n_layers, batch, max_tokens, 2, n_kv, d_h)
        self.store = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, T, n_kv, d_h) -> those of all S tokens, as views of the cache."""
        both = self._append(layer, torch.stack((k, v), 2))                   # (B, S, 2, n_kv, d_h)
        return both[:, :, 0], both[:, :, 1]

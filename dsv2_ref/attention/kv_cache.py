# SPDX-License-Identifier: MIT
"""What a decoder keeps of the tokens it has read: per-head keys and values, or one latent row.

Multi-head attention keeps, for every token and layer, n_h keys and n_h values: 2·n_h·d_h numbers.
Grouped-query attention (GQA) keeps n_g of each, multi-query attention (MQA) one. Multi-head latent
attention (MLA) keeps one row [c_kv ; k_r] of d_c + d_r numbers, whatever the number of heads
(section 2.1.2 and Table 1): the latent after its norm, and the shared RoPE key after its rotation.
Both are stored as they will be used, so nothing is recomputed for an old token. The famous mistake
is to cache MLA's *expanded* keys and values, n_h·(d_h + d_r + d_v) numbers: 71 times more for V2.

One pass through the layers goes

    positions = cache.positions(T)          begins it: where the T new tokens of each sequence stand
    cache.write(layer, c_kv, k_r)           once for every layer
    rows = cache.rows(layer)                the rows of all S tokens, what `attend` takes
    cache.advance()                         ends it: the new tokens are old ones now

A layer written twice or not at all, a pass begun but not ended, tokens without room are refused.
`select`, `fork` and `release` are for many sequences. Any object with these methods is a cache.

Memory is allocated once, for `max_tokens` tokens of each sequence. Sequences of one batch may have
different lengths: new token t of sequence b stands at lengths[b] + t, and `counts` says how many of
the T are real. The others are padding on the right, which the next real token overwrites, so the
only mask that attention needs is "key position <= query position".

How this file differs from others: 1. lengths are Python ints, so asking never makes a GPU wait;
2. `nbytes` is what the tensors occupy, `nbytes_per_token` the formula; 3. a row has no gradient.

Shapes: B batch, T new tokens, S = cached + new tokens, l layers, n_kv key-value heads.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from kv_cache import LatentCache
    cache = LatentCache(n_layers=2, batch=3, max_tokens=40, d_c=24, d_r=6)
    for T in (8, 1):                             # a prompt, then a token
        positions = cache.positions(T)           # (B, T), for the rotations
        for layer in range(2):
            cache.write(layer, torch.randn(3, T, 24), torch.randn(3, T, 6))
            c_kv, k_r = cache.rows(layer)        # (B, S, d_c), (B, S, d_r): attend to these
        cache.advance()
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Pass(NamedTuple):
    """The new tokens of one pass through the layers."""

    T: int
    counts: list[int]            # real ones of each sequence
    positions: Tensor            # (B, T)
    in_line: bool                # all sequences are equally long, and the padding has room
    end: int                     # S
    places: Tensor               # (R,) slot·max_tokens + position, where a row is stored
    real: Tensor | None = None   # (R,) b·T + t, which rows these are; None for all


class Cache:
    """The protocol, and what dense caches share. `stores` are (l, B, max_tokens, ...) each."""

    kind = "latent"              # what `rows` gives
    fused: Callable[..., None] | None = None     # a kernel that does the rest of `write`

    def __init__(self, *stores: Tensor) -> None:
        for name, value in zip(("batch", "max_tokens"), stores[0].shape[1:3]):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        self.stores, self.max_tokens = stores, stores[0].shape[2]
        self.slots: list[int] | None = None            # of the stores; None for all of them
        self._lengths = [0] * stores[0].shape[1]       # by slot, shared by what `select` gives
        self._pass: _Pass | None = None
        self._written: set[int] = set()
        self._known: dict[str, tuple[list, Tensor]] = {}     # numbers, and their copy on the device

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence. May be set back: what comes after is written over."""
        return [self._lengths[slot] for slot in self._slots]

    @lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        for slot, n in zip(self._slots, self._numbers(lengths, self.max_tokens), strict=True):
            self._lengths[slot] = n
        self.undo()

    def _there(self, name: str, numbers: list) -> Tensor:
        """`numbers` on the device, uploaded where they are not those known there by that name."""
        if name not in self._known or self._known[name][0] != numbers:
            self._known[name] = numbers, torch.tensor(numbers, device=self.store.device).long()
        return self._known[name][1]

    def _numbers(self, numbers: Sequence[int], most: int) -> list[int]:
        numbers = [int(n) for n in numbers]
        if len(numbers) != self.batch or not all(0 <= n <= most for n in numbers):
            raise ValueError(f"lengths: {numbers}, expected {self.batch} numbers from 0 to {most}")
        return numbers

    @property
    def _slots(self) -> Sequence[int]:
        return range(len(self._lengths)) if self.slots is None else self.slots

    @property
    def batch(self) -> int:
        return len(self._slots)

    @property
    def store(self) -> Tensor:
        """The tensor of all rows, (l, B, max_tokens, ...); the first one where there are two."""
        return self.stores[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for every layer and all `max_tokens` of every sequence."""
        return sum(store.untyped_storage().nbytes() for store in self.stores)

    @property
    def nbytes_per_token(self) -> int:
        """Bytes one token takes over all layers: the formula of Table 1 times the element size."""
        return sum(store[:, 0, 0].nbytes for store in self.stores)

    def positions(self, new_tokens: int, counts: Sequence[int] | None = None) -> Tensor:
        """Begin a pass of T = `new_tokens` a sequence, `counts` of each real: positions (B, T)."""
        counts = self._numbers([new_tokens] * self.batch if counts is None else counts, new_tokens)
        if self._written and (self._pass.T, self._pass.counts) != (new_tokens, counts):
            raise ValueError(f"positions: {self._pass.T} tokens are written and not counted, "
                             "expected advance() at the end of their pass")
        if not self._written:
            self._pass = self._begin(new_tokens, counts)
        return self._pass.positions

    def _begin(self, T: int, counts: list[int]) -> _Pass:
        start = self.lengths
        for old, new in zip(start, counts, strict=True):
            if old + new > self.max_tokens:
                raise ValueError(f"cache is full: {old} + {new} tokens, expected at most "
                                 f"max_tokens = {self.max_tokens}")
        in_line = len(set(start)) == 1 and start[0] + T <= self.max_tokens
        at = start[0] if in_line else self._there("lengths", start)[:, None]
        positions = (at + torch.arange(T, device=self.store.device)).expand(self.batch, T)
        ends = [old + (T if in_line else new) for old, new in zip(start, counts, strict=True)]
        first = self._there("first", [slot * self.max_tokens for slot in self._slots])
        places, real = (first[:, None] + positions).flatten(), None
        if not in_line and counts != [T] * self.batch:
            real = self._there("real", [b * T + t for b, n in enumerate(counts) for t in range(n)])
            places = places[real]
        return _Pass(T, counts, positions, in_line, max(ends), places, real)

    @property
    def queries(self) -> Tensor | None:
        """Positions (B, T) of this pass for the mask; None where they are the last T of all S."""
        return None if self._pass is None or self._pass.in_line else self._pass.positions

    def write(self, layer: int, *parts: Tensor) -> None:
        """Store what a layer made of its new tokens, (B, T, ...) each, as `stored` takes it."""
        if not 0 <= layer < len(self.store):
            raise ValueError(f"layer: {layer}, expected 0 to {len(self.store) - 1}")
        if layer in self._written:
            raise ValueError(f"layer: {layer} is written a second time, expected advance() before")
        if self._pass is None:
            self.positions(parts[0].shape[1])
        stores, parts = [store[layer] for store in self.stores], [x.detach() for x in parts]
        if self.fused is not None:
            self.fused(*parts, *stores, self._pass.places, self._pass.real)
        else:
            for store, rows in zip(stores, self.stored(*parts), strict=True):
                self._put(store, rows)
        self._written.add(layer)

    def stored(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """What a layer made of its new tokens, as rows of each store."""
        return parts

    def _put(self, store: Tensor, rows: Tensor) -> None:
        run = self._pass
        if rows.shape != (expected := (self.batch, run.T, *store.shape[2:])):
            raise ValueError(f"rows: shape {tuple(rows.shape)}, expected {expected}")
        # under autocast new rows are in its dtype
        if rows.dtype != store.dtype and not torch.is_autocast_enabled(rows.device.type):
            raise ValueError(f"rows: {rows.dtype}, expected {store.dtype}, the cache's dtype")
        if run.in_line and self.slots is None:
            store[:, run.end - run.T : run.end] = rows                       # in one piece: faster
        else:
            rows = rows.to(store.dtype).flatten(0, 1)[slice(None) if run.real is None else run.real]
            store.flatten(0, 1).index_copy_(0, run.places, rows)             # (R, ...)

    def rows(self, layer: int) -> tuple[Tensor, ...]:
        """What `attend` takes of a layer: its rows up to the last new token, (B, S, ...) each."""
        end = max(self.lengths) if self._pass is None else self._pass.end
        slots = slice(None) if self.slots is None else self._there("slots", self.slots)
        return tuple(store[layer][slots, :end] for store in self.stores)

    def advance(self, new_tokens: int | Sequence[int] | None = None) -> None:
        """End the pass: `new_tokens` of each sequence are read, None: as `positions` was told."""
        if self._pass is None:
            raise ValueError("advance: no pass was begun, expected positions() or write() first")
        if missing := sorted(set(range(len(self.store))) - self._written):
            raise ValueError(f"layer: {missing[0]} is not written, expected all before advance()")
        counts = [new_tokens] * self.batch if isinstance(new_tokens, int) else new_tokens
        counts = self._numbers(self._pass.counts if counts is None else counts, self._pass.T)
        old, ragged = self.lengths, not self._pass.in_line
        self.lengths = [n + more for n, more in zip(old, counts, strict=True)]
        if ragged and old == self._known.get("lengths", (None,))[0]:         # the copy is read
            there = self._known["lengths"][1] + self._there("counts", counts)
            self._known["lengths"] = self.lengths, there

    def undo(self) -> None:
        """Forget the pass that was begun."""
        self._pass, self._written = None, set()

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.release(range(self.batch))

    def release(self, slots: Sequence[int]) -> None:
        """Forget the tokens of these sequences; others may have their room."""
        self.lengths = [0 if b in slots else n for b, n in enumerate(self.lengths)]

    def select(self, slots: Sequence[int]) -> "Cache":
        """A cache of some of the sequences, on the same memory: what it reads is read here too."""
        chosen = copy.copy(self)
        chosen._known, chosen.slots = {}, [self._slots[slot] for slot in slots]
        if not slots or len(set(chosen.slots)) != len(chosen.slots):
            raise ValueError(f"slots: {list(slots)}, expected different sequences, at least one")
        chosen.undo()
        return chosen

    def fork(self, slots: int | Sequence[int], n: int) -> "Cache":
        """A new cache in which each of these sequences stands n times, side by side."""
        slots = [slots] if isinstance(slots, int) else slots
        at = [self._slots[slot] for slot in slots for _ in range(n)]
        forked = copy.copy(self)
        forked.slots, forked._known, forked._lengths = None, {}, [self._lengths[i] for i in at]
        forked.stores = tuple(s.new_zeros(s.shape[0], len(at), *s.shape[2:]) for s in self.stores)
        end = max(forked._lengths)
        for new, old in zip(forked.stores, self.stores, strict=True):
            new[:, :, :end] = old[:, at, :end]
        forked.undo()
        return forked


class LatentCache(Cache):
    """MLA: one row [c_kv ; k_r] of d_c + d_r numbers a token and layer."""

    def __init__(
        self, n_layers: int, batch: int, max_tokens: int, d_c: int, d_r: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        # zeros, not empty: a masked row is multiplied by weight 0, and 0·NaN would still be NaN
        shape = (n_layers, max(batch, 0), max(max_tokens, 0), d_c + d_r)
        super().__init__(torch.zeros(shape, dtype=dtype, device=device))
        self.d_c = d_c

    def stored(self, c_kv: Tensor, k_r: Tensor) -> tuple[Tensor]:
        return (torch.cat((c_kv, k_r), -1),)                                 # (B, T, d_c+d_r)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """c_kv (B, S, d_c) and k_r (B, S, d_r), as views of the cache."""
        (rows,) = super().rows(layer)                                        # (B, S, d_c+d_r)
        return rows[..., : self.d_c], rows[..., self.d_c :]


class PerHeadCache(Cache):
    """MHA, GQA, MQA: n_kv keys and n_kv values of d_h numbers a token and layer."""

    kind = "per_head"

    def __init__(
        self, n_layers: int, batch: int, max_tokens: int, n_kv: int, d_h: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, max(batch, 0), max(max_tokens, 0), 2, n_kv, d_h)
        super().__init__(torch.zeros(shape, dtype=dtype, device=device))

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (torch.stack((k, v), 2),)                                     # (B, T, 2, n_kv, d_h)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, n_kv, d_h), as views of the cache."""
        (both,) = super().rows(layer)                                        # (B, S, 2, n_kv, d_h)
        return both[:, :, 0], both[:, :, 1]


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        raise ValueError("gradient: asked for through a cache, expected a pass without one")


def without_gradient(u: Tensor) -> Tensor:
    """u, what attention made of cached rows: going backward through it is refused.

    Old tokens have no graph, so the gradient would be that of the new rows alone, without a word.
    """
    return _WithoutGradient.apply(u) if u.requires_grad else u

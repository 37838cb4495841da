# SPDX-License-Identifier: MIT
"""A cache in pages: rows of all sequences in one pool, found through a table of each sequence.

A dense cache sets aside room for the longest text that each sequence may become, and most of it
stays empty. Here memory is cut into pages of, say, 16 tokens. A sequence takes a page when it needs
one; its table says which pages hold its tokens 0-15, 16-31 and so on, and at most one page of it is
part empty. (Kwon et al. 2023, "PagedAttention". DeepSeek-V2's section 3.2.3 says that its cache
of few bytes a token is what allows large batches; pages are what lets every byte count.)

    pool      page 0   page 1   page 2   page 3   page 4   page 5   ...
    tables    sequence A: 4 1 0      sequence B: 4 1 5      (page 4, page 1: the same first tokens)

A page that is full can serve every sequence that begins with the same tokens. It is found by its
name, (the page before it, its tokens): a dict compares names and not only their hashes, so two
different texts never share. Pages count who uses them; one that nobody uses is free, and its name
is forgotten, since the weights may have changed when the same text comes again.

Three rules keep this simple:
  1. Only full pages are shared, and a sequence only goes on in pages of its own. So nothing is
     copied when a token is written; a part of a page is copied when a sequence is forked, or set
     back into a page that others use.
  2. A page may be named before it is written, if it is written in the same pass or an earlier one:
     every layer writes the rows of all sequences before it reads any. So requests with one prompt
     share it even where they begin in the same pass.
  3. A page is cleared when it is taken: NaN in a row that is masked would still make NaN.

The pool is a dense cache whose "sequences" are the pages, so packing, bytes and formulas are those
of kv_cache.py and cache_quant.py. A third kind, for comparison, keeps what MLA does not: the keys
and values of all heads.

Shapes: B sequences, T new tokens, S = cached + new tokens, P pages of a sequence.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import Cache, LatentCache, _Pass
from dsv2_ref.attention.mla import expand, matrix
from dsv2_ref.forms import writing
from dsv2_ref.model import DeepSeekV2


class Pages:
    """Who uses which page, and what the full ones hold."""

    def __init__(self, n: int) -> None:
        self.free = list(range(n - 1, -1, -1))         # the next one last
        self.users = [0] * n
        self.named: dict[tuple, int] = {}              # (page before or None, tokens) -> page
        self._name_of: dict[int, tuple] = {}

    @property
    def left(self) -> int:
        return len(self.free)

    @property
    def in_use(self) -> int:
        return len(self.users) - len(self.free)

    def take(self) -> int:
        """A free page. ValueError if there is none."""
        if not self.free:
            raise ValueError(f"cache is full: all {len(self.users)} pages are in use, expected a "
                             "free one")
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, page: int) -> int:
        self.users[page] += 1
        return page

    def give(self, page: int) -> None:
        """One user less. A page without any is free, and its name is forgotten."""
        self.users[page] -= 1
        if self.users[page] == 0:
            self.forget(page)
            self.free.append(page)

    def forget(self, page: int) -> None:
        """The name of a page, which nobody finds any more."""
        self.named.pop(self._name_of.pop(page, None), None)

    def name(self, page: int, name: tuple) -> None:
        """What a full page holds, unless it has a name or another page this one."""
        if page not in self._name_of and name not in self.named:
            self.named[name] = page
            self._name_of[page] = name


class Paged(Cache):
    """The protocol of kv_cache.Cache on pages. `stores` are (l, pages, page, ...) each.

    There is a slot for a sequence in each page, so slots never run out before pages do. The model
    reads through `select(slots)`.
    """

    def __init__(self, *stores: Tensor) -> None:
        super().__init__(*stores)
        n, self.page = stores[0].shape[1:3]
        self.max_tokens = n * self.page
        self.slots = list(range(n))                    # never None: rows do not lie side by side
        self.pages = Pages(n)
        self.tables: dict[int, list[int]] = {}         # by slot
        self._table: Tensor | None = None              # of the pass

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def read(self, slot: int) -> int:
        """Tokens that a slot has read."""
        return self._lengths[slot]

    # ---- pages of one sequence

    def grow(self, slot: int, n: int) -> None:
        """Room for n tokens. ValueError where pages run out."""
        table = self.tables.setdefault(slot, [])
        while len(table) < self.pages_for(n):
            table.append(self.pages.take())
            for store in self.stores:
                store[:, table[-1]] = 0

    def name(self, slot: int, tokens: Sequence[int], n: int) -> None:
        """Let others find the full pages of the first n tokens: they hold them, or will."""
        table = self.tables[slot]
        for i in range(self._lengths[slot] // self.page, n // self.page):
            self.pages.name(table[i], self._name(table, i, tokens))

    def find(self, tokens: Sequence[int], slot: int | None = None) -> list[int]:
        """Pages that hold the next tokens of a sequence, or of a new one, written by others.

        At least one token is left to be read, without which there would be no logits.
        """
        before, last = len(self.tables.get(slot, ())), (len(tokens) - 1) // self.page
        if before >= last:                             # as whenever one decodes
            return []
        table = list(self.tables.get(slot, ()))        # a page without a name leads nowhere
        for i in range(before, last):
            page = self.pages.named.get(self._name(table, i, tokens))
            if page is None:
                break
            table.append(page)
        return table[before:]

    def share(self, slot: int, found: Sequence[int]) -> None:
        """Take over the pages that were found: their tokens count as read."""
        self.tables.setdefault(slot, []).extend(map(self.pages.share, found))
        self._lengths[slot] += len(found) * self.page

    def _name(self, table: list[int], i: int, tokens: Sequence[int]) -> tuple:
        before = table[i - 1] if i else None           # in use as long as this one: no other text
        return before, tuple(tokens[i * self.page : (i + 1) * self.page])

    def _cut(self, slot: int, n: int) -> None:
        """Keep n tokens of a sequence; a page that becomes part empty becomes its own."""
        table = self.tables.get(slot, [])
        while len(table) > self.pages_for(n):
            self.pages.give(table.pop())
        if n % self.page == 0:
            return
        old = table[-1]
        if self.pages.users[old] == 1:
            self.pages.forget(old)
            return
        table[-1] = self.pages.take()
        for store in self.stores:
            store[:, table[-1]] = store[:, old]
        self.pages.give(old)

    # ---- the protocol

    @Cache.lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        for slot, n in zip(self._slots, self._numbers(lengths, self.max_tokens), strict=True):
            if n < self._lengths[slot]:
                self._cut(slot, n)
            self._lengths[slot] = n
        self.undo()

    def _begin(self, T: int, counts: list[int]) -> _Pass:
        start, device = self.lengths, self.stores[0].device
        for slot, old, new in zip(self._slots, start, counts, strict=True):
            self.grow(slot, old + new)
        ends = [old + new for old, new in zip(start, counts, strict=True)]
        end, tables = max(1, *ends), [self.tables[slot] for slot in self._slots]
        self._table = self._padded(end)
        places = [tables[b][at // self.page] * self.page + at % self.page
                  for b, n in enumerate(counts) for at in range(start[b], start[b] + n)]
        places = torch.tensor(places, dtype=torch.int64, device=device)
        positions = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)
        if counts == [T] * self.batch:
            return _Pass(T, counts, positions, len(set(start)) == 1, end, places)
        real = [b * T + t for b, n in enumerate(counts) for t in range(n)]
        real = torch.tensor(real, dtype=torch.int64, device=device)
        return _Pass(T, counts, positions, False, end, places, real)

    def _padded(self, end: int) -> Tensor:
        """The tables of all sequences for `end` tokens, (B, P); short ones repeat their last page.

        Not another's page: what is masked must be finite, and is only sure of one's own rows.
        """
        P, tables = self.pages_for(end), [self.tables.get(slot) or [0] for slot in self._slots]
        rows = [table[:P] + table[-1:] * (P - len(table)) for table in tables]
        return torch.tensor(rows, device=self.stores[0].device)

    def rows(self, layer: int) -> tuple[Tensor, ...]:
        """The rows of a layer up to the last new token, (B, S, ...) each, gathered."""
        if self._pass is None:
            end = max(1, *self.lengths)
            table = self._padded(end)
        else:
            end, table = self._pass.end, self._table
        return tuple(self._gather(store[layer], table)[:, :end] for store in self.stores)

    @staticmethod
    def _gather(store: Tensor, table: Tensor) -> Tensor:
        """store (pages, page, ...) -> (B, P·page, ...)."""
        rows = store.index_select(0, table.flatten())                    # (B·P, page, ...)
        return rows.view(len(table), -1, *store.shape[2:])

    def release(self, slots: Sequence[int]) -> None:
        """Forget these sequences; pages that nobody else uses are free."""
        for slot in (self._slots[slot] for slot in slots):
            self._lengths[slot] = 0
            for page in reversed(self.tables.pop(slot, [])):
                self.pages.give(page)
        self.undo()

    def fork(self, slot: int, n: int) -> "Cache":
        """n empty slots that share what `slot` has read, all but the part of a last page."""
        slot = self._slots[slot]
        new = [s for s in range(len(self._lengths)) if not self.tables.get(s)][:n]
        if len(new) < n:
            raise ValueError(f"n: {n}, expected at most {len(new)} slots that are empty")
        read = self._lengths[slot]
        for s in new:
            pages = self.tables[slot][: self.pages_for(read)]
            self.tables[s] = [self.pages.share(page) for page in pages]
            self._lengths[s] = read
            self._cut(s, read)                         # the part of a page becomes its own
        forked = copy.copy(self)
        forked.slots = new
        forked.undo()
        return forked


class PagedLatentCache(LatentCache, Paged):
    """Latent rows; made as LatentCache is, with a page for a sequence."""


class PagedSixBitCache(SixBitCache, Paged):
    """Packed words and their scales; made as SixBitCache is."""


class PagedExpandedCache(Paged):
    """What MLA avoids: keys of d_h + d_r and values of d_v numbers for every head."""

    kind = "expanded"

    def __init__(self, model: DeepSeekV2, pages: int, page: int) -> None:
        c, like = model.config, model.like
        self.attentions = [block.attention for block in model.blocks]
        super().__init__(*(torch.zeros(len(model.blocks), pages, page, c.n_h, width,
                                       dtype=like.dtype, device=like.device)
                           for width in (c.d_h + c.d_r, c.d_v)))

    def write(self, layer: int, c_kv: Tensor, k_r: Tensor) -> None:
        """c_kv (B, T, d_c), k_r (B, T, d_r) of a layer's new tokens: expanded, then stored."""
        a = self.attentions[layer]
        W_UK, W_UV = (matrix(W, a.d_c, c_kv).unflatten(0, (a.n_h, -1)) for W in (a.W_UK, a.W_UV))
        super().write(layer, *expand(c_kv.detach(), k_r.detach(), W_UK, W_UV))


def paged_cache(model: DeepSeekV2, pages: int, page: int, kind: str = "latent") -> Paged:
    """An empty pool. kind: "latent", "six_bit", or "per_head" for the keys and values of heads."""
    if kind == "per_head":
        return PagedExpandedCache(model, pages, page)
    kinds = {"latent": PagedLatentCache, "six_bit": PagedSixBitCache}
    if kind not in kinds:
        raise ValueError(f"cache: {kind!r}, expected 'latent', 'six_bit' or 'per_head'")
    c, like = model.config, model.like
    return writing(kinds[kind](len(model.blocks), pages, page, c.d_c, c.d_r, like.dtype,
                               like.device))

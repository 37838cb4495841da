# SPDX-License-Identifier: MIT
"""Serving: many requests, one model, a fixed number of bytes for their caches.

A plain batch begins together and ends with its longest member. Here requests come and go at every
step ("continuous batching"; Yu et al. 2022, "Orca"):

    schedule   who takes part in the next pass, oldest first, and with how many tokens
    read       one pass of the model over these pieces, laid end to end (pieces.py)
    sample     one token for each request whose known tokens have now all been read

There is one kind of work only: a request knows some tokens (its prompt and what was drawn), and the
cache has read the first of them. Decoding reads the one that is missing, a prompt has many missing,
and a request that lost its pages all of them. So reading prompts in chunks, mixed with decoding,
and starting again are no cases of their own.

Memory. A request is let in when there are free pages for all tokens that it knows, beside those
that others were let in for; the rest wait, in order of arrival. A request that could not even be
served alone is refused when it is added. When pages run out in decoding, the newest request gives
its own back and waits: it will be read again. So those that run are always the oldest ones, and the
oldest of all is never stopped.

Prompts that begin alike share full pages, even if they come in the same pass: see paged_cache.py.
The older of two is always ahead, so the newer one finds each page when it comes to it.

What a request draws depends on it alone: its logits (up to rounding, since other batches add up
otherwise), its own generator. Preemption changes nothing, since what was drawn stays drawn.

If the logits of a request are NaN, or its rows cannot be cached, that request ends with an error
that names it; `run()` raises it in its turn. Called again, it goes on with the others.

Shapes: B requests.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_ref.inference.generate import NOT_A_NUMBER, _check, _prompts, _room, _stops, sample
from dsv2_ref.inference.paged_cache import paged_cache
from dsv2_ref.inference.pieces import Pieces, alike, through_pieces
from dsv2_ref.model import DeepSeekV2


@dataclass
class Request:
    """What was asked for, and how far it is."""

    id: int
    tokens: list[int]                    # those that are known: the prompt, then the new ones
    last: int                            # how many they will be at most
    temperature: float
    top_p: float
    stops: set[int]
    generator: torch.Generator
    slot: int | None = None              # in the cache; None while it waits


class RequestFailed(ValueError):
    """A request that ended without its tokens: `id` says which, `why` what was wrong."""

    def __init__(self, id: int, why: str) -> None:
        super().__init__(f"request {id}: {why}")
        self.id, self.why = id, why


class Engine:
    """Serves requests with one model and `memory_bytes` of pages.

    cache: "latent", "six_bit", or "per_head" (what MLA avoids, for comparison). page: tokens of a
    page. chunk: the most prompt tokens of a pass; more make prompts cheaper and the steps of those
    who are decoding longer.
    """

    def __init__(
        self, model: DeepSeekV2, memory_bytes: int, cache: str = "latent", page: int = 16,
        chunk: int = 512,
    ) -> None:
        if page < 1:
            raise ValueError(f"page: {page}, expected at least 1 token")
        if chunk < 1:
            raise ValueError(f"chunk: {chunk}, expected at least 1 token")
        one = paged_cache(model, 1, page, cache).nbytes
        if memory_bytes < one:
            raise ValueError(f"memory_bytes: {memory_bytes}, expected at least {one}, a page of "
                             f"{page} tokens")
        self.model, self.chunk = model, chunk
        self.cache = paged_cache(model, int(memory_bytes // one), page, cache)
        self._requests: dict[int, Request] = {}        # unfinished, the oldest first
        self._out: deque[tuple[int, int | RequestFailed, bool]] = deque()   # not yet yielded
        self._suspects: set[int] = set()               # read alone: a pass with them failed
        self._slots = list(range(self.cache.batch))    # free ones
        self._next = 0

    @property
    def pages_in_use(self) -> int:
        return self.cache.pages.in_use

    def add(
        self, tokens: Tensor | Sequence[int], max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, stop: int | Iterable[int] | None = None, seed: int | None = None,
    ) -> int:
        """Ask for the continuation of a prompt; its id. Arguments are those of `generate`.

        seed: the same draws as `generate(…, generator=torch.Generator().manual_seed(seed))`; None:
        one from torch's own generator. ValueError for what can never be served.
        """
        (prompt,), stops = _prompts([tokens]), _stops(self.model, stop)
        _check(max_new_tokens, temperature, top_p)
        read, vocab = _room(self.model, [prompt], max_new_tokens), self.model.config.vocab
        for i in prompt:
            if not 0 <= i < vocab:
                raise ValueError(f"tokens: id {i}, expected 0 to {vocab - 1}")
        if read > self.cache.max_tokens:
            raise ValueError(f"tokens: {len(prompt)} and {max_new_tokens} new ones need room for "
                             f"{read}, expected at most {self.cache.max_tokens}, which fit into "
                             f"{self.cache.nbytes} bytes of pages")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        generator = torch.Generator(self.model.like.device).manual_seed(seed)
        id, self._next = self._next, self._next + 1
        self._requests[id] = Request(id, prompt, len(prompt) + max_new_tokens, temperature, top_p,
                                     stops, generator)
        return id

    def cancel(self, id: int) -> None:
        """End a request: nothing more of it is yielded. One that has ended already may be named."""
        if not 0 <= id < self._next:
            raise ValueError(f"id: {id}, expected one that add() gave")
        self._end(id)
        self._out = deque(entry for entry in self._out if entry[0] != id)

    def run(self) -> Iterator[tuple[int, int, bool]]:
        """Yields (id, token, finished) until every request has finished.

        `add` and `cancel` may be called meanwhile. Whoever stops reading loses nothing: run() goes
        on where the last one stood. RequestFailed for a request whose logits are no numbers.
        """
        while self._out or self._requests:
            if not self._out:
                self._step()
                continue
            id, token, finished = self._out.popleft()
            if isinstance(token, RequestFailed):
                raise token
            yield id, token, finished

    # ---- one step

    @torch.inference_mode()
    def _step(self) -> None:
        pieces = []
        try:
            pieces = self._schedule()
            self._draw(*self._read(pieces))
        except BaseException as error:
            for request in reversed(self._running()):  # named pages were not written: forget all
                self._stop(request)
            if not isinstance(error, ValueError) or not pieces:
                raise
            self._suspects = {request.id for request, _ in pieces}
            if len(pieces) == 1:
                self._fail(pieces[0][0], str(error))

    def _running(self) -> list[Request]:
        return [r for r in self._requests.values() if r.slot is not None]

    def _missing(self, request: Request) -> int:
        """Tokens that are known and not read."""
        return len(request.tokens) - self.cache.read(request.slot)

    def _schedule(self) -> list[tuple[Request, int]]:
        """Who takes part in the next pass and with how many tokens; groups stand together.

        Oldest first: one that does not fit lets none pass. Those who decode always take part.
        """
        pieces, budget = [], self.chunk
        only = min(self._suspects, default=None)
        for r in [self._requests[only]] if only is not None else list(self._requests.values()):
            if r.slot is None and not self._let_in(r):
                break
            self.cache.share(r.slot, self.cache.find(r.tokens, r.slot))
            missing = self._missing(r)
            n = 1 if missing == 1 else min(missing, budget)
            if n == 0:                                 # its chunk comes later
                continue
            if not self._grow(r, n):
                break
            pieces.append((r, n))
            budget -= n if missing > 1 else 0
        if not pieces and self._suspects:              # it does not fit beside those read before
            self._suspects.clear()
            return self._schedule()
        return sorted(pieces, key=lambda piece: alike(self.cache, piece[0].slot, piece[1]))

    def _let_in(self, request: Request) -> bool:
        """Give it a slot if there are pages for all tokens that it knows, beside others' own."""
        cache = self.cache
        while True:
            found = cache.find(request.tokens)
            promised = sum(cache.pages_for(len(r.tokens)) - len(cache.tables[r.slot])
                           for r in self._running())
            if promised + cache.pages_for(len(request.tokens)) - len(found) <= cache.pages.left:
                break
            if not self._stop_newest(request):
                return False
        request.slot = self._slots.pop()
        cache.share(request.slot, found)
        return True

    def _grow(self, request: Request, n: int) -> bool:
        """Pages for its next n tokens, those of newer requests if need be; else it stops itself."""
        cache, slot = self.cache, request.slot
        n += cache.read(slot)
        while cache.pages_for(n) - len(cache.tables[slot]) > cache.pages.left:
            if not self._stop_newest(request):
                self._stop(request)
                return False
        cache.grow(slot, n)
        cache.name(slot, request.tokens, n)
        return True

    def _stop_newest(self, request: Request) -> bool:
        """Stop the newest that runs, if it is newer than this one."""
        running = self._running()
        if not running or running[-1].id <= request.id:
            return False
        self._stop(running[-1])
        return True

    def _stop(self, request: Request) -> None:
        """It gives its pages back and waits: what it knows will be read again."""
        self.cache.release([request.slot])
        self._slots.append(request.slot)
        request.slot = None

    def _read(self, pieces: list[tuple[Request, int]]) -> tuple[list[Request], Tensor]:
        """One pass of the model over the next n tokens of each request.

        Those of whom all is read now, the oldest first, and h (B, d) of the last token of each.
        """
        ids, ends = [], []
        for r, n in pieces:
            read = self.cache.read(r.slot)
            ids += r.tokens[read : read + n]
            ends.append(len(ids) - 1)
        h = through_pieces(self.model, ids, Pieces(self.cache, [(r.slot, n) for r, n in pieces]))
        done = sorted(((r, end) for (r, _), end in zip(pieces, ends, strict=True)
                       if self._missing(r) == 0), key=lambda each: each[0].id)
        rows = torch.tensor([end for _, end in done], dtype=torch.int64, device=h.device)
        return [r for r, _ in done], self.model.finish(h[rows])

    def _draw(self, requests: list[Request], h: Tensor) -> None:
        """A token of each request, from what the head reads, h (B, d)."""
        if not requests:
            return
        logits = self.model.head(h)                                          # (B, vocab)
        ids = sample(logits, 0.0, 1.0)                                       # (B,)
        for b, r in enumerate(requests):
            if r.temperature:
                ids[b] = sample(logits[b : b + 1], r.temperature, r.top_p, r.generator)[0]
        for r, id in zip(requests, ids.tolist(), strict=True):               # the only wait
            self._suspects.discard(r.id)
            if id == NOT_A_NUMBER:
                self._fail(r, "logits: NaN or infinite, expected numbers; weights, a token id or "
                           "the cache are damaged")
                continue
            r.tokens.append(id)
            finished = id in r.stops or len(r.tokens) == r.last
            self._out.append((r.id, id, finished))
            if finished:
                self._end(r.id)

    def _fail(self, request: Request, why: str) -> None:
        self._out.append((request.id, RequestFailed(request.id, why), True))
        self._end(request.id)

    def _end(self, id: int) -> None:
        request = self._requests.pop(id, None)
        self._suspects.discard(id)
        if request is not None and request.slot is not None:
            self._stop(request)

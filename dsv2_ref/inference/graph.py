# SPDX-License-Identifier: MIT
"""A decode step of which nothing depends on the length, so that a CUDA graph can hold it.

A decode step of V2-Lite is 650 launches (counted by tests/rehearsal), each of which costs the host
time. A CUDA graph is the list of launches, made once: replaying it is one call. But it holds
addresses and shapes, not what Python would compute. So, in `DecodeStep`

  ids, positions  and which sequences still run are tensors that stay where they are; the step
                  itself advances the positions, on the device
  rows            are all that the cache has room for, and positions are the mask. The kernels read
                  only what positions see; the naive twins compute for all and mask
  a write         is one to places that the device computes. A sequence that has ended may have no
                  room, and none of its rows may be written over: it writes the row of one that runs
                  again, to its place
  lengths         are counted on the host too, so plain passes may go on from the cache, and when
                  they have changed the lengths, the positions are uploaded anew

On another device the step is the same and runs eagerly. No graph was captured on a GPU yet: what
was seen is that the step waits for nothing and launches the same whatever the length.

What cannot be captured: whatever asks the device for a number. These are experts without a kernel
(fp64, no Triton), for they are cut by how many slots each has; experts on several ranks; and a
cache in pages, whose tables are made on the host. Under autocast weights are cast in every step,
and what autocast keeps of them does not outlive it. `DeepSeekV2.step_is_static` says which it is.
Weights are read where they lay when the step was captured: changed in place they are seen, moved
or replaced they are not. Sampling is not in the graph: it draws, and its parameters vary.

Shapes: B batch.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv2_ref.attention.kv_cache import Cache, _Pass
from dsv2_ref.model import CACHES, DeepSeekV2

WORTH = 16      # steps; a guess, not timed: before the first one come two more and the capture


def worth(model: DeepSeekV2, cache: Cache, steps: int) -> bool:
    """Whether that many steps are to be replayed."""
    return (steps >= WORTH and type(cache) in CACHES.values() and cache.slots is None
            and model.step_is_static())


class _Static:
    """A cache as `model.hidden` takes one, for passes of one token a sequence."""

    def __init__(self, cache: Cache, most: int) -> None:
        self.cache, self.kind, self.batch, self.most = cache, cache.kind, cache.batch, most
        self.lengths = [most - 1] * cache.batch      # what room is checked and forms are chosen for
        device = cache.store.device
        slots = range(cache.batch) if cache.slots is None else cache.slots
        self.first = torch.tensor([slot * cache.max_tokens for slot in slots], device=device)
        self.queries = torch.zeros_like(self.first)[:, None]                     # (B, 1) positions
        self.counts, self.source = torch.zeros_like(self.queries), torch.zeros_like(self.first)
        self.write, self.rows, self.undo = cache.write, cache.rows, cache.undo

    def positions(self, new_tokens: int, counts: Sequence[int] | None = None) -> Tensor:
        places = (self.first + self.queries[:, 0])[self.source]                  # (B,)
        self.cache._pass = _Pass(1, [1] * self.batch, self.queries, False, self.most, places,
                                 self.source)
        return self.queries

    def advance(self) -> None:
        self.queries += self.counts
        self.undo()


class DecodeStep:
    """`step = DecodeStep(model, cache)`; then `h = step(ids, counts)` appends a token of each.

    The cache is latent or six-bit, and a selection of sequences may be taken. capture: None for a
    CUDA graph where `model.step_is_static()`.
    """

    def __init__(self, model: DeepSeekV2, cache: Cache, capture: bool | None = None) -> None:
        if type(cache) not in CACHES.values():
            raise ValueError(f"cache: {type(cache).__name__}, expected one of "
                             f"{', '.join(kind.__name__ for kind in CACHES.values())}")
        self.model, self.cache = model, cache
        self.capture = model.step_is_static() if capture is None else capture
        self.most = min(cache.max_tokens, model.config.max_positions)
        self._static = _Static(cache, self.most)
        self._ids = torch.zeros_like(self._static.queries)                       # (B, 1)
        self._lengths: list[int] | None = None       # what is on the device
        self._counts: list[int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._h: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, ids: Tensor, counts: Sequence[int]) -> Tensor:
        """ids (B,), counts: 1, or 0 for a sequence that has ended -> what the head reads, (B, d).

        The token of an ended sequence is not counted, and its output means nothing. The result is
        overwritten by the next step.  ValueError where a sequence has no room.
        """
        self._prepare(ids, counts)
        if not self.capture:
            self._h = self._run()
        else:
            if self._graph is None:
                self._record()
            self._graph.replay()
        self._lengths = list(map(operator.add, self._lengths, counts))
        self.cache.lengths = self._lengths
        return self._h

    def _prepare(self, ids: Tensor, counts: Sequence[int]) -> None:
        """Check, and bring to the device what it does not know."""
        cache, static = self.cache, self._static
        counts, read = list(counts), cache.lengths
        if len(counts) != cache.batch or not set(counts) <= {0, 1} or 1 not in counts:
            raise ValueError(f"counts: {counts}, expected {cache.batch} numbers, 1 or 0, not all 0")
        if ids.shape != (cache.batch,):
            raise ValueError(f"ids: shape {tuple(ids.shape)}, expected ({cache.batch},)")
        if cache._written:
            raise ValueError("cache: a pass was begun, expected advance() at its end")
        if (longest := max(map(operator.add, read, counts))) > self.most:
            raise ValueError(f"cache is full: {longest} tokens after this step, expected at most "
                             f"{self.most}")
        self._ids.copy_(ids[:, None])
        if read != self._lengths:
            static.queries.copy_(torch.tensor(read)[:, None])
            self._lengths = read
        if counts != self._counts:
            runs = counts.index(1)
            source = [b if n else runs for b, n in enumerate(counts)]
            static.counts.copy_(torch.tensor(counts)[:, None])
            static.source.copy_(torch.tensor(source))
            self._counts = counts

    def _run(self) -> Tensor:
        return self.model.hidden(self._ids, self._static)[:, 0]

    def _record(self) -> None:
        """Run on a side stream, where kernels are compiled and libraries set up; then capture."""
        with torch.cuda.device(self._ids.device):
            before, side = self._static.queries.clone(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):                   # the same rows, written to the same places
                    self._run()
                    self._static.queries.copy_(before)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._h = self._run()
            self._graph = graph                      # capturing ran nothing

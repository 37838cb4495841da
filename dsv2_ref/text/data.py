# SPDX-License-Identifier: MIT
"""Documents as ids, and packed batches in an order that can be resumed.

A document is `bos text eos` wherever it is trained on or judged. Packing: documents become one long
array `bos text eos bos text eos ...`, cut into windows of `sequence` tokens without padding. A
window may hold the end of one document and the beginning of the next; attention is not masked
between them, the marks are there for the model to see.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from dsv2_ref.text.corpora import Corpus, Document
from dsv2_ref.text.tokenizer import TextTokenizer


def some_of(corpus: Corpus, n_bytes: float) -> Corpus:
    """The corpus with about so many bytes to train on: whole documents, drawn once and for all.

    A run of 5M tokens reads 20 MB; a tokenizer and codes for hundreds of MB would take longer.
    """
    if not n_bytes > 0:
        raise ValueError(f"text_bytes: {n_bytes}, expected a number > 0")
    taken, total = [], 0
    for i in np.random.default_rng(0).permutation(len(corpus.train)):
        if total >= n_bytes:
            break
        taken.append(i)
        total += len(corpus.train[i].text.encode())
    return replace(corpus, train=[corpus.train[i] for i in sorted(taken)])


def marked(documents: Sequence[Document], tokenizer: TextTokenizer) -> Iterator[list[int]]:
    """Ids of each document in order, from its begin mark to its end mark: `bos text eos`."""
    for start in range(0, len(documents), 256):  # bounds the lists of Python ints held at once
        texts = [document.text for document in documents[start : start + 256]]
        for ids in tokenizer.encode_batch(texts):
            yield [tokenizer.bos, *ids, tokenizer.eos]


def encode(documents: Sequence[Document], tokenizer: TextTokenizer) -> np.ndarray:
    """(tokens,) all marked documents, one after the other; uint16 where ids fit, else int32."""
    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.int32
    pieces = [np.array(ids, dtype) for ids in marked(documents, tokenizer)]
    return np.concatenate([np.zeros(0, dtype), *pieces])


def fingerprint(tokens: np.ndarray, *more: str) -> int:
    """Of an array of ids, and of words; 52 bits, exact in any JSON reader."""
    digest = hashlib.sha256(" ".join([tokens.dtype.str, str(len(tokens)), *more]).encode())
    digest.update(np.ascontiguousarray(tokens))
    return int(digest.hexdigest()[:13], 16)


def check_same_data(mine: dict[str, int], state: dict[str, int]) -> None:
    """ValueError unless `state` is a whole position in the data that `mine` is one in."""
    missing = [key for key in mine if not isinstance(state.get(key), int)]
    if missing:
        raise ValueError(f"the saved data position has no integer {', '.join(missing)}")
    means = {"fingerprint": "tokens (corpus or tokenizer)", "sequence": "", "seed": ""}
    for key, meaning in means.items():
        if state[key] != mine[key]:
            raise ValueError(f"cannot resume: {meaning or key} changed since the state was saved "
                             f"({key} {state[key]}, now {mine[key]})")


class Shuffled:
    """Numbers of rows without end, each epoch in an order of its own, drawn from (seed, epoch).

    The position counts rows, so the batch size may change at any step; a batch at the end of an
    epoch goes on into the next one. `sequence`, the most tokens of a row, and `fingerprint` say
    what the rows are.
    """

    def __init__(self, n: int, sequence: int, seed: int, fingerprint: int) -> None:
        self.n, self.sequence, self.seed, self.fingerprint = n, sequence, seed, fingerprint
        self._enter(epoch=0, place=0)

    def _enter(self, epoch: int, place: int) -> None:
        self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        self.epoch, self.place = epoch, place

    def next_rows(self, batch: int) -> list[int]:
        """The numbers of the next `batch` rows."""
        rows: list[int] = []
        while len(rows) < batch:
            if self.place == self.n:
                self._enter(self.epoch + 1, 0)
            rows.append(int(self._order[self.place]))
            self.place += 1
        return rows

    def state(self) -> dict[str, int]:
        """Plain ints: the position, and what it is a position in."""
        return {"epoch": self.epoch, "place": self.place, "seed": self.seed,
                "sequence": self.sequence, "fingerprint": self.fingerprint}

    def load(self, state: dict[str, int]) -> None:
        """Go on from `state` bit for bit. ValueError if it belongs to other rows."""
        check_same_data(self.state(), state)
        if not 0 <= state["place"] <= self.n or state["epoch"] < 0:
            raise ValueError(f"place: {state['place']} of epoch {state['epoch']}, expected 0 to "
                             f"{self.n}")
        self._enter(state["epoch"], state["place"])


class PackedBatches:
    """Batches without end of (tokens, targets), int64 (B, T): targets are the tokens one later.

    Each epoch cuts the array at its own phase and visits the windows in its own order, both drawn
    from (seed, epoch). The first token of a window is read without context; since the cuts move,
    it is another token in the next epoch. What lies before the phase and behind the last whole
    window, under T tokens each, waits for another epoch. The position counts windows, so the batch
    size may change at any step; a batch at the end of an epoch goes on into the next one.
    """

    def __init__(self, tokens: np.ndarray, batch: int, sequence: int, seed: int):
        for field, value in (("batch", batch), ("sequence", sequence)):
            if value < 1:
                raise ValueError(f"{field} is {value}, expected at least 1")
        if len(tokens) < sequence + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few, expected at least sequence + 1 = {sequence + 1}"
            )
        self.tokens, self.batch, self.sequence, self.seed = tokens, batch, sequence, seed
        self.fingerprint = fingerprint(tokens)
        self._enter(epoch=0, window=0)

    def _enter(self, epoch: int, window: int) -> None:
        generator = np.random.default_rng([self.seed, epoch])
        T, spare = self.sequence, len(self.tokens) - 1 - self.sequence
        phase = int(generator.random() * min(T, spare + 1))
        n_windows = (len(self.tokens) - 1 - phase) // T
        self._starts = phase + T * np.argsort(generator.random(n_windows), kind="stable")
        self.epoch, self.window = epoch, window

    def next_batch(self, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `batch` windows (default: the constructor's)."""
        batch = self.batch if batch is None else batch
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        rows = []
        while len(rows) < batch:
            if self.window == len(self._starts):
                self._enter(self.epoch + 1, 0)
            start = self._starts[self.window]
            rows.append(self.tokens[start : start + self.sequence + 1])
            self.window += 1
        both = torch.from_numpy(np.stack(rows).astype(np.int64))                # (B, T+1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def state(self) -> dict[str, int]:
        """Plain ints: the position, and what it is a position in."""
        return {
            "epoch": self.epoch,
            "window": self.window,
            "seed": self.seed,
            "sequence": self.sequence,
            "fingerprint": self.fingerprint,
        }

    def load(self, state: dict[str, int]) -> None:
        """Go on from `state` bit for bit. ValueError if it belongs to other data or windows."""
        check_same_data(self.state(), state)
        self._enter(state["epoch"], state["window"])
        if not 0 <= self.window <= len(self._starts):
            raise ValueError(f"window is {self.window}, expected 0 to {len(self._starts)}")

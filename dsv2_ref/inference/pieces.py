# SPDX-License-Identifier: MIT
"""One pass of the model over pieces of different lengths, laid end to end: nothing is padded.

Who decodes brings one token to a pass, who reads a prompt hundreds. As rows of one rectangle most
of it would be padding, and every padded token costs what a real one does. So the N tokens are one
long row, as far as a token alone matters: embedding, norms, projections, experts. To the model each
is a sequence of its own with one new token, (N, 1).

Only attention has to know better. Pieces that are `alike` are a group, an ordinary pass of (B, T)
through the cache, with the form that is the cheapest for it: absorbed for decoding, expanded for
prompts. A group reads as many rows of each as of its longest, so those that have read much and
those that have read little are not in one. Every layer writes the rows of all groups before it
reads any, so a piece may attend to what another one of the same pass writes.

Shapes: N tokens of a pass, B sequences of a group, T new tokens, S = cached + new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv2_ref.forms import attention_form
from dsv2_ref.inference.paged_cache import Paged
from dsv2_ref.model import DeepSeekV2

FEW = 4                                  # pages, below which parting a group brings nothing


def alike(cache: Paged, slot: int, n: int) -> tuple[int, int]:
    """Equal for pieces of one group: n new tokens, and pages of the same power of two."""
    return n, max(cache.pages_for(cache.read(slot) + n), FEW).bit_length()


class Pieces:
    """A pass through `cache` with the methods of a cache: what the model is given as one."""

    queries = None                       # each group has its own

    def __init__(self, cache: Paged, pieces: Sequence[tuple[int, int]]) -> None:
        """pieces: (slot, number of new tokens), those that are `alike` next to each other."""
        slots: dict[tuple[int, int], list[int]] = {}
        for slot, n in pieces:
            slots.setdefault(alike(cache, slot, n), []).append(slot)
        self.groups = [(cache.select(those), T) for (T, _), those in slots.items()]
        self.kind, self.sizes = cache.kind, [group.batch * T for group, T in self.groups]
        self.lengths = [old + t for group, T in self.groups for old in group.lengths
                        for t in range(T)]
        self.batch = len(self.lengths)

    def positions(self, new_tokens: int, counts: Sequence[int] | None = None) -> Tensor:
        """Begin the pass of every group: where the tokens stand, (N, 1)."""
        return torch.cat([group.positions(T).flatten() for group, T in self.groups])[:, None]

    def write(self, layer: int, c_kv: Tensor, k_r: Tensor) -> None:
        """c_kv (N, 1, d_c), k_r (N, 1, d_r): of all groups, before any is read."""
        parts = zip(self.groups, c_kv.split(self.sizes), k_r.split(self.sizes), strict=True)
        for (group, T), *rows in parts:
            group.write(layer, *(x.view(group.batch, T, -1) for x in rows))

    def rows(self, layer: int) -> tuple[list[tuple[Tensor, ...]]]:
        """The rows of each group, for `attend`."""
        return ([group.rows(layer) for group, _ in self.groups],)

    def advance(self) -> None:
        for group, _ in self.groups:
            group.advance()

    def attend(self, model: DeepSeekV2) -> Callable[..., Tensor]:
        """The form of this pass: every group by its own."""
        forms = [attention_form(model.config, model.like, T, max(group.lengths) + T, self.kind)
                 for group, T in self.groups]

        def attend_pieces(
            q_c: Tensor, q_r: Tensor, rows: list[tuple[Tensor, ...]], W_UK: Tensor, W_UV: Tensor,
            scale: float, positions: Tensor | None = None,
        ) -> Tensor:
            """q_c (N, 1, n_h, d_h), q_r (N, 1, n_h, d_r), rows of each group -> (N, 1, n_h, d_v)"""
            out = []
            parts = zip(self.groups, forms, rows, q_c.split(self.sizes), q_r.split(self.sizes),
                        strict=True)
            for (group, T), form, its_rows, *q in parts:
                q = (x.view(group.batch, T, *x.shape[2:]) for x in q)
                o = form(*q, *its_rows, W_UK, W_UV, scale, group.queries)
                out.append(o.flatten(0, 1))
            return torch.cat(out)[:, None]

        return attend_pieces


def through_pieces(model: DeepSeekV2, ids: Sequence[int], pieces: Pieces) -> Tensor:
    """The new tokens of all pieces, N ids -> h (N, d) after the last layer, before the norm."""
    tokens = torch.tensor(ids, device=model.like.device)[:, None]            # (N, 1)
    h = model.embed(tokens)                                                  # (N, 1, d)
    run = model.start(tokens.shape, pieces)
    run = replace(run, forms=replace(run.forms, attend=pieces.attend(model)))
    h, _, _ = model.through(h, run)
    pieces.advance()
    return h[:, 0]

# SPDX-License-Identifier: MIT
"""Exercises of notebook 21: pages, a shared prompt, passes with two places, batches in memory."""

from collections import deque
from collections.abc import Sequence

from dsv2_ref import cost
from dsv2_ref.config import LITE
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.inference.paged_cache import Pages

LENGTHS = (2, 9, 3, 8, 2, 9)            # new tokens of six requests
LEFT, CONTEXT = 100 * 10**9, 16 * 1024  # bytes for caches, tokens of a request


def pages_of(tokens: int, page: int) -> int:
    return -(-tokens // page)


def shared_pages(requests: int = 5, prompt: int = 40, own: int = 9, page: int = 16) -> int:
    """Pages in use when requests with one prompt and an own question each have been read."""
    pages, tables = Pages(100), []
    for _ in range(requests):
        full = prompt // page
        tables.append([pages.share(p) for p in tables[0][:full]] if tables else
                      [pages.take() for _ in range(full)])
        while len(tables[-1]) < pages_of(prompt + own, page):
            tables[-1].append(pages.take())
    return pages.in_use


def passes(lengths: Sequence[int] = LENGTHS, places: int = 2) -> list[int]:
    """Static batches in order of arrival, and continuous batching: a place is filled at once."""
    static = sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    waiting, running, continuous = deque(lengths), [], 0
    while waiting or running:
        while waiting and len(running) < places:
            running.append(waiting.popleft())
        running = [n - 1 for n in running if n > 1]
        continuous += 1
    return [static, continuous]


def batches() -> list[int]:
    """Requests of V2-Lite that fit with expanded keys and values, latents, packed latents."""
    latent = cost.latent_elements(LITE.n_layers, LITE.d_c, LITE.d_r)
    sizes = (2 * cost.expanded_elements(LITE), 2 * latent, 6 * latent // 8 + 4 * LITE.n_layers)
    return [LEFT // (size * CONTEXT) for size in sizes]


exercises = Exercises({
    1: Function(pages_of, [(1, 16), (16, 16), (17, 16), (100, 16), (100, 1), (31, 8)],
                "The last page may be part empty, but it is a whole page: round up."),
    2: Value(shared_pages, "Full pages of the prompt are stored once. What comes behind them, "
             "the rest of the prompt and the own question, each request has for itself.",
             known=[(20, "so many entries stand in the tables; some name the same page"),
                    (8, "only full pages are shared: 8 tokens of the prompt are in no full one")]),
    3: Value(passes, "Static: pairs (2, 9), (3, 8), (2, 9), each as long as its longer one. "
             "Continuous: write down for each place when it becomes free.",
             known=[([26, 17], "33 tokens on two places are 16.5, if the last two end together; "
                     "do they?"),
                    ([33, 17], "two at once, not one after the other")]),
    4: Value(batches, "Bytes of a token over all 27 layers: 2 · 16 · (128 + 64 + 128), 2 · 576, "
             "or 436 for each. Times 16,384, and round down.",
             known=[([596, 5298, 13998], "these are numbers of one layer's caches")]),
})

# SPDX-License-Identifier: MIT
"""Answers to 05_cache."""

import torch


def with_a_loop(model, cache, ids, pieces):
    logits, start = [], 0
    for n in pieces:
        logits.append(model(ids[:, start : start + n], cache))
        start += n
    return torch.cat(logits, dim=1)


def written_into(model, cache, ids, pieces):
    logits = torch.empty(*ids.shape, model.config.vocab, dtype=torch.float64)
    for n in pieces:
        start = cache.lengths[0]
        logits[:, start : start + n] = model(ids[:, start : start + n], cache)
    return logits


def read_twice(model, cache, ids, pieces):
    model(ids, cache)
    return model(ids)


def whole_after_all(model, cache, ids, pieces):
    return model(ids, cache)


def token_by_token(model, cache, ids, pieces):
    return torch.cat([model(token, cache) for token in ids.split(1, 1)], 1)


def as_a_while(memory, weights, context, bytes_per_token):
    n = 0
    while weights + (n + 1) * context * bytes_per_token <= memory and n < 10**6:
        n += 1
    return n


RIGHT = {
    1: [27 * 436 * 2**17 / 2**30, 1.44, torch.tensor(1.437), 1.4371],
    2: [lambda m, w, s, n: max(0, (m - w) // (s * n)),
        lambda m, w, s, n: 0 if w > m else int((m - w) / (s * n)),
        as_a_while],
    3: [lambda model, cache, ids, pieces: torch.cat(
            [model(piece, cache) for piece in ids.split(pieces, 1)], 1),
        with_a_loop, written_into],
    4: [100 * (1 - 34_560 * 6 / (194_560 * 8)), 86.7, torch.tensor(86.68)],
}
WRONG = {
    1: [27 * 1152 * 2**17 / 2**30, 27 * 436 * 128e3 / 1e9, 436, 27 * 432 * 2**17 / 2**30,
        60 * 436 * 2**17 / 2**30, 27 * 436 * 2**17 / 1e9, "1.44"],
    2: [lambda m, w, s, n: (m - w) // (s * n), lambda m, w, s, n: m // (s * n),
        lambda m, w, s, n: max(0, (m - w) / (s * n)),
        lambda m, w, s, n: max(0, m // (s * n) - w),
        lambda m, w, s, n: max(0, -(-(m - w) // (s * n))),
        lambda m, w, s: 0, 3],
    3: [lambda model, cache, ids, pieces: model(ids),                              # no cache
        lambda model, cache, ids, pieces: torch.cat([model(p) for p in ids.split(pieces, 1)], 1),
        lambda model, cache, ids, pieces: [model(p, cache) for p in ids.split(pieces, 1)][-1],
        lambda model, cache, ids, pieces: torch.stack(
            [model(p, cache) for p in ids.split(1, 1)], 1),
        lambda model, cache, ids, pieces: torch.cat(
            [model(p, cache) for p in ids.split(pieces, 1)], 1).softmax(-1),
        lambda model, cache, ids, pieces: torch.cat(
            [model(p, cache) for p in ids.split(pieces)], 1),                      # along B
        read_twice, whole_after_all, token_by_token],
    4: [93.3, 82.2, 13.3, 0.867, 62.5, 82.0, 87.5, "86.7"],
}

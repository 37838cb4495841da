# SPDX-License-Identifier: MIT
"""What `bench serve` is made of: requests, who answers them, a full house, a queue, a clock.

Seconds are those of `clock`: with one thread on a CPU the time that this process computed, which
others on the machine do not lengthen; else time as it passes.

Shapes: B sequences with S cached tokens each.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dsv2_ref import cost
from dsv2_ref.config import Config
from dsv2_ref.inference.engine import Engine

PERCENTILES = (50, 90, 99)


class Ask(NamedTuple):
    prompt: list[int]
    new: int             # tokens asked for, all of them drawn


def asks(vocab: int, n: int, prompt: tuple[int, int], new: tuple[int, int]) -> list[Ask]:
    """n requests of random tokens; both lengths are drawn evenly, from the first to the last."""
    draw = random.Random(n)
    return [Ask([draw.randrange(vocab) for _ in range(draw.randint(*prompt))], draw.randint(*new))
            for _ in range(n)]


def clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_rounds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each way, all of them in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            start = clock()
            work()
            best[name] = min(best[name], clock() - start)
    return best


def speeds(device: str, dtype: torch.dtype, numbers: int, width: int) -> dict[str, float]:
    """Of a sum of so many fp32 `numbers`, and of a product of random matrices of this width."""
    x = torch.ones(numbers, device=device)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = in_rounds({"read": x.sum, "matmul": lambda: a @ b}, 6)
    return {"read_gb_per_s": x.nbytes / best["read"] / 1e9,
            "matmul_gflops": 2 * width**3 / best["matmul"] / 1e9}


# ---- who answers

def served(engine: Engine, asked: Sequence[Ask]) -> list[list[int]]:
    """The engine's answers to requests that all come at once."""
    new = {engine.add(ask.prompt, ask.new, stop=()): [] for ask in asked}
    for id, token, _ in engine.run():
        new[id].append(token)
    return list(new.values())


def padded(theirs: Any, asked: Sequence[Ask], batch: int) -> list[list[int]]:
    """transformers' `generate`, `batch` prompts at a time, padded on the left.

    Each batch goes on until its longest answer is there; what is too much of others is cut off.
    """
    answers, device = [], theirs.device
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        longest = max(len(ask.prompt) for ask in some)
        spare = [longest - len(ask.prompt) for ask in some]
        ids = torch.tensor([[0] * n + ask.prompt for n, ask in zip(spare, some, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(spare)[:, None]).long()
        new = theirs.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=False, pad_token_id=0,
            eos_token_id=None, max_new_tokens=max(ask.new for ask in some))[:, longest:]
        answers += [row[: ask.new] for row, ask in zip(new.tolist(), some, strict=True)]
    return answers


def their_engine(transformers: Any, theirs: Any, asked: Sequence[Ask]) -> str | None:
    """transformers' continuous batching on these requests: the error, or None if they are served.

    It has its own small number of pages here, or it would take nearly all memory there is.
    """
    few = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    settings = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0)
    log = logging.getLogger("ContinuousBatchingLogger")        # it would print the error
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        results = theirs.generate_batch([ask.prompt for ask in asked], settings, few, warmup=False)
        errors = [result.error for result in results.values() if result.error]
        return errors[0] if errors else None if results else "no result"
    except Exception as error:                         # whatever it is: it is what is recorded
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        log.setLevel(level)


# ---- a full house

def filled(engine: Engine, asked: Sequence[Ask]) -> int:
    """Let in as many as fit, their prompts read but for the last token; how many they are.

    The rows are random: what a row holds does not change the time. All others are cancelled.
    """
    ids, cache = [engine.add(ask.prompt, ask.new, stop=()) for ask in asked], engine.cache
    for request in list(engine._requests.values()):
        if not engine._let_in(request):
            break
        cache.grow(request.slot, len(request.tokens) - 1)
        cache._lengths[request.slot] = len(request.tokens) - 1
    n = len(engine._running())
    for id in ids[n:]:
        engine.cancel(id)
    for store in cache.stores:
        if store.dtype == torch.int16:
            store.random_(-(2**15), 2**15 - 1)         # six-bit words: any bits are codes
        elif engine.cache.kind == "six_bit":
            store.fill_(0.05)                          # their scales
        else:
            store.normal_()
    return n


def cache_bytes(c: Config, kind: str, itemsize: int) -> float:
    """Bytes of one cached token over all layers, by the config alone.

    Six bits a number and two bf16 scales a row; else numbers of `itemsize` bytes.
    """
    if kind == "six_bit":
        return cost.cache_bytes(cost.latent_elements(c.n_layers, c.d_c, c.d_r), 6) + 4 * c.n_layers
    return itemsize * (cost.expanded_elements(c) if kind == "per_head"
                       else cost.latent_elements(c.n_layers, c.d_c, c.d_r))


def least_work(c: Config, B: int, S: int, kind: str, itemsize: int) -> dict[str, float]:
    """What a decode step of B sequences with S cached tokens must do: bytes read, FLOPs.

    Each weight that is used is read once, and of the routed experts those that B even draws of
    top_k name; each cached row once.
    """
    p, chosen = cost.parameters(c), 1 - (1 - c.top_k / c.n_routed) ** B
    weights = p.total - p.routed * (1 - chosen) - (0 if c.tie_embeddings else p.embedding)
    pairs = cost.pair_flops_expanded if kind == "per_head" else cost.pair_flops_absorbed
    return {"weight_bytes": itemsize * weights,
            "cache_bytes": B * S * cache_bytes(c, kind, itemsize),
            "flops": B * cost.forward_flops_per_token(c, S, pairs)}


# ---- a queue

def under_load(engine: Engine, asked: Sequence[Ask], rate: float) -> dict[str, Any]:
    """Requests that come by chance (Poisson), `rate` a second: what each of them waits for.

    In milliseconds: from arrival to the first token, and from a token to the next. Time is the
    engine's: it goes on by what a step takes, and where nobody is there, on to the next arrival.
    """
    draw, now, at = random.Random(0), 0.0, 0.0
    coming: deque[tuple[float, Ask]] = deque()
    for ask in asked:
        at += draw.expovariate(rate)
        coming.append((at, ask))
    last: dict[int, float] = {}                        # of each request: arrival, then last token
    first, between, started, run = [], [], set(), engine.run()
    while True:
        while coming and coming[0][0] <= now:
            at, ask = coming.popleft()
            last[engine.add(ask.prompt, ask.new, stop=())] = at
        start = clock()
        item = next(run, None)
        if item is not None:
            now += clock() - start
            id = item[0]
            (between if id in started else first).append(1e3 * (now - last[id]))
            started.add(id)
            last[id] = now
        elif coming:
            now, run = max(now, coming[0][0]), engine.run()
        else:
            return {"requests": len(first), "seconds": now, "first_token_ms": percentiles(first),
                    "next_token_ms": percentiles(between)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    q = torch.tensor([p / 100 for p in PERCENTILES]).double()
    found = torch.tensor(values).double().quantile(q).tolist()
    return {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}

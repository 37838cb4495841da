# SPDX-License-Identifier: MIT
"""Serving: the engine beside what one would do without it, and batch bought with cache bytes.

  sixteen   16 requests of 64 + 64 tokens: the engine with each cache, a plain batch of `generate`
            (all begin and end together, the best case of it), and `generate` one after the other
  mixed     64 requests of mixed lengths: the engine beside transformers on the same weights.
            transformers' continuous batching is tried, and its error is what is recorded. What
            works is `generate` on padded batches: with each of its backends for a few tokens, then
            with the best, in batches of 16 and 64, in order of arrival and (`sorted`) of the
            lengths of the answers, which a server cannot know. `ratio` is against the fastest of
            them, `ratio_in_order` against the fastest that a server can do.
  memory    one budget of bytes for pages, three caches: how many requests of `context` tokens are
            let in, beside what the config says. As bf16, which a GPU keeps, and as it runs here
  decode    a step with as many, beside its floor: bytes that must be read over the speed of a plain
            sum, FLOPs over that of a square matmul, the larger of both; and prompts read per second
  latency   requests that come by chance, at shares of what the engine can do at most: time to the
            first token, and from token to token

The models: presets `mini` and `small` with random weights; for memory and decode one dense and one
layer of experts at the 150m preset's widths, and one attention layer of V2-Lite. All that is
compared takes turns, and the least time of each counts. Times are `harness.serving.clock`'s: with
one thread on a CPU those that this process computed. A floor is no promise: on a CPU the products
of absorbed attention are far from it, as data/README.md says of the record.

On a GPU the same with V2-Lite at full size, bf16, random weights, and 16K tokens of context. It has
not been run on one.
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv2_ref.bench.harness.peer import ATTENTION, EXPERTS, both, peer, quiet, sizes, use
from dsv2_ref.bench.harness.serving import (
    Ask,
    asks,
    cache_bytes,
    clock,
    filled,
    in_rounds,
    least_work,
    padded,
    served,
    speeds,
    their_engine,
    under_load,
)
from dsv2_ref.config import LITE, M150, MINI, SMALL, TINY, Config
from dsv2_ref.inference.engine import Engine
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.machine import default_device, machine

CACHES = ("per_head", "latent", "six_bit")
PAGE = 16


class Plan(NamedTuple):
    """What is measured."""

    models: dict[str, Config]            # of `sixteen`; the last one's latency is measured
    beside: Config                       # of `mixed`
    shapes: dict[str, Config]            # of `memory` and `decode`
    context: int                         # tokens of a request there
    crowd: int                           # per-head caches that the budget is made for
    mixed: int                           # requests
    requests: int                        # of `latency`
    rounds: int
    tokens: int                          # of prompts and answers of `sixteen`; others go by it
    itemsize: int                        # of the numbers that the budget is made for


CPU = Plan(
    {"mini": MINI, "small": SMALL}, SMALL,
    {"150m": M150.with_(n_layers=2, max_positions=2048),
     "lite attention": LITE.with_(n_layers=1, vocab=64, bos=0, eos=1, dense_width=64)},
    1024, 4, 64, 100, 2, 64, 4)
GPU = Plan({"lite": LITE}, SMALL, {"lite": LITE}, 16384, 12, 64, 100, 3, 64, 2)
QUICK = Plan({"tiny": TINY}, TINY, {"tiny": TINY}, 64, 2, 6, 6, 1, 4, 4)


def run(quick: bool = False) -> dict[str, Any]:
    """All parts as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ImportError without transformers; RuntimeError if the engine draws other tokens than `generate`.
    """
    transformers, device = peer("serve"), default_device()
    plan = QUICK if quick else GPU if device == "cuda" else CPU
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    fastest = speeds(device, dtype, *((1 << 16, 256) if quick else (1 << 26, 2048)))
    record = {"name": "serve", "quick": quick, **machine(),
              "transformers": transformers.__version__, "dtype": str(dtype)[6:], "page": PAGE,
              **fastest, "sixteen": [], "mixed": {}, "memory": [], "decode": [], "latency": []}
    for name, config in plan.models.items():
        model = _model(config, device, dtype)
        record["sixteen"].append({"model": name, **sizes(config), **_sixteen(model, plan)})
    record["latency"] = _latency(model, plan)
    with tempfile.TemporaryDirectory() as folder, quiet(transformers):
        ours, theirs = both(transformers, plan.beside.with_(init_std=0.1), Path(folder) / "model")
        record["mixed"] = {**sizes(plan.beside), **_mixed(
            transformers, ours.to(device), theirs.to(device), plan)}
    for name, config in plan.shapes.items():
        model = _model(config, device, torch.bfloat16)
        record["memory"] += [{"shape": name, **row} for row in _memory(model, plan)]
        model = model.to(dtype)
        if dtype != torch.bfloat16:
            record["memory"] += [{"shape": name, **row} for row in _memory(model, plan)]
        record["decode"] += [{"shape": name, **_decode(model, plan, kind, fastest)}
                             for kind in CACHES]
    return record


def _model(config: Config, device: str, dtype: torch.dtype) -> DeepSeekV2:
    torch.manual_seed(0)
    with torch.device(device):
        return DeepSeekV2(config).to(dtype).eval()


def _room(model: DeepSeekV2, asked: list[Ask]) -> int:
    """Bytes in which all of them have expanded pages at once: nobody waits for memory."""
    pages = sum(-(-(len(ask.prompt) + ask.new) // PAGE) for ask in asked)
    return int(pages * PAGE * cache_bytes(model.config, "per_head", model.like.itemsize))


def _engines(
    model: DeepSeekV2, room: int, asked: list[Ask]
) -> dict[str, Callable[[], list[list[int]]]]:
    """Serving all of them, with each cache; the engine is there already, as a server has it."""
    engines = {kind: Engine(model, room, kind, PAGE) for kind in CACHES}
    return {kind: partial(served, engine, asked) for kind, engine in engines.items()}


def _sixteen(model: DeepSeekV2, plan: Plan) -> dict[str, Any]:
    n, length = 16, plan.tokens
    asked = asks(model.config.vocab, n, (length, length), (length, length))
    prompts, room = [ask.prompt for ask in asked], _room(model, asked)

    def alone() -> list[list[int]]:                    # a quarter of them, which is counted below
        return [generate(model, [p], length, stop=())[0] for p in prompts[: n // 4]]

    ways = {"sequential": alone, "plain batch": lambda: generate(model, prompts, length, stop=())}
    ways |= _engines(model, room, asked)
    same = sum(a == b for a, b in zip(alone(), ways["latent"](), strict=False))
    seconds = in_rounds(ways, plan.rounds)
    seconds["sequential"] *= 4
    return {"requests": n, "prompt": length, "new": length, "seconds": seconds,
            "times_sequential": {way: seconds["sequential"] / s for way, s in seconds.items()},
            "same_tokens": f"{same} of {n // 4}"}


def _mixed(transformers: Any, ours: DeepSeekV2, theirs: Any, plan: Plan) -> dict[str, Any]:
    lengths = (plan.tokens // 4, 2 * plan.tokens)
    asked = asks(ours.config.vocab, plan.mixed, lengths, lengths)
    room, few, tried = _room(ours, asked), [ask._replace(new=4) for ask in asked], {}
    error = None if plan is QUICK else their_engine(transformers, theirs, asked[:4])
    for backends in itertools.product(ATTENTION, EXPERTS):
        use(theirs, *backends)
        tried["+".join(backends)] = in_rounds({"": lambda: padded(theirs, few, 64)}, 1)[""]
    use(theirs, *min(tried, key=tried.get).split("+"))
    ordered = sorted(asked, key=lambda ask: ask.new)
    ways = {f"transformers {batch}{how}": lambda some=some, batch=batch: padded(theirs, some, batch)
            for batch in (16, 64) for how, some in (("", asked), (" sorted", ordered))
            if not (batch == 64 and how)}
    ways |= _engines(ours, room, asked)
    same = sum(a == b for a, b in zip(ways["latent"](), padded(theirs, asked, 64), strict=True))
    seconds = in_rounds(ways, plan.rounds)
    theirs_all = [way for way in ways if way.startswith("transformers")]
    best = min(theirs_all, key=seconds.get)
    in_order = min(seconds[way] for way in theirs_all if "sorted" not in way)
    return {"requests": len(asked), "lengths": list(lengths),
            "new_tokens": sum(ask.new for ask in asked), "continuous_batching_error": error,
            "tried_ms": {way: 1e3 * s for way, s in tried.items()},
            "backends": min(tried, key=tried.get), "seconds": seconds, "best": best,
            "ratio": {kind: seconds[best] / seconds[kind] for kind in CACHES},
            "ratio_in_order": {kind: in_order / seconds[kind] for kind in CACHES},
            "same_tokens": f"{same} of {len(asked)}"}


def _crowd(model: DeepSeekV2, plan: Plan, kind: str) -> tuple[Engine, int, int, float]:
    """An engine as full as the budget lets it be; the budget, how many fit and should fit."""
    c, size = model.config, model.like.itemsize
    budget = int(plan.crowd * plan.context * cache_bytes(c, "per_head", plan.itemsize))
    engine = Engine(model, budget, kind, PAGE)
    should = budget / (plan.context * cache_bytes(c, kind, size))
    asked = asks(c.vocab, int(1.2 * should) + 2, (plan.context - PAGE + 1,) * 2, (PAGE,) * 2)
    return engine, budget, filled(engine, asked), should


def _memory(model: DeepSeekV2, plan: Plan) -> list[dict[str, Any]]:
    rows, before = [], None
    for kind in CACHES:
        engine, budget, batch, should = _crowd(model, plan, kind)
        rows.append({"dtype": str(model.like.dtype)[6:], "cache": kind, "context": plan.context,
                     "budget_bytes": budget, "bytes_per_token": engine.cache.nbytes_per_token,
                     "predicted_batch": should, "batch": batch,
                     "times_the_one_before": None if before is None else batch / before})
        before, engine = batch, None                   # its memory is the next one's
    return rows


def _decode(model: DeepSeekV2, plan: Plan, kind: str, fastest: dict[str, float]) -> dict[str, Any]:
    engine, _, batch, _ = _crowd(model, plan, kind)
    c, size = model.config, model.like.itemsize
    seconds = in_rounds({"step": engine._step}, 1 + 2 * plan.rounds)["step"]
    work = least_work(c, batch, plan.context - PAGE, kind, size)
    by = {"bytes": (work["weight_bytes"] + work["cache_bytes"]) / (1e9 * fastest["read_gb_per_s"]),
          "flops": work["flops"] / (1e9 * fastest["matmul_gflops"])}
    floor = max(by.values())
    long = [ask._replace(new=1) for ask in asks(c.vocab, 2, (plan.context - PAGE + 1,) * 2, (1, 1))]
    reader = Engine(model, _room(model, long), kind, PAGE)
    start = clock()
    served(reader, long)
    prompt = clock() - start
    return {"cache": kind, "batch": batch, "context": plan.context, **work,
            "floor_ms": {name: 1e3 * s for name, s in by.items()}, "bound_by": max(by, key=by.get),
            "step_ms": 1e3 * seconds, "share_of_floor": floor / seconds,
            "predicted_tokens_per_s": batch / floor, "tokens_per_s": batch / seconds,
            "prompt_tokens_per_s": sum(len(ask.prompt) for ask in long) / prompt}


def _latency(model: DeepSeekV2, plan: Plan) -> list[dict[str, Any]]:
    lengths = (plan.tokens // 4, plan.tokens)
    asked = asks(model.config.vocab, plan.requests, lengths, lengths)
    room = _room(model, asked)
    most = len(asked) / in_rounds({"": lambda: served(Engine(model, room, page=PAGE), asked)},
                                  plan.rounds)[""]
    return [{"load": load, "requests_per_s": load * most,
             **under_load(Engine(model, room, page=PAGE), asked, load * most)}
            for load in (0.3, 0.6, 0.9)]

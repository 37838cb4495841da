# SPDX-License-Identifier: MIT
"""Decoding on a CPU, side by side with transformers on the same weights.

What is compared: `DeepSeekV2` as it is, against `DeepseekV2ForCausalLM` of transformers with its
own `DynamicCache`, in one process, fp32, the same files on disk. transformers caches the latent as
well, but expands every old token's keys and values again for every new one; here the queries go
down to the latent instead, so the gap grows with the context.

  decode     tokens per second with 2K (batch 1 and 4) and 8K tokens (batch 1) in the cache
  attention  one attention layer of V2-Lite at its real size, alone

The model is V2 made small in its own proportions: 512 wide, 4 layers, 16 heads of 64 + 32, a
latent of 256, 2 shared and 16 routed experts of width 256, 4 of them per token from 2 of 4 groups;
36M parameters. All widths are multiples of 16, so that no backend of transformers is excluded.

How it is measured: transformers runs with each of its attention and expert backends for a few
steps, and the best one is then measured again, in turns with ours, a few steps each, so that both
see the same state of the machine. Medians of single steps. The caches are filled with random rows
(what a row holds does not change the time), the same ones on both sides, and the outputs must
agree before anything is timed. Times on a shared machine are noise: read the ratios, and on a
machine with nothing else to do, for a second busy process slows two threads that wait for each
other many times over. Training has a bench of its own, train.

How near ours is to the machine's limits: `bandwidth_share` is the bytes that a step has to read,
its weights and the cached rows once each, over its time and the rate at which a matrix of 256 MB is
read in the same run; `matmul_share` its FLOPs over its time and the rate of a square matmul. Each
rate is the better of one before and one after. Weights that stay in a large cache come faster.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import cost
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import attend_absorbed
from dsv2_ref.attention.rope import rope_tables, yarn_frequencies
from dsv2_ref.bench.harness.peer import ATTENTION, EXPERTS, MODEL, both, peer, quiet, sizes, use
from dsv2_ref.bench.harness.timing import (
    Step,
    agree,
    in_turns,
    matmul_rate,
    milliseconds,
    read_rate,
    result,
    times,
)
from dsv2_ref.config import LITE, Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.machine import machine

# only its attention is used
LAYER = LITE.with_(n_layers=1, vocab=64, bos=0, eos=1, dense_width=64, init_std=0.02)


def run(quick: bool = False) -> dict[str, Any]:
    """All comparisons as one JSON-able record; `quick` is a smoke test whose ratios mean nothing.

    ImportError without transformers; RuntimeError if the two sides disagree.
    """
    transformers = peer("cpu_decode")
    model, layer, contexts, steps = MODEL, LAYER, (2048, 8192), 20
    crowds = (1, 4)
    if quick:
        model = MODEL.with_(d=64, n_layers=2, n_h=2, vocab=128, dense_width=96, expert_width=32)
        layer = LAYER.with_(d=128, n_h=2)
        contexts, steps, crowds = (32, 64), 4, (1, 2)
    settings = [(contexts[0], crowds[0]), (contexts[0], crowds[1]), (contexts[1], crowds[0])]
    before = _rates(quick)
    with tempfile.TemporaryDirectory() as folder, quiet(transformers):
        ours, theirs = both(transformers, model, Path(folder) / "model")
        decode = [_decode(transformers, ours, theirs, context, batch, steps)
                  for context, batch in settings]
        ours, theirs = both(transformers, layer, Path(folder) / "layer")
        attention = [_attention(transformers, ours, theirs, context, steps) for context in contexts]
    rates = [max(pair) for pair in zip(before, _rates(quick), strict=True)]
    for row in decode + attention:
        seconds = row["ours_ms"] / 1e3
        row["bandwidth_share"] = row["bytes"] / seconds / rates[0]
        row["matmul_share"] = row["flops"] / seconds / rates[1]
    return {
        "name": "cpu_decode", "quick": quick, **machine(),
        "read_gb_per_s": rates[0] / 1e9, "matmul_tflops": rates[1] / 1e12,
        "transformers": transformers.__version__, "dtype": "float32",
        "model": sizes(model), "layer": sizes(layer),
        "decode": decode, "attention": attention,
    }


def _decode(
    transformers: Any, ours: DeepSeekV2, theirs: Any, context: int, batch: int, steps: int
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(context + batch)
    tokens = torch.randint(ours.config.vocab, (batch, 1), generator=g)
    cache, rows = _filled(ours, context, batch, g, room=4 * steps + 8)
    their_cache = None

    def our_step() -> Tensor:
        return ours(tokens, cache)

    def their_step() -> Tensor:
        return theirs(tokens, past_key_values=their_cache, use_cache=True).logits

    def rewind() -> None:
        nonlocal their_cache
        cache.lengths = [context] * batch
        their_cache = _their_cache(transformers, theirs, rows, ours.config.d_c)

    with torch.inference_mode():
        rewind()
        experts = experts_read(ours, our_step)
        rewind()
        difference = agree(our_step(), their_step(), f"decode at {context}")
        tried = {}
        for attention in ATTENTION:
            for form in EXPERTS:
                use(theirs, attention, form)
                rewind()
                tried[f"{attention}+{form}"] = min(times(their_step, 3)[1:])
        best = min(tried, key=tried.get)
        use(theirs, *best.split("+"))
        rewind()
        pair = in_turns(our_step, their_step, steps, rewind)
    return {"context": context, "batch": batch, **result(pair, batch), "best": best,
            "tried_ms": milliseconds(tried), "difference": difference,
            **needed(ours.config, context + 1, batch, experts)}


def _attention(
    transformers: Any, ours: DeepSeekV2, theirs: Any, context: int, steps: int
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(context)
    cache, rows = _filled(ours, context, 1, g, room=1)
    their_cache = None
    h = torch.randn(1, 1, ours.config.d, generator=g)
    layer, their_layer = ours.blocks[0].attention, theirs.model.layers[0].self_attn
    c = ours.config
    frequencies = yarn_frequencies(c.d_r, c.rope_theta, c.yarn_factor, c.yarn_beta_fast,
                                   c.yarn_beta_slow, c.yarn_original_positions)
    cos, sin = rope_tables(torch.tensor([[context]]), frequencies)
    turns = theirs.model.rotary_emb(h, torch.tensor([[context]]))

    def our_step() -> Tensor:
        cache.undo()                                            # written again and again
        return layer(h, cos, sin, attend_absorbed, cache)

    def their_step() -> Tensor:
        return their_layer(h, past_key_values=their_cache, position_embeddings=turns)[0]

    def rewind() -> None:
        nonlocal their_cache
        their_cache = _their_cache(transformers, theirs, rows, ours.config.d_c)

    with torch.inference_mode():
        rewind()
        difference = agree(our_step(), their_step(), f"attention at {context}")
        tried = {}
        for attention in ATTENTION:
            use(theirs, attention, "eager")
            rewind()
            tried[attention] = min(times(their_step, 3)[1:])
        best = min(tried, key=tried.get)
        use(theirs, best, "eager")
        rewind()
        pair = in_turns(our_step, their_step, steps, rewind)
    return {"context": context, "batch": 1, **result(pair, 1), "best": best,
            "tried_ms": milliseconds(tried), "difference": difference,
            **needed_by_attention(ours.config, context + 1)}


def experts_read(ours: DeepSeekV2, step: Step) -> int:
    """Routed experts whose weights one step reads, all layers together."""
    read: list[int] = []
    hooks = [block.router.register_forward_hook(
                 lambda _, __, routing: read.append(len(routing.indices.unique())))
             for block in ours.blocks if ours.config.is_moe(block.layer)]
    step()
    for hook in hooks:
        hook.remove()
    return sum(read)


def needed(c: Config, rows: int, batch: int, experts: int) -> dict[str, int]:
    """Bytes to read and FLOPs of one token each for `batch` sequences of `rows` cached rows."""
    more = experts - (c.n_layers - c.n_dense) * c.top_k               # than one token's
    weights = cost.activated_parameters(c) + more * 3 * c.d * c.expert_width
    cached = batch * rows * cost.latent_elements(c.n_layers, c.d_c, c.d_r)
    flops = batch * cost.forward_flops_per_token(c, rows, cost.pair_flops_absorbed)
    return {"bytes": 4 * (weights + cached), "flops": flops}


def needed_by_attention(c: Config, rows: int) -> dict[str, int]:
    """The same of the attention of one sequence alone, without its norms."""
    weights, cached = cost.parameters(c).attention, rows * cost.latent_elements(1, c.d_c, c.d_r)
    return {"bytes": 4 * (weights + cached),
            "flops": 2 * weights + rows * cost.pair_flops_absorbed(c)}


def _rates(quick: bool) -> tuple[float, float]:
    """Bytes/s read and FLOP/s of a matmul, here and now."""
    size, square = (1024, 256) if quick else (8192, 2048)
    return read_rate(size), matmul_rate("cpu", torch.float32, square)


def _filled(
    ours: DeepSeekV2, context: int, batch: int, g: torch.Generator, room: int
) -> tuple[LatentCache, Tensor]:
    """A cache of ours that has read `context` tokens, and its rows (l, B, S, d_c + d_r)."""
    cache = ours.new_cache(batch, context + room)
    rows = torch.randn(cache.store[:, :, :context].shape, generator=g)
    cache.store[:, :, :context] = rows
    cache.lengths = [context] * batch
    return cache, rows


def _their_cache(transformers: Any, theirs: Any, rows: Tensor, d_c: int) -> Any:
    cache = transformers.DynamicCache(config=theirs.config)
    for layer, row in enumerate(rows[:, :, None]):                       # (B, 1, S, d_c + d_r)
        cache.update(row[..., :d_c].clone(), row[..., d_c:].clone(), layer)
    return cache

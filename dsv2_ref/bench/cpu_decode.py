# SPDX-License-Identifier: MIT
"""Decoding and training on a CPU, side by side with transformers on the same weights.

What is compared: `DeepSeekV2` as it is, against `DeepseekV2ForCausalLM` of transformers with its
own `DynamicCache`, in one process, fp32, the same files on disk. transformers caches the latent as
well, but expands every old token's keys and values again for every new one; here the queries go
down to the latent instead, so the gap grows with the context.

  decode     tokens a second with 2K (batch 1 and 4) and 8K tokens (batch 1) in the cache
  attention  one attention layer of V2-Lite at its real size, alone
  training   forward, backward and AdamW on 1024 tokens, as 4 sequences of 256 and as one; balance
             losses and dropping are off, so that both sides do the same work

The model is V2 made small in its own proportions: 512 wide, 4 layers, 16 heads of 64 + 32, a
latent of 256, 2 shared and 16 routed experts of width 256, 4 of them a token from 2 of 4 groups;
36M parameters. All widths are multiples of 16, so that no backend of transformers is excluded.

How it is measured: transformers runs with each of its attention and expert backends for a few
steps, and the best one is then measured again, in turns with ours, a few steps each, so that both
see the same state of the machine. Medians of single steps. The caches are filled with random rows
(what a row holds does not change the time), the same ones on both sides, and the outputs must
agree before anything is timed. `batched_mm` is left out of training, where it would copy the
weights of every slot. Times on a shared machine are noise: read the ratios, and on a machine with
nothing else to do, for a second busy process slows two threads that wait for each other many times
over.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import attend_absorbed
from dsv2_ref.attention.rope import rope_tables, yarn_frequencies
from dsv2_ref.bench._timing import Step, agree, in_turns, machine, milliseconds, result, times
from dsv2_ref.config import LITE, Config
from dsv2_ref.model import DeepSeekV2

MODEL = Config(
    vocab=4096, d=512, n_layers=4, n_h=16, d_h=64, d_r=32, d_v=64, d_c=256, d_cq=384,
    dense_width=1408, n_shared=2, n_routed=16, top_k=4, expert_width=256, n_devices=4,
    max_devices=2, routed_scaling_factor=2.0, max_positions=16384, init_std=0.05,
)
# only its attention is used
LAYER = LITE.with_(n_layers=1, vocab=64, bos=0, eos=1, dense_width=64, init_std=0.02)
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "batched_mm", "grouped_mm")

def run(quick: bool = False) -> dict[str, Any]:
    """All comparisons as one JSON-able record; `quick` is a smoke test whose ratios mean nothing.

    ImportError without transformers; RuntimeError if the two sides disagree.
    """
    transformers = _transformers()
    model, layer, contexts, steps = MODEL, LAYER, (2048, 8192), 20
    crowds, shapes, updates = (1, 4), ((4, 256), (1, 1024)), 5
    if quick:
        model = MODEL.with_(d=64, n_layers=2, n_h=2, vocab=128, dense_width=96, expert_width=32)
        layer = LAYER.with_(d=128, n_h=2)
        contexts, steps, crowds, shapes, updates = (32, 64), 4, (1, 2), ((2, 16), (1, 32)), 2
    settings = [(contexts[0], crowds[0]), (contexts[0], crowds[1]), (contexts[1], crowds[0])]
    with tempfile.TemporaryDirectory() as folder, _quiet(transformers):
        ours, theirs = _both(transformers, model, Path(folder) / "model")
        decode = [_decode(transformers, ours, theirs, context, batch, steps)
                  for context, batch in settings]
        training = [_training(ours, theirs, shape, updates) for shape in shapes]
        ours, theirs = _both(transformers, layer, Path(folder) / "layer")
        attention = [_attention(transformers, ours, theirs, context, steps) for context in contexts]
    return {
        "name": "cpu_decode", "quick": quick, **machine(),
        "transformers": transformers.__version__, "dtype": "float32",
        "model": _sizes(model), "layer": _sizes(layer),
        "decode": decode, "attention": attention, "training": training,
    }


def _sizes(config: Config) -> dict[str, int | None]:
    """The sizes that matter for the time."""
    names = "d n_layers n_h d_h d_r d_v d_c d_cq n_routed top_k expert_width vocab"
    return {name: getattr(config, name) for name in names.split()}


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
        difference = agree(our_step(), their_step(), f"decode at {context}")
        tried = {}
        for attention in ATTENTION:
            for experts in EXPERTS:
                _use(theirs, attention, experts)
                rewind()
                tried[f"{attention}+{experts}"] = min(times(their_step, 3)[1:])
        best = min(tried, key=tried.get)
        _use(theirs, *best.split("+"))
        rewind()
        pair = in_turns(our_step, their_step, steps, rewind)
    return {"context": context, "batch": batch, **result(pair, batch), "best": best,
            "tried_ms": milliseconds(tried), "difference": difference}


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
        return layer(h, cos, sin, attend_absorbed, cache)       # not advanced

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
            _use(theirs, attention, "eager")
            rewind()
            tried[attention] = min(times(their_step, 3)[1:])
        best = min(tried, key=tried.get)
        _use(theirs, best, "eager")
        rewind()
        pair = in_turns(our_step, their_step, steps, rewind)
    return {"context": context, "batch": 1, **result(pair, 1), "best": best,
            "tried_ms": milliseconds(tried), "difference": difference}


def _training(
    ours: DeepSeekV2, theirs: Any, shape: tuple[int, int], updates: int
) -> dict[str, Any]:
    """The same batch again and again; both sides start from the same weights."""
    c = ours.config
    tokens = torch.randint(c.vocab, shape, generator=torch.Generator().manual_seed(0))
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), 1)
    ours.train()
    theirs.train()

    def our_loss() -> Tensor:
        return ours.losses(tokens, targets).total

    def their_loss() -> Tensor:
        return theirs(tokens, labels=tokens, use_cache=False).loss      # shifts them itself

    difference = agree(our_loss(), their_loss(), "training loss")
    norms = []
    for model, loss in ((ours, our_loss), (theirs, their_loss)):
        loss().backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        model.zero_grad()
    difference = max(difference, agree(*norms, "gradient norm"))
    our_step, their_step = _update(ours, our_loss), _update(theirs, their_loss)

    tried = {}
    for attention in ATTENTION:
        for experts in ("eager", "grouped_mm"):
            _use(theirs, attention, experts)
            tried[f"{attention}+{experts}"] = min(times(their_step, 2))
    best = min(tried, key=tried.get)
    _use(theirs, *best.split("+"))
    pair = in_turns(our_step, their_step, updates, lambda: None, turn=1)
    ours.eval()
    theirs.eval()
    return {"batch": shape[0], "length": shape[1], **result(pair, tokens.numel()),
            "best": best, "tried_ms": milliseconds(tried), "difference": difference}


def _update(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    # rate 0: the work is the same, and both sides keep the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _both(transformers: Any, config: Config, folder: Path) -> tuple[DeepSeekV2, Any]:
    """One random model, written once and read by both."""
    torch.manual_seed(0)
    checkpoint.save(DeepSeekV2(config), folder)
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return checkpoint.load(folder), theirs.eval()


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


def _use(theirs: Any, attention: str, experts: str) -> None:
    theirs.set_attn_implementation(attention)
    theirs.set_experts_implementation(experts)


def _transformers() -> Any:
    try:
        import transformers
        from transformers import DeepseekV2ForCausalLM  # noqa: F401  (older ones lack it)
    except ImportError:
        raise ImportError("bench cpu_decode compares with transformers 5.15 or later: "
                          "pip install -e '.[test]'") from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars or advice on stderr while transformers loads."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

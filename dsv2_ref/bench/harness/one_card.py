# SPDX-License-Identifier: MIT
"""Training steps of a model so large that a card holds one of it: the sides in turns as wholes."""

import gc
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2_ref import cost
from dsv2_ref.bench.harness.peer import agreement, both, sizes, update, use
from dsv2_ref.bench.harness.timing import milliseconds, result, times
from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.memory import plan, state_bytes
from dsv2_ref.training.pretrain import Trainer
from dsv2_ref.training.recipe import Recipe

LITTLE = Recipe(steps=1000, optimizer="adamw8", weights="bf16", lr=1e-5, protected=0.0,
                sequence=4096, batch=4)
ROUNDS = 2
# experts, and how the batch fits: blocks run again, or one sequence after the other
WAYS = tuple(itertools.product(("grouped_mm", "eager"), ("again", "single")))


def in_turns_as_wholes(
    transformers: Any, config: Config, recipe: Recipe, updates: int, device: str, folder: Path,
) -> tuple[Config, dict[str, Any]]:
    """One side's model, its updates, nothing left of it, then the other's; twice each.

    The config that fits, and its record.
    """
    difference = _two_layers_agree(transformers, config, recipe, device, folder)
    there = torch.cuda.mem_get_info()[1] if device == "cuda" else 2**34
    config = fitting(config, recipe, there)
    ours, theirs, tried = [], [], {}
    for _ in range(ROUNDS):
        taken, memory = _ours(config, recipe, updates, device, there)
        ours += taken
        taken, their_peak = _theirs(transformers, config, recipe, updates, device, tried)
        theirs += taken
    tokens = recipe.batch * recipe.sequence
    torchao = _torchao() is not None
    return config, {
        "batch": recipe.batch, "length": recipe.sequence, **sizes(config),
        "parameters": cost.parameters(config).total, "optimizer": "AdamW8",
        "their_optimizer": "torchao AdamW8bit" if torchao else None,
        "missing": [] if torchao else ["torchao"], **result((ours, theirs), tokens),
        "best": _best(tried),
        "tried_ms": milliseconds({n: t for n, t in tried.items() if t is not None}),
        "out_of_memory": [n for n, t in tried.items() if t is None], "difference": difference,
        **memory, "their_peak_bytes": their_peak,
    }


def fitting(config: Config, recipe: Recipe, there: int) -> Config:
    """As many layers as leave a third of the memory `there` beside weights, gradients, moments."""
    for n_layers in range(config.n_layers, 1, -1):
        smaller = config.with_(n_layers=n_layers)
        # of 141 GB two thirds are 94 GB, and full Lite takes 94.7
        if state_bytes(cost.parameters(smaller).total, recipe) <= 0.68 * there:
            return smaller
    raise ValueError(f"memory: {there / 2**30:.0f} GiB, expected enough for two layers")


def _two_layers_agree(
    transformers: Any, config: Config, recipe: Recipe, device: str, folder: Path
) -> float:
    small = config.with_(n_layers=2, vocab=min(config.vocab, 4096), bos=0, eos=1)
    ours, theirs = (m.to(device) for m in both(transformers, small, folder))
    use(theirs, "eager", "eager")
    return agreement(ours, theirs, (1, min(recipe.sequence, 512)))[0]


def _ours(
    config: Config, recipe: Recipe, updates: int, device: str, there: int
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each update, and the memory planned and measured."""
    _forget(device)
    n_tokens = (updates + 4) * recipe.batch * recipe.sequence
    tokens = np.random.default_rng(0).integers(0, config.vocab, n_tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model = DeepSeekV2(config)
    trainer = Trainer(model, recipe, tokens)
    for tenths in range(11):
        recipe = recipe.with_(recompute=tenths / 10)
        planned = plan(model, recipe, trainer.precision).peak
        if planned <= 0.93 * there:
            break
    model.recompute = recipe.recompute
    _forget(device)
    taken = times(trainer.step, 2 + updates)[2:]
    return taken, {"recompute": recipe.recompute, "planned_peak_bytes": planned,
                   "peak_bytes": _peak(device)}


def _theirs(
    transformers: Any, config: Config, recipe: Recipe, updates: int, device: str,
    tried: dict[str, float | None],
) -> tuple[list[float], int | None]:
    """The same of transformers; the ways are tried if `tried` is empty, and written there."""
    _forget(device)
    tokens = torch.randint(config.vocab, (recipe.batch, recipe.sequence)).to(device)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.DeepseekV2Config(**config.to_hf()), dtype=torch.bfloat16)
    model.train()
    optimizer = _torchao()
    if optimizer is not None:
        optimizer = optimizer(model.parameters(), lr=recipe.lr, bf16_stochastic_round=True)

    def step(way: str) -> Any:
        experts, memory = way.split("+")
        use(model, "sdpa", experts)
        if memory == "again":
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()
        parts = tokens.split(1 if memory == "single" else len(tokens))
        losses = [lambda part=part: model(part, labels=part, use_cache=False).loss
                  for part in parts]
        return update(model, losses, optimizer)

    if not tried:
        for way in map("+".join, WAYS):
            try:
                tried[way] = min(times(step(way), 2))
            except torch.OutOfMemoryError:
                tried[way] = None
            model.zero_grad()
            _forget(device)
    if (best := _best(tried)) is None:
        raise RuntimeError("transformers: out of memory in every way that was tried")
    return times(step(best), 1 + updates)[1:], _peak(device)


def _best(tried: dict[str, float | None]) -> str | None:
    return min((n for n, t in tried.items() if t is not None), key=tried.get, default=None)


def _torchao() -> Any:
    """torchao's 8-bit AdamW, None if it is not installed."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        return None
    return AdamW8bit


def _forget(device: str) -> None:
    """Free what nothing refers to, and count the peak from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None

# SPDX-License-Identifier: MIT
"""Training steps of a model so large that a card holds one of it: the sides in turns as wholes."""

import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2_ref import cost
from dsv2_ref.bench.harness.gpu import reason
from dsv2_ref.bench.harness.peer import agreement, both, peer, quiet, sizes, update, use
from dsv2_ref.bench.harness.timing import Disagreement, milliseconds, result, times
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
    config: Config, recipe: Recipe, updates: int, device: str, folder: Path,
) -> Iterator[tuple[Config, dict[str, Any]]]:
    """One side's model, its updates, nothing left of it, then the other's; twice each.

    The config that fits and its record, after ours and again after theirs: whatever stops
    transformers is a `their_error`, and ours stays. Where they need fewer layers than ours, those
    of ours come first, in a record of their own. Disagreement if the two sides do not agree.
    """
    difference, error, there = None, None, _there(device)
    try:
        transformers = peer("train")
        with quiet(transformers):
            difference = _two_layers_agree(transformers, config, recipe, device, folder)
    except Disagreement:
        raise
    except Exception as failed:
        error = reason(failed)
    most = fitting(config, lambda n: state_bytes(n, recipe), there)
    name, optimizer, fewer = their_optimizer(most, there)
    if fewer != most:
        taken, memory = _ours(most, recipe, updates, device, there)
        alone = f"{name} needs fewer layers"
        yield most, _record(most, config, recipe, (taken, []), {}, memory | {"their_error": alone})
    sides: tuple[list, list] = [], []
    tried: dict[str, float | str] = {}
    more = {"their_optimizer": name, "difference": difference, "their_peak_bytes": None}
    for _ in range(ROUNDS):
        taken, memory = _ours(fewer, recipe, updates, device, there)
        sides[0].extend(taken)
        more |= memory | {"their_error": error}
        yield fewer, _record(fewer, config, recipe, sides, tried, more)
        if error is not None:
            return
        try:
            with quiet(transformers):
                taken, more["their_peak_bytes"] = _theirs(
                    transformers, fewer, recipe, updates, device, tried, optimizer)
            sides[1].extend(taken)
        except Exception as failed:
            error = more["their_error"] = reason(failed)
        yield fewer, _record(fewer, config, recipe, sides, tried, more)


def _record(
    config: Config, whole: Config, recipe: Recipe, sides: tuple[list, list],
    tried: dict[str, float | str], more: dict[str, Any],
) -> dict[str, Any]:
    """`more` is what was measured beside times; the case says how many layers, if not all."""
    part = "" if config == whole else f", {config.n_layers} layers"
    return {
        "case": f"lite{part}", "batch": recipe.batch, "length": recipe.sequence, **sizes(config),
        "parameters": cost.parameters(config).total, "optimizer": "AdamW8",
        **result(sides, recipe.batch * recipe.sequence), "best": _best(tried),
        "tried_ms": milliseconds({n: t for n, t in tried.items() if not isinstance(t, str)}),
        "not_run": {n: why for n, why in tried.items() if isinstance(why, str)}, **more,
    }


def fitting(config: Config, state: Callable[[int], float], there: int) -> Config:
    """As many layers as leave a third of the memory `there` beside weights, gradients, moments,
    which are state(n) bytes of n parameters."""
    for n_layers in range(config.n_layers, 1, -1):
        smaller = config.with_(n_layers=n_layers)
        # of 141 GB two thirds are 94 GB, and full Lite takes 94.7
        if state(cost.parameters(smaller).total) <= 0.68 * there:
            return smaller
    raise ValueError(f"memory: {there / 2**30:.0f} GiB, expected enough for two layers")


def their_optimizer(config: Config, there: int) -> tuple[str, Callable[..., Any], Config]:
    """Of transformers: name, constructor, and the config that fits, with fewer layers at need.

    torch's own fused AdamW, whose moments are bf16 as the weights are, where it fits; else the
    8-bit one of torchao, if that is installed; else the first on as many layers as it has room for.
    """
    plain = fitting(config, lambda n: 8 * n, there)
    if plain != config:
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            pass
        else:
            return "torchao AdamW8bit", partial(AdamW8bit, bf16_stochastic_round=True), config
    return "torch AdamW, fused, bf16 moments", partial(torch.optim.AdamW, fused=True), plain


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
    tried: dict[str, float | str], optimizer: Callable[..., Any],
) -> tuple[list[float], int | None]:
    """The same of transformers; the ways are tried if `tried` is empty, and written there."""
    _forget(device)
    tokens = torch.randint(config.vocab, (recipe.batch, recipe.sequence)).to(device)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.DeepseekV2Config(**config.to_hf()), dtype=torch.bfloat16)
    model.train()
    optimizer = optimizer(model.parameters(), lr=recipe.lr)

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
            except Exception as error:              # out of memory, or whatever else stops it
                tried[way] = reason(error)
            model.zero_grad()
            _forget(device)
    if (best := _best(tried)) is None:
        raise RuntimeError(f"transformers: none of the ways ran, {tried}")
    return times(step(best), 1 + updates)[1:], _peak(device)


def _best(tried: dict[str, float | str]) -> str | None:
    return min((n for n, t in tried.items() if not isinstance(t, str)), key=tried.get, default=None)


def _there(device: str) -> int:
    return torch.cuda.mem_get_info()[1] if device == "cuda" else 2**34


def _forget(device: str) -> None:
    """Free what nothing refers to, and count the peak from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None

# SPDX-License-Identifier: MIT
"""What `train` trains: a preset on text, one that learns to find needles, or a saved model that is
stretched. They differ in their recipe and in how the `Setup` is made; the run is the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint
from dsv2_ref.config import PRESETS, Config
from dsv2_ref.stretch import stretched, stretched_config, trained_positions
from dsv2_ref.text.corpora import Corpus
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training import long_context
from dsv2_ref.training.ladder import LADDER
from dsv2_ref.training.recipe import PAPER, Recipe
from dsv2_ref.training.setup import Setup, check_ready, set_up
from dsv2_ref.training.world import World

RECIPES = {"minutes": Recipe(steps=1)} | PAPER | LADDER
NEEDLE = {"needle": long_context.PRESETS["cpu"], "needle-gpu": long_context.PRESETS["gpu"]}


@dataclass(frozen=True)
class Job:
    """What is trained, by which recipe, on which corpus where none is named, and how it is made.

    `set_up` takes the corpus, the tokenizer of a run that goes on, and the processes that train.
    `config` is of what is trained; None for what one process alone can train.
    """

    name: str
    recipe: Recipe
    corpus: str
    set_up: Callable[[Corpus, TextTokenizer | None, World], Setup]
    config: Config | None = None


def job_of(
    preset: str | None, recipe: str | None, tokens: float | None, source: str | None,
    extend: float | None, changes: dict[str, Any],
) -> Job:
    """The job that the options name; ValueError for options that do not go together."""
    if source is not None or extend is not None:
        if source is None or extend is None:
            raise ValueError(f"--from: {source}, --extend: {extend}, expected both, a saved model "
                             "and a factor")
        _check_none("--from, whose sizes and steps follow from the model", preset=preset,
                    recipe=recipe)
        return _extension(source, extend, tokens, changes)
    preset = preset or "small"
    if preset in NEEDLE:
        _check_none(f"--preset {preset}, which has its own", recipe=recipe)
        return _needles(preset, tokens, changes)
    if preset not in PRESETS:
        known = ", ".join(sorted({*PRESETS, *NEEDLE}))
        raise ValueError(f"preset: {preset!r}, expected one of {known}")
    return _preset(preset, recipe, tokens, changes)


def _check_none(beside: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: {value!r}, expected none with {beside}")


def _preset(
    preset: str, recipe: str | None, tokens: float | None, changes: dict[str, Any]
) -> Job:
    recipe = recipe or (preset if preset in LADDER else "minutes")
    lengths = (tokens, changes.get("steps"), changes.get("seconds"))
    if recipe not in LADDER and all(length is None for length in lengths):
        changes = changes | {"steps": 300}
    chosen = _changed(RECIPES[recipe], tokens, changes)
    return Job(preset, chosen, "python", lambda corpus, tokenizer, world: set_up(
        PRESETS[preset], chosen, corpus, tokenizer, world=world), PRESETS[preset])


def _needles(preset: str, tokens: float | None, changes: dict[str, Any]) -> Job:
    chosen = _changed(NEEDLE[preset].recipe, tokens, changes)
    return Job(preset, chosen, "stories", lambda corpus, tokenizer, _: long_context.set_up_needles(
        NEEDLE[preset], chosen, corpus, tokenizer))


def _extension(
    source: str, factor: float, tokens: float | None, changes: dict[str, Any]
) -> Job:
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model, as data/model")
    config = Config.from_hf(folder)
    longer, own = stretched_config(config, factor), load_tokenizer(folder / "tokenizer.json")
    chosen = _changed(long_context.extension(config, factor), tokens, changes)
    check_ready(longer, chosen, own)                     # before anything long is read

    def make(corpus: Corpus, tokenizer: TextTokenizer | None, world: World) -> Setup:
        model = stretched(checkpoint.load(folder, torch.float32), factor).requires_grad_()
        return set_up(None, chosen, corpus, tokenizer or own, model, world)

    name = f"{source}, trained at {trained_positions(config)} tokens, stretched by {factor:g}"
    return Job(name, chosen, "python", make, longer)


def _changed(recipe: Recipe, tokens: float | None, changes: dict[str, Any]) -> Recipe:
    chosen = recipe.with_(**changes)
    return chosen if tokens is None else chosen.lasting(tokens)

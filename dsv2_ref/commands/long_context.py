# SPDX-License-Identifier: MIT
"""`train --from FOLDER --extend S`, the extension stage of a saved model, and `train --preset
needle`, a model that learns to find needles."""

from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import output_folder, save_model, say
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched, trained_positions
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.data import encode, some_of
from dsv2_ref.text.tokenizer import load_tokenizer, save_tokenizer
from dsv2_ref.training.long_context import PRESETS, extension, needle_model, tokenizer_for
from dsv2_ref.training.machine import default_device, keep_freed_memory
from dsv2_ref.training.pretrain import Trainer, train
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.setup import Setup

NEEDLE = {"needle": "cpu", "needle-gpu": "gpu"}              # --preset -> training's preset
IGNORED = ("preset", "recipe", "tokens", "save", "watch")     # of a run from random weights


def extend_command(
    source: str | None, extend: float | None, corpus: str, out: str, resume: bool, save_every: int,
    evaluate_every: int, progress: bool, text_bytes: float | None = None, **changes: Any,
) -> dict[str, Any]:
    """Stretch the model in `source` by `extend`, tune it on a corpus, save it as `out`/model.

    As in `train`, `out` gets log.jsonl, states and tokenizer.json, and a killed run is resumed.
    """
    if source is None or extend is None:
        raise ValueError(f"--from: {source}, --extend: {extend}, expected both, a saved model and "
                         "a factor")
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model, as data/needle")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    longer = stretched(checkpoint.load(folder, torch.float32), extend)
    recipe = extension(longer.config, extend).with_(
        **{name: value for name, value in changes.items() if name not in IGNORED})
    if recipe.sequence > (most := longer.config.max_positions):
        raise ValueError(f"sequence: {recipe.sequence}, expected at most {most}, what --extend "
                         f"{extend:g} gives")
    place = output_folder(out)
    run = RunFolder(place)
    if run.states and not resume:
        raise ValueError(f"{run.states[0]}: exists, expected --resume to go on with it or another "
                         "--out")
    keep_freed_memory()
    text = open_corpus(corpus)
    text = text if text_bytes is None else some_of(text, text_bytes)
    model = DeepSeekV2(longer.config)
    model.load_state_dict(longer.state_dict())
    setup = Setup(text, tokenizer, Trainer(model.to(default_device()), recipe,
                                           encode(text.train, tokenizer)))
    if resume:
        setup.trainer.restore(*run.newest(say))
    save_tokenizer(tokenizer, place / "tokenizer.json")
    say(f"{source}, trained at {trained_positions(longer.config)} tokens, stretched by "
        f"{extend:g}: {setup.describe()}")
    before = setup.held_out(text.validation)
    log = train(setup.trainer, place, save_every, lambda: setup.held_out(text.validation),
                evaluate_every, progress=progress)
    save_model(setup, place / "model")
    return {"steps": setup.trainer.steps, "tokens": setup.trainer.tokens, "factor": extend,
            "sequence": recipe.sequence, "loss": log[-1]["language"] if log else None,
            "bits_per_byte_before": before, "bits_per_byte": setup.held_out(text.validation),
            "out": str(place)}


def needle_command(
    preset: str, out: str, seed: int | None, steps: int | None, **_: object
) -> dict[str, Any]:
    """Train a needle preset on stories, save it as `out`/model; minutes, nothing to resume."""
    place = output_folder(out) / "model"
    checkpoint.check_place(place, overwrite=False)
    keep_freed_memory()
    text, chosen = open_corpus("stories"), PRESETS[NEEDLE[preset]]
    tokenizer = tokenizer_for(text, chosen.config.vocab)
    model, log = needle_model(chosen, text, tokenizer, seed or 0, steps, _tell)
    checkpoint.save(model.bfloat16(), place,
                    {"tokenizer.json": tokenizer.tokenizer.to_str(pretty=True)})
    return {"steps": len(log), "answer_loss": log[-1]["answer"], "seconds": log[-1]["seconds"],
            "out": str(place)}


def _tell(entry: dict[str, Any]) -> None:
    if entry["step"] % 50 == 0:
        say(f"step {entry['step']}: answers {entry['answer']:.4f} nats, {entry['seconds']:.0f} s")

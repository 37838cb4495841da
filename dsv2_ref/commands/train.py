# SPDX-License-Identifier: MIT
"""`train`: a preset and a recipe into a run folder."""

import json
from argparse import ArgumentParser
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from dsv2_ref.commands.common import output_folder, save_model, say
from dsv2_ref.commands.options import CORPORA, filled
from dsv2_ref.config import PRESETS
from dsv2_ref.files.whole import write_text
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.data import some_of
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.ladder import LADDER
from dsv2_ref.training.machine import keep_freed_memory
from dsv2_ref.training.memory import plan
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import PAPER, Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.setup import Setup, set_up
from dsv2_ref.training.watching import Watch

RECIPES = {"minutes": Recipe(steps=1)} | PAPER | LADDER


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Train a preset into a folder. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save and end the run "
        "between two steps; --resume goes on from there, bit for bit.")
    add = parser.add_argument
    add("--preset", type=filled, default="small", help=", ".join(PRESETS))
    add("--recipe", choices=RECIPES,
        help="ours, the paper's, or the ladder's; the options below change it; default: the "
             "preset's own on the ladder, else minutes")
    add("--corpus", type=filled, default="python", help=CORPORA)
    add("--text-bytes", type=float, help="as 40e6; so much of it to train on, not all")
    add("--out", type=filled, default="build/train")
    add("--resume", action="store_true",
        help="go on from the state in --out; a --lr given here may differ from before")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default 300, or the ladder's")
    length.add_argument("--seconds", type=float)
    length.add_argument("--tokens", type=float, help="as 5e6; in whole steps of batch x sequence")
    add("--optimizer", choices=("muon", "adamw", "adamw8"))
    add("--weights", choices=("fp32", "bf16"), help="bf16: with adamw8 alone")
    add("--schedule", choices=("linear", "step"))
    add("--precision", choices=("auto", "fp32", "bf16"))
    add("--lr", type=float, help="peak rate; AdamW's beside Muon moves in proportion")
    for name in ("warmup", "protected", "recompute"):
        add(f"--{name}", type=float, help="a share from 0 to 1")
    for name in ("sequence", "batch", "seed"):
        add(f"--{name}", type=int)
    add("--micro-batch", type=int,
        help="sequences at a time; the budget of dropping is counted within each, so losses differ "
             "by about 1e-5 from those of the whole batch")
    add("--save-every", type=int, default=100, help="steps; 0: at both ends alone")
    add("--evaluate-every", type=int, default=0, help="steps; 0 for at the end alone")
    add("--no-save", dest="save", action="store_false", help="write the log alone")
    add("--watch", choices=("tensorboard", "trackio"), help="beside log.jsonl")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=train_command)


def train_command(
    preset: str, recipe: str | None, corpus: str, out: str, resume: bool, save_every: int,
    evaluate_every: int, progress: bool, tokens: float | None = None, save: bool = True,
    watch: str | None = None, text_bytes: float | None = None, **changes: Any,
) -> dict[str, Any]:
    """Train a preset into `out`: log.jsonl, tokenizer.json, config.json and, with `save`, states
    and model/."""
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r}, expected one of {', '.join(sorted(PRESETS))}")
    recipe = recipe or (preset if preset in LADDER else "minutes")
    lengths = (tokens, changes.get("steps"), changes.get("seconds"))
    if recipe not in LADDER and all(length is None for length in lengths):
        changes["steps"] = 300
    if min(save_every, evaluate_every) < 0:
        raise ValueError(f"save_every: {save_every}, evaluate_every: {evaluate_every}, expected "
                         "numbers of steps, 0 for never")
    chosen = RECIPES[recipe].with_(**changes)
    if tokens is not None:
        chosen = chosen.lasting(tokens)
    folder = output_folder(out, with_model=save)
    run = RunFolder(folder)
    if run.states and not resume:
        raise ValueError(f"{run.states[0]}: exists, expected --resume to go on with it or another "
                         "--out")
    state = run.newest(say) if resume else None
    watching = Watch(watch, folder, state[2]["steps"] if state else 0, say) if watch else None
    with closing(watching) if watching else nullcontext():
        keep_freed_memory()
        tokenizer = load_tokenizer(folder / "tokenizer.json") if resume else None
        text = open_corpus(corpus)
        if text_bytes is not None:
            text = some_of(text, text_bytes)
        setup = set_up(PRESETS[preset], chosen, text, tokenizer)
        if state:
            setup.trainer.restore(*state)
            say(f"resumed after step {setup.trainer.steps}")
        else:
            write_text(folder / "tokenizer.json", setup.tokenizer.to_json())
            write_text(folder / "config.json", json.dumps(setup.model.config.to_hf(), indent=1))
        say(text.origin)
        say(f"{preset}: {setup.describe()}")
        return _train(setup, folder, save_every if save else None, evaluate_every, progress,
                      watching)


def _train(
    setup: Setup, folder: Path, save_every: int | None, evaluate_every: int, progress: bool,
    watching: Watch | None,
) -> dict[str, Any]:
    """Run it and sum it up; a `save_every` of None saves nothing."""
    planned = plan(setup.model, setup.trainer.recipe, setup.trainer.precision)
    say(f"memory planned: {planned.lines()}")
    log = train(setup.trainer, folder, save_every,
                lambda: setup.held_out(setup.corpus.validation), evaluate_every, progress=progress,
                watch=watching)
    if not log:
        raise ValueError(f"steps: the run in {folder} is at its end, expected more steps to go on")
    if save_every is not None:
        save_model(setup, folder / "model")
    result = {
        "steps": setup.trainer.steps, "tokens": setup.trainer.tokens, "loss": log[-1]["language"],
        "bits_per_byte": setup.held_out(setup.corpus.validation),
        "tokens_per_second": setup.trainer.tokens / setup.trainer.elapsed, "out": str(folder),
    }
    if setup.trainer.device.type == "cuda":
        result |= {"planned_peak_bytes": planned.peak,
                   "peak_bytes": torch.cuda.max_memory_allocated()}
    return result

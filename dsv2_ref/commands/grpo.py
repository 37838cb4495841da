# SPDX-License-Identifier: MIT
"""`grpo`: a chat model learns from rewards, beside one that goes on with its examples."""

import statistics
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.addition import (
    ANSWER,
    EXAMPLES,
    addition,
    addition_recipe,
)
from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.exam import truth
from dsv2_ref.alignment.rollout import greedy_reward, grpo_trainer
from dsv2_ref.alignment.sft import sft_trainer
from dsv2_ref.commands.common import say, write_chat_model
from dsv2_ref.commands.options import filled
from dsv2_ref.files.whole import write_text
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.instructions import Example
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import autocast, default_device, keep_freed_memory
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.proof import config_text
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.trainer import Trainer


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Group relative policy optimisation of a saved chat model on sums that a program judges; "
        "beside it, from the same model and for as many seconds, more SFT on the sums that it was "
        "shown. Judged are sums that neither of them was ever asked. Ctrl-C and signals that ask "
        "to stop save and end the run between two steps; --resume goes on from there."
    )
    add = parser.add_argument
    add("--from", dest="source", type=filled, metavar="MODEL", default="data/addition",
        help="folder of a chat model that gets some of the answers right; default: data/addition")
    add("--task", choices=("addition",), default="addition")
    add("--seeds", type=int, default=1, metavar="N", help="N runs, of seeds 0 to N - 1")
    add("--out", type=filled, default="build/grpo", help="a folder seed-S in it for each seed S")
    add("--resume", action="store_true", help="go on from the states in --out")
    add("--steps", type=int, default=100)
    add("--questions", type=int, default=32, help="in a step")
    add("--group", type=int, default=16, help="answers to each question")
    add("--clip", type=float, default=0.2, help="epsilon of the ratio's range")
    add("--beta", type=float, default=0.02, help="weight of the penalty for leaving the start")
    add("--normalise", choices=("sequence", "token"), default="sequence",
        help="mean over each answer's tokens, then over answers; or over all tokens")
    add("--lr", type=float, default=2e-4, help="peak rate")
    add("--no-control", dest="control", action="store_false", help="GRPO alone")
    add("--save-every", type=int, default=50, help="steps; 0: at both ends alone")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=grpo_command)


def grpo_command(
    source: str, task: str, seeds: int, out: str, resume: bool, steps: int, questions: int,
    group: int, clip: float, beta: float, normalise: str, lr: float, control: bool,
    save_every: int, progress: bool,
) -> dict[str, Any]:
    """Into out/seed-S: log.jsonl, states and model/. Shares of held-out questions that the most
    likely answer gets right, means over the seeds."""
    for name, value, least in (("seeds", seeds, 1), ("questions", questions, 1),
                               ("group", group, 2), ("save_every", save_every, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}, expected at least {least}")
    if not Path(source).is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved chat model, as "
                         "data/addition")
    keep_freed_memory()
    runs = []
    for seed in range(seeds):
        recipe = Recipe(steps=steps, batch=questions * group, optimizer="adamw", lr=lr,
                        weight_decay=0.0, protected=0.0, seed=seed)
        folder = RunFolder(Path(out) / f"seed-{seed}")
        runs.append(_one_seed(source, folder, resume, recipe, control, save_every, progress,
                              group=group, clip=clip, beta=beta, normalise=normalise))
    names = ("before", "after", "control") if control else ("before", "after")
    means = {name: statistics.fmean(run[name] for run in runs) for name in names}
    return {"task": task, **means, "seeds": runs, "out": out}


def rewarded(
    source: str | Path, run: RunFolder, resume: bool, make: Callable[[DeepSeekV2], Trainer],
    save_every: int, progress: bool, look: Callable[[Trainer], object] | None = None,
) -> Trainer:
    """A saved chat model after training by `make`'s trainer, or after what is missing of it.

    Into the run's folder: log.jsonl, states and model/. look: is called before anything is trained.
    """
    tokenizer = load_tokenizer(Path(source) / "tokenizer.json")
    with ExitStack() as opened:
        opened.enter_context(run.held())
        state = run.newest(say) if resume and run.states else None
        run.check_log() if state else run.check_new()
        checkpoint.check_place(run.path / "model", overwrite=True)
        trainer = make(checkpoint.load(source, torch.float32, default_device()))
        if look:
            look(trainer)
        if state:
            trainer.restore(*state)
            say(f"resumed after step {trainer.steps}")
        else:
            write_text(run.path / "tokenizer.json", tokenizer.to_json())
            write_text(run.path / "config.json", config_text(trainer.model.config))
        say(f"{source}: {trainer.recipe.steps} steps of {trainer.recipe.batch} answers")
        train(trainer, run, save_every, progress=progress)
        write_chat_model(trainer.model, tokenizer, run.path / "model")
    return trainer


def _one_seed(
    source: str, run: RunFolder, resume: bool, recipe: Recipe, control: bool, save_every: int,
    progress: bool, **asked: Any,
) -> dict[str, Any]:
    """One run and its control."""
    tokenizer = load_tokenizer(Path(source) / "tokenizer.json")
    questions, held_out = addition()             # of seed 0: the examples are the first of them
    ids = [prompt_ids(example.prompt, tokenizer) for example in questions]
    result: dict[str, Any] = {"seed": recipe.seed}

    def make(model: DeepSeekV2) -> Trainer:
        return grpo_trainer(model, ids, truth(questions, tokenizer), recipe,
                            max_new_tokens=ANSWER, **asked)

    trainer = rewarded(source, run, resume, make, save_every, progress, lambda trainer:
                       result.update(before=_right(trainer, tokenizer, held_out)))
    result |= {"after": _right(trainer, tokenizer, held_out), "seconds": trainer.elapsed}
    if control:
        say(f"control: SFT for {trainer.elapsed:.0f} seconds")
        other = _control(source, tokenizer, questions[:EXAMPLES], trainer.elapsed, recipe.seed,
                         progress)
        result |= {"control": _right(other, tokenizer, held_out), "control_steps": other.steps}
    return result


def _control(
    source: str, tokenizer: TextTokenizer, shown: list[Example], seconds: float, seed: int,
    progress: bool,
) -> Trainer:
    """The same model after as many seconds of SFT on the examples that it was shown."""
    model = checkpoint.load(source, torch.float32, default_device())
    recipe = addition_recipe(seed=seed + 1).with_(seconds=seconds)
    trainer = sft_trainer(model, tokenizer, [e.messages for e in shown], recipe)
    train(trainer, progress=progress)
    return trainer


def _right(trainer: Trainer, tokenizer: TextTokenizer, held_out: list[Example]) -> float:
    """Share of the held-out questions that the most likely answer gets right."""
    model: DeepSeekV2 = trainer.model.eval()
    ids = [prompt_ids(example.prompt, tokenizer) for example in held_out]
    with autocast(trainer.device, trainer.precision):
        return greedy_reward(model, ids, truth(held_out, tokenizer), ANSWER)

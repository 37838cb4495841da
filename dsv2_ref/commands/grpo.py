# SPDX-License-Identifier: MIT
"""`grpo`: a chat model learns from rewards, beside one that goes on with its examples."""

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from dsv2_ref import checkpoint
from dsv2_ref.alignment.addition import (
    ANSWER,
    EXAMPLES,
    addition,
    addition_recipe,
)
from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.exam import truth
from dsv2_ref.alignment.rollout import Reward, greedy_reward, grpo_trainer
from dsv2_ref.alignment.sft import sft_trainer
from dsv2_ref.bench import grpo_code
from dsv2_ref.commands.common import say, write_chat_model
from dsv2_ref.commands.options import filled
from dsv2_ref.files.whole import write_text
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import autocast, default_device, keep_freed_memory
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.proof import config_text
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.trainer import Trainer

RESULT = "result.json"


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Group relative policy optimisation of a saved model. addition: sums that a program "
        "judges; the control is as many seconds of more SFT on the sums that data/addition was "
        "shown; judged are sums that neither was ever asked. code: bodies of Python functions, "
        "which must parse, do something and be over; the control is a reward for what parses; "
        "judged on functions of files that were not trained on. Ctrl-C and signals that ask to "
        "stop save and end a run between two steps; --resume goes on from there, and does not "
        "repeat a seed that is done."
    )
    add = parser.add_argument
    add("--from", dest="source", type=filled, metavar="MODEL",
        help="folder of a saved model that is right sometimes; default: data/addition; for code "
             "build/model, which `make run` writes")
    add("--task", choices=("addition", "code"), default="addition")
    add("--seeds", type=int, default=1, metavar="N",
        help="N runs, of seeds 0 to N - 1; default: 1")
    add("--out", type=filled, default="build/grpo",
        help="a folder seed-S in it for each seed S; default: build/grpo")
    add("--resume", action="store_true", help="go on from the states in --out")
    add("--steps", type=int, help="default: 100; for code 16")
    add("--questions", type=int, default=32, help="in a step; default: 32")
    add("--group", type=int, help="answers to each question; default: 16; for code 8")
    add("--clip", type=float, default=0.2, help="epsilon of the ratio's range; default: 0.2")
    add("--beta", type=float,
        help="weight of the penalty for leaving the start; default: 0.02; for code 0.05")
    add("--normalise", choices=("sequence", "token"), default="sequence",
        help="mean over each answer's tokens, then over answers (default), or over all tokens")
    add("--lr", type=float, default=2e-4, help="peak rate; default: 2e-4")
    add("--no-control", dest="control", action="store_false", help="GRPO alone")
    add("--save-every", type=int, default=50, help="steps; default: 50; 0: at both ends alone")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=grpo_command)


def grpo_command(
    source: str | None, task: str, seeds: int, out: str, resume: bool, questions: int, lr: float,
    clip: float, normalise: str, control: bool, save_every: int, progress: bool,
    steps: int | None = None, group: int | None = None, beta: float | None = None,
) -> dict[str, Any]:
    """Into out/seed-S: log.jsonl, states, model/ and result.json. Shares of held-out questions that
    are answered rightly, means over the seeds."""
    of = TASKS[task]
    source = of.source if source is None else source
    steps, group = of.steps if steps is None else steps, of.group if group is None else group
    for name, value, least in (("seeds", seeds, 1), ("questions", questions, 1),
                               ("group", group, 2), ("save_every", save_every, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}, expected at least {least}")
    if not Path(source).is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model: {of.origin}")
    keep_freed_memory()
    loss = {"clip": clip, "beta": of.beta if beta is None else beta,
            "normalise": normalise}
    tokenizer, runs = load_tokenizer(Path(source) / "tokenizer.json"), []
    for seed in range(seeds):
        recipe = Recipe(steps=steps, batch=questions * group, optimizer="adamw", lr=lr,
                        weight_decay=0.0, protected=0.0, seed=seed, micro_batch=of.micro_batch)
        asked = of.asked(tokenizer, recipe, group, loss)
        runs.append(_one_seed(source, RunFolder(Path(out) / f"seed-{seed}"), resume, asked, control,
                              save_every, progress))
    names = ("before", "after", "control") if control else ("before", "after")
    means = {name: statistics.fmean(run[name] for run in runs) for name in names}
    return {"task": task, **means, "seeds": runs, "out": out}


class Asked(NamedTuple):
    """A task with its seed: trainers of a model, and a judge."""

    seed: int
    make: Callable[[DeepSeekV2], Trainer]
    right: Callable[[Trainer], float]                            # share of held-out questions
    control: Callable[[DeepSeekV2, Trainer, bool], Trainer]      # of the model as it was, trained
    control_is: str


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
    source: str, run: RunFolder, resume: bool, asked: Asked, control: bool, save_every: int,
    progress: bool,
) -> dict[str, Any]:
    """One run and its control, or what is missing of them."""
    done = run.path / RESULT
    if done.exists():
        if not resume:
            raise ValueError(f"{done}: exists, expected --resume to go on with it or another --out")
        say(f"{done}: done before")
        return json.loads(done.read_text(encoding="utf-8"))
    result: dict[str, Any] = {"seed": asked.seed}
    trainer = rewarded(source, run, resume, asked.make, save_every, progress, lambda trainer:
                       result.update(before=asked.right(trainer)))
    result |= {"after": asked.right(trainer), "seconds": trainer.elapsed}
    if control:
        say(f"control: {asked.control_is}")
        model = checkpoint.load(source, torch.float32, default_device())
        other = asked.control(model, trainer, progress)
        result |= {"control": asked.right(other), "control_steps": other.steps}
    write_text(done, json.dumps(result, indent=2) + "\n")
    return result


def _addition(
    tokenizer: TextTokenizer, recipe: Recipe, group: int, loss: dict[str, Any]
) -> Asked:
    """Judged are the most likely answers."""
    questions, held_out = addition()             # of seed 0: the examples are the first of them
    ids, held = ([prompt_ids(example.prompt, tokenizer) for example in part]
                 for part in (questions, held_out))

    def right(trainer: Trainer) -> float:
        with autocast(trainer.device, trainer.precision):
            return greedy_reward(trainer.model.eval(), held, truth(held_out, tokenizer), ANSWER)

    def control(model: DeepSeekV2, beside: Trainer, progress: bool) -> Trainer:
        shown = [example.messages for example in questions[:EXAMPLES]]
        again = sft_trainer(model, tokenizer, shown, addition_recipe(10**6, seed=recipe.seed + 1))
        with tqdm(total=round(beside.elapsed), unit="s", disable=not progress) as bar:
            while again.elapsed < beside.elapsed:        # on as many threads, so not by `train`
                again.step()
                bar.update(round(again.elapsed) - bar.n)
        return again

    return Asked(recipe.seed, lambda model: grpo_trainer(
        model, ids, truth(questions, tokenizer), recipe, group, ANSWER, **loss), right, control,
        "SFT on the examples for as many seconds")


def _code(
    tokenizer: TextTokenizer, recipe: Recipe, group: int, loss: dict[str, Any]
) -> Asked:
    """Judged are answers that are drawn."""
    seen, held_out = grpo_code.tasks(open_corpus("python"), tokenizer)

    def of(reward: Reward, model: DeepSeekV2) -> Trainer:
        return grpo_trainer(model, seen.questions, reward, recipe, group,
                            grpo_code.FULL.new_tokens, cut=seen.cut, **loss)

    def control(model: DeepSeekV2, _: Trainer, progress: bool) -> Trainer:
        other = of(seen.parses, model)
        train(other, progress=progress)
        return other

    def right(trainer: Trainer) -> float:
        with autocast(trainer.device, trainer.precision):
            return grpo_code.measured(trainer.model.eval(), held_out, recipe.seed)["finished"]

    return Asked(recipe.seed, partial(of, seen.finished), right, control,
                 "as many steps with a reward for what parses")


class Task(NamedTuple):
    """Where a task begins and what its run is like, unless it is said otherwise."""

    asked: Callable[[TextTokenizer, Recipe, int, dict[str, Any]], Asked]
    source: str
    origin: str
    steps: int
    group: int
    beta: float
    micro_batch: int | None = None


TASKS = {"addition": Task(_addition, "data/addition", "data/addition of a checkout", 100, 16, 0.02),
         "code": Task(_code, "build/model", "`make run` writes build/model", 16, 8, 0.05, 64)}

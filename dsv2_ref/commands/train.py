# SPDX-License-Identifier: MIT
"""`train`: a preset or a saved model, and a recipe, into a run folder."""

import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from dsv2_ref.checkpoint import check_place
from dsv2_ref.commands.common import save_model, say
from dsv2_ref.commands.jobs import NEEDLE, RECIPES, Job, job_of
from dsv2_ref.commands.options import CORPORA, filled
from dsv2_ref.commands.ranks import Wish, add_layout, restarted, said_once, world_of
from dsv2_ref.config import PRESETS
from dsv2_ref.files.whole import write_text
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.data import some_of
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import keep_freed_memory, memory
from dsv2_ref.training.memory import Plan, plan
from dsv2_ref.training.pretrain import TrainingDiverged, train
from dsv2_ref.training.proof import config_text
from dsv2_ref.training.run_folder import RunFolder, load_state, read_log, state_of
from dsv2_ref.training.setup import Setup
from dsv2_ref.training.watching import Watch
from dsv2_ref.training.world import World


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Train a preset, or go on with a saved model, into a folder. Ctrl-C, SIGTERM, SIGHUP and "
        "SIGUSR1 save and end the run between two steps; --resume goes on from there, bit for bit."
    )
    add = parser.add_argument
    add("--preset", type=filled,
        help=f"{', '.join(PRESETS)}; {', '.join(NEEDLE)} learn to find needles; default: small")
    add("--recipe", choices=RECIPES,
        help="ours, the paper's, or the ladder's; the options below change it; default: the "
             "preset's own on the ladder, else minutes")
    add("--from", dest="source", type=filled, metavar="FOLDER",
        help="a saved model to go on from, with --extend")
    add("--extend", type=float, metavar="S",
        help="read S times as far with YaRN, and tune, by default for 50 steps at a quarter of "
             "that length")
    add("--corpus", type=filled,
        help=f"{CORPORA}; default: python, or stories to hide needles in")
    add("--text-bytes", type=float, help="as 40e6; so much of it to train on, not all")
    add("--out", type=filled, default="build/train")
    add("--resume", action="store_true",
        help="go on from the state in --out; a --lr given here may differ from before")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default 300, or what the preset comes with")
    length.add_argument("--seconds", type=float)
    length.add_argument("--tokens", type=float, help="as 5e6; in whole steps of batch x sequence")
    add("--optimizer", choices=("muon", "adamw", "adamw8"))
    add("--weights", choices=("fp32", "bf16"), help="bf16: with adamw8 alone")
    add("--rate-schedule", dest="schedule", choices=("linear", "step"))
    add("--precision", choices=("auto", "fp32", "bf16"))
    add("--lr", type=float, help="peak rate; AdamW's beside Muon moves in proportion")
    for name in ("warmup", "protected", "recompute"):
        add(f"--{name}", type=float, help="a share from 0 to 1")
    for name in ("sequence", "batch", "seed"):
        add(f"--{name}", type=int)
    add("--micro-batch", type=int,
        help="sequences at a time, of all ranks together; the budget of dropping is counted within "
             "each, so losses differ by about 1e-5 from those of the whole batch")
    add("--save-every", type=int, default=100, help="steps; 0: at both ends alone")
    add("--evaluate-every", type=int, default=0, help="steps; 0 for at the end alone")
    add("--no-save", dest="save", action="store_false", help="write the log alone")
    add("--watch", choices=("tensorboard", "trackio"), help="beside log.jsonl")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    add_layout(parser)
    parser.set_defaults(act=train_command)


def train_command(
    preset: str | None, recipe: str | None, corpus: str | None, out: str, resume: bool,
    save_every: int, evaluate_every: int, progress: bool, tokens: float | None = None,
    save: bool = True, watch: str | None = None, text_bytes: float | None = None,
    source: str | None = None, extend: float | None = None, ep: int = 1, pp: int = 1,
    pipeline: str | None = None, zero1: bool = False, **changes: Any,
) -> dict[str, Any] | None:
    """Train a preset, or the saved model in `source`, into `out`: log.jsonl, tokenizer.json,
    config.json and, with `save`, states and model/. None on a process that is not the first."""
    with said_once():
        job = job_of(preset, recipe, tokens, source, extend, changes)
        if min(save_every, evaluate_every) < 0:
            raise ValueError(f"save_every: {save_every}, evaluate_every: {evaluate_every}, "
                             "expected numbers of steps, 0 for never")
    with world_of(Wish(ep, pp, pipeline, zero1), job) as world, ExitStack() as opened:
        run = RunFolder(out)
        tell = say if world.first else lambda text: None
        opened.enter_context(_memory_told())
        world.first_does(lambda: opened.enter_context(run.held()) and None)
        if restarted(world) and world.first_does(lambda: bool(run.states)):
            resume = True
        state = world.first_does(lambda: _state(run, resume, save, world.several))
        watching = None
        if watch and world.first:
            watching = Watch(watch, run.path, state[2]["steps"] if state else 0, say)
            opened.enter_context(closing(watching))
        with said_once():
            setup = _set_up(job, run, corpus, text_bytes, resume, world)
        if state:
            _restore(setup, state, changes.get("lr") is not None, tell)
        elif world.first:
            write_text(run.path / "tokenizer.json", setup.tokenizer.to_json())
            write_text(run.path / "config.json", config_text(setup.model.config))
        tell(setup.corpus.origin)
        tell(f"{job.name}: {setup.describe()}")
        return _train(setup, run, save_every if save else None, evaluate_every,
                      progress and world.first, watching)


def _state(run: RunFolder, resume: bool, save: bool, several: bool) -> tuple | None:
    """The state to go on from, None for a new run; what would be overwritten is ours.

    Of `several` processes each reads its own tensors later.
    """
    state = run.newest(say, state_of if several else load_state) if resume else None
    if resume:
        run.check_log()
    else:
        run.check_new()
    if save:
        check_place(run.path / "model", overwrite=True)
    return state


def _set_up(
    job: Job, run: RunFolder, corpus: str | None, text_bytes: float | None, resume: bool,
    world: World,
) -> Setup:
    keep_freed_memory()
    tokenizer = load_tokenizer(run.path / "tokenizer.json") if resume else None
    text = open_corpus(corpus or job.corpus)
    if text_bytes is not None:
        text = some_of(text, text_bytes)
    return job.set_up(text, tokenizer, world)


def _restore(
    setup: Setup, state: tuple, other_rates: bool, tell: Callable[[str], None]
) -> None:
    path, tensors, facts = state
    trainer = setup.trainer
    if trainer.world.several:
        tensors, _ = trainer.world.load(path, trainer)
    trainer.restore(path, tensors, facts, other_rates=other_rates)
    tell(f"resumed after step {trainer.steps}")
    if (before := facts["recipe"]["lr"]) != trainer.recipe.lr:
        tell(f"peak rate: {trainer.recipe.lr:.2e} from here on, {before:.2e} before")


def _train(
    setup: Setup, run: RunFolder, save_every: int | None, evaluate_every: int, progress: bool,
    watching: Watch | None,
) -> dict[str, Any] | None:
    """Run it and sum it up; a `save_every` of None saves nothing."""
    trainer, world, model = setup.trainer, setup.trainer.world, run.path / "model"
    planned = None if world.several else _planned(setup)

    def check_more() -> None:
        if trainer.progress >= 1 and (save_every is None or model.exists()):
            raise ValueError(f"steps: the run in {run.path} is at its end, expected more steps to "
                             "go on")

    world.first_does(check_more)
    log = train(trainer, run, save_every, lambda: setup.held_out(setup.corpus.validation),
                evaluate_every, progress=progress, watch=watching)
    bits = setup.held_out(setup.corpus.validation)
    if not math.isfinite(bits):
        if save_every is not None and world.first:
            run.forget_from(trainer.last_update)
        raise TrainingDiverged(f"bits_per_byte: {bits} after step {trainer.steps}, the model is "
                               "not saved, try a lower lr or a longer warmup")
    if save_every is not None:
        save_model(setup, model)
    return _result(setup, run, log, bits, planned) if world.first else None


def _planned(setup: Setup) -> Plan:
    """The memory plan of a step, told; ValueError where it will not fit."""
    trainer = setup.trainer
    planned = plan(setup.model, trainer.recipe, trainer.precision)
    say(f"memory planned: {planned.lines()}")
    _check_free(planned, trainer.device)
    return planned


def _result(
    setup: Setup, run: RunFolder, log: list[dict[str, Any]], bits: float, planned: Plan | None
) -> dict[str, Any]:
    trainer = setup.trainer
    last = (log or read_log(run.path))[-1]
    result = {
        "steps": trainer.steps, "tokens": trainer.tokens,
        "loss": last.get("language", last["loss"]), "bits_per_byte": bits,
        "tokens_per_second": trainer.tokens / trainer.elapsed, "out": str(run.path),
    }
    if "answer" in last:                         # of a model that learns to find needles
        result["answer_loss"] = last["answer"]
    if trainer.device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        if planned:
            result["planned_peak_bytes"] = planned.peak
    return result


def _check_free(planned: Plan, device: torch.device) -> None:
    """ValueError if a step will not find its memory; the weights have theirs already."""
    free, _ = memory(device)
    if free is not None and planned.peak - planned.weights > free:
        raise ValueError(f"memory: {planned.peak / 2**30:,.2f} GiB planned, expected at most "
                         f"{(free + planned.weights) / 2**30:,.2f} that are free; try a smaller "
                         "--micro-batch, --recompute 1 or --optimizer adamw8")


@contextmanager
def _memory_told() -> Iterator[None]:
    """Running out of memory is a ValueError of one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        why = str(error)
    except RuntimeError as error:                # torch's allocator on a CPU has no type of its own
        why = str(error)
        if not any(words in why for words in ("allocate memory", "enough memory")):
            raise
    else:
        return
    raise ValueError(f"memory: used up ({' '.join(why.split())[:120]}); try a smaller "
                     "--micro-batch, --recompute 1 or --optimizer adamw8")

# SPDX-License-Identifier: MIT
"""`sft`: a saved model learns conversations, into a run folder."""

from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.addition import (
    ANSWER,
    EXAMPLES,
    addition,
    addition_recipe,
    addition_tokenizer,
    addition_trainer,
)
from dsv2_ref.alignment.exam import exact_match
from dsv2_ref.alignment.sft import EPOCHS, recipe_for, sft_trainer
from dsv2_ref.commands.common import say, write_chat_model
from dsv2_ref.commands.options import filled
from dsv2_ref.files.whole import write_text
from dsv2_ref.text.conversations import read_conversations
from dsv2_ref.text.instructions import TRAINED_KINDS, Example, examples
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import autocast, default_device, keep_freed_memory
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.proof import config_text
from dsv2_ref.training.run_folder import RunFolder, read_log
from dsv2_ref.training.trainer import Trainer


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a saved model on conversations, with the loss on answers alone, into a folder. "
        "Ctrl-C and signals that ask to stop save and end the run between two steps; --resume goes "
        "on from there, bit for bit."
    )
    add = parser.add_argument
    add("--from", dest="source", type=filled, metavar="MODEL",
        help="folder of a saved model, as data/model")
    add("--data", type=filled, default="builtin", metavar="FILE.jsonl|builtin|addition",
        help='a file with {"messages": [{"role": ..., "content": ...}, ...]} on each line; the '
             "generated instruction set (default), whose held-out questions are then asked; or "
             f"addition: {EXAMPLES} sums, which a new small model learns, without --from")
    add("--examples", dest="n_examples", type=int, help="of the generated set; default: 3200")
    add("--out", type=filled, default="build/sft")
    add("--resume", action="store_true", help="go on from the state in --out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="default: 2, the paper's")
    length.add_argument("--steps", type=int)
    add("--batch", type=int, help="conversations; default: 32, of sums 128")
    add("--micro-batch", type=int, help="conversations at a time; the loss stays the same")
    add("--optimizer", choices=("muon", "adamw", "adamw8"))
    add("--lr", type=float, help="peak rate; default: 4e-3. The paper's, for V2, is 5e-6")
    add("--sequence", type=int, help="most tokens of a conversation; default: 1024")
    add("--precision", choices=("auto", "fp32", "bf16"))
    add("--seed", type=int)
    add("--save-every", type=int, default=100, help="steps; 0: at both ends alone")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=sft_command)


def sft_command(
    source: str | None, data: str, out: str, resume: bool, epochs: float | None, save_every: int,
    progress: bool, n_examples: int | None = None, **changes: Any,
) -> dict[str, Any]:
    """Tune the model in `source`, into `out`: log.jsonl, tokenizer.json, config.json, states and
    model/, which carries the chat template."""
    if save_every < 0:
        raise ValueError(f"save_every: {save_every}, expected a number of steps, 0 for never")
    job = _sums(source, epochs, n_examples, changes) if data == "addition" else _tuning(
        source, data, n_examples, epochs, changes)
    run, tokenizer = RunFolder(out), job.tokenizer
    with ExitStack() as opened:
        opened.enter_context(run.held())
        state = run.newest(say) if resume else None
        run.check_log() if resume else run.check_new()
        checkpoint.check_place(run.path / "model", overwrite=True)
        keep_freed_memory()
        trainer = job.make()
        before = _exam(trainer, job)
        if state:
            trainer.restore(*state)
            say(f"resumed after step {trainer.steps}")
        else:
            write_text(run.path / "tokenizer.json", tokenizer.to_json())
            write_text(run.path / "config.json", config_text(trainer.model.config))
        if trainer.progress >= 1 and (run.path / "model").exists():
            raise ValueError(f"steps: the run in {run.path} is at its end, expected more steps to "
                             "go on")
        say(f"{job.name}, {trainer.recipe.steps} steps of {trainer.recipe.batch}")
        log = train(trainer, run, save_every, progress=progress)
        write_chat_model(trainer.model, tokenizer, run.path / "model")
        result = {"steps": trainer.steps, "conversations": job.conversations,
                  "answer_loss": (log or read_log(run.path))[-1]["answer"], "out": str(run.path)}
        if before:
            result |= {"before": before, "after": _exam(trainer, job)}
        return result


class _Job(NamedTuple):
    name: str
    conversations: int
    tokenizer: TextTokenizer
    make: Callable[[], Trainer]          # reads the model, so it comes behind all checks
    asked: list[Example]                 # before and after; none for a file of one's own
    answer: int = 48                     # most tokens of an answer to these


def _tuning(
    source: str | None, data: str, n_examples: int | None, epochs: float | None,
    changes: dict[str, Any],
) -> _Job:
    """A saved model that learns a file, or the generated set."""
    if source is None or not Path(source).is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model, as data/model")
    talks = _conversations(data, n_examples, changes.get("seed") or 0)
    tokenizer = load_tokenizer(Path(source) / "tokenizer.json")
    changes = {"batch": 32} | {name: x for name, x in changes.items() if x is not None}

    def make() -> Trainer:
        model = checkpoint.load(source, torch.float32, default_device())
        recipe = recipe_for(len(talks), EPOCHS if epochs is None else epochs, **changes)
        return sft_trainer(model, tokenizer, talks, recipe)

    asked = examples(10 * len(TRAINED_KINDS), 0, held_out=True) if data == "builtin" else []
    return _Job(f"{source}: {len(talks)} conversations", len(talks), tokenizer, make, asked)


def _sums(
    source: str | None, epochs: float | None, n: int | None, changes: dict[str, Any]
) -> _Job:
    """A new model that learns sums."""
    if n is not None:
        raise ValueError(f"--examples: {n}, expected none with sums, which are {EXAMPLES}")
    if source is not None:
        raise ValueError(f"--from: {source!r}, expected none with sums, whose model is new")
    if epochs is not None:
        raise ValueError(f"--epochs: {epochs}, expected --steps with sums")
    tokenizer = addition_tokenizer()
    questions, held_out = addition(changes.get("seed") or 0)

    def make() -> Trainer:
        return addition_trainer(questions, tokenizer, addition_recipe(**changes))

    return _Job(f"a new model: {EXAMPLES} sums", EXAMPLES, tokenizer, make, held_out,
                ANSWER)


def _conversations(data: str, n: int | None, seed: int) -> list[list[dict[str, str]]]:
    if data == "builtin":
        return [list(e.messages) for e in examples(3200 if n is None else n, seed)]
    if n is not None:
        raise ValueError(f"--examples: {n}, expected none with a file, all of which is read")
    return read_conversations(data)


def _exam(trainer: Trainer, job: _Job) -> dict[str, float]:
    """Share of held-out questions answered right, by kind."""
    with autocast(trainer.device, trainer.precision):
        return exact_match(trainer.model.eval(), job.tokenizer, job.asked, job.answer)

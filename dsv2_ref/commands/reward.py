# SPDX-License-Identifier: MIT
"""`reward`: a reward model is trained from a saved chat model and judged answers."""

import copy
from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint, figures
from dsv2_ref.alignment.calibration import calibration_error
from dsv2_ref.alignment.judged import (
    Judge,
    Judged,
    by_compiler,
    by_truth,
    judged_preferences,
    judged_samples,
    split_preferences,
)
from dsv2_ref.alignment.reward import RewardModel
from dsv2_ref.alignment.reward_training import (
    EPOCHS,
    OBJECTIVES,
    judge_rewards,
    reward_trainer,
    rows_of,
    save_reward_model,
)
from dsv2_ref.alignment.sandbox import Uncontained
from dsv2_ref.alignment.sandbox import run as run_program
from dsv2_ref.alignment.sft import recipe_for
from dsv2_ref.commands.common import files_for_others, say
from dsv2_ref.commands.options import filled
from dsv2_ref.files.whole import write_text
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import read_preferences
from dsv2_ref.text.instructions import TRAINED_KINDS, examples
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import autocast, default_device, keep_freed_memory
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.proof import config_text
from dsv2_ref.training.run_folder import RunFolder, read_log
from dsv2_ref.training.trainer import Trainer

QUESTIONS, HELD_OUT, GROUP = 480, 10 * len(TRAINED_KINDS), 8
PICTURE = "calibration.png"


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Train a reward model, which begins as a saved chat model, on answers that were judged, "
        "into a folder; it is judged on questions that it was not trained on. Ctrl-C and signals "
        "that ask to stop save and end the run between two steps; --resume goes on from there."
    )
    add = parser.add_argument
    add("--from", dest="source", type=filled, metavar="MODEL", required=True,
        help="folder of a chat model, as `sft` leaves it in OUT/model")
    add("--data", type=filled, default="builtin", metavar="FILE.jsonl|builtin",
        help='a file with {"messages": [...], "chosen": "...", "rejected": "..."} on each line, or '
             "8 answers of MODEL to each question of the generated set, judged by a program, code "
             "in the sandbox (default)")
    add("--questions", type=int, help=f"of the generated set; default: {QUESTIONS}")
    add("--loss", choices=tuple(OBJECTIVES), default="pair",
        help="pair: which of two answers is better; point: whether one is right")
    add("--out", type=filled, default="build/reward")
    add("--resume", action="store_true", help="go on from the state in --out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=EPOCHS, help="default: 1")
    length.add_argument("--steps", type=int)
    add("--batch", type=int, default=32, help="pairs, or answers")
    add("--micro-batch", type=int, help="pairs or answers at a time; the loss stays the same")
    add("--optimizer", choices=("muon", "adamw", "adamw8"))
    add("--lr", type=float, help="peak rate; default: 4e-3")
    add("--sequence", type=int, help="most tokens of a question and answer; default: 1024")
    add("--precision", choices=("auto", "fp32", "bf16"))
    add("--seed", type=int)
    add("--save-every", type=int, default=100, help="steps; 0: at both ends alone")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=reward_command)


def reward_command(
    source: str, data: str, loss: str, out: str, resume: bool, epochs: float, batch: int,
    save_every: int, progress: bool, questions: int | None = None, **changes: Any,
) -> dict[str, Any]:
    """Train on the answers, into `out`: log.jsonl, tokenizer.json, config.json, states, a picture,
    and model/, which `load_reward_model` reads."""
    if not Path(source).is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model")
    if save_every < 0:
        raise ValueError(f"save_every: {save_every}, expected a number of steps, 0 for never")
    tokenizer = load_tokenizer(Path(source) / "tokenizer.json")
    run = RunFolder(out)
    with ExitStack() as opened:
        opened.enter_context(run.held())
        state = run.newest(say) if resume else None
        run.check_log() if resume else _check_new(run)
        checkpoint.check_place(run.path / "model", overwrite=True)
        keep_freed_memory()
        model = checkpoint.load(source, torch.float32, default_device())
        seen, held_out = _judged(model, tokenizer, data, questions, changes.get("seed") or 0)
        rows, _ = rows_of(seen, loss)
        pairs = held_out.pairs()
        if not rows or not pairs:
            raise ValueError(f"answers: {len(rows)} to train on, {len(pairs)} held-out pairs, "
                             "expected some of both: answers to one question that are worth "
                             "different; more --questions, or a model that is right sometimes")
        recipe = recipe_for(len(rows), epochs, batch, **changes)
        trainer = reward_trainer(RewardModel(model), seen, loss, recipe)
        result = {"loss": loss, "before": _judgement(trainer, held_out, loss)}
        if state:
            trainer.restore(*state)
            say(f"resumed after step {trainer.steps}")
        else:
            write_text(run.path / "tokenizer.json", tokenizer.to_json())
            write_text(run.path / "config.json", config_text(model.config))
        if trainer.progress >= 1 and (run.path / "model").exists():
            raise ValueError(f"steps: the run in {run.path} is at its end, expected more steps to "
                             "go on")
        log = train(trainer, run, save_every, load_every=0, progress=progress)
        _write(trainer.model, tokenizer, run.path / "model")
        after = _judgement(trainer, held_out, loss, run.path / PICTURE)
        return {"steps": trainer.steps, "rows": len(rows), "held_out_pairs": len(pairs),
                **result, "after": after, "last_loss": (log or read_log(run.path))[-1]["loss"],
                "out": str(run.path)}


def _check_new(run: RunFolder) -> None:
    """ValueError if a new run here would replace what no run wrote."""
    run.check_new()
    if (run.path / PICTURE).exists():
        raise ValueError(f"{run.path / PICTURE}: exists, expected another --out, or this moved "
                         "away")


def _judged(
    model: DeepSeekV2, tokenizer: TextTokenizer, data: str, n: int | None, seed: int
) -> tuple[Judged, Judged]:
    """Answers to train on, and answers to questions that are held out."""
    if data != "builtin":
        if n is not None:
            raise ValueError(f"--questions: {n}, expected none with a file, all of which is read")
        seen, held_out = split_preferences(read_preferences(data))
        return judged_preferences(seen, tokenizer), judged_preferences(held_out, tokenizer)
    asked = examples(QUESTIONS if n is None else n, seed), examples(HELD_OUT, 0, held_out=True)
    judge = _judge()
    say(f"{GROUP} answers to each of {len(asked[0])} questions, and of {HELD_OUT} held-out ones")
    seen, held_out = (judged_samples(model, tokenizer, some, GROUP, judge=judge, seed=seed)
                      for some in asked)
    return seen, held_out


def _judge() -> Judge:
    """By the compiler where programs can be contained; else code is compared as text."""
    try:
        run_program("")
        return by_compiler
    except Uncontained as error:
        say(f"{error}: code is compared with the right program and not run")
        return by_truth


def _judgement(
    trainer: Trainer, held_out: Judged, loss: str, picture: Path | None = None
) -> dict[str, Any]:
    """Accuracy on held-out pairs, and the calibration of what the loss predicts."""
    with autocast(trainer.device, trainer.precision):
        found = judge_rewards(trainer.model.eval(), held_out)
    bins = found[loss][1]
    if picture is not None:
        what = {"pair": "the first answer wins", "point": "the answer is right"}[loss]
        figures.save(figures.calibration_curves({"reward model": bins}, what), picture)
    return {"pair_accuracy": found["pair"][0], "calibration_error": calibration_error(bins),
            "calibration": [list(b) for b in bins]}


def _write(rewards: RewardModel, tokenizer: TextTokenizer, path: Path) -> None:
    """In bf16, with what others read beside it, as `sft` writes its model."""
    files = files_for_others(tokenizer, rewards.config)
    save_reward_model(copy.deepcopy(rewards).bfloat16(), path, files, overwrite=True)

# SPDX-License-Identifier: MIT
"""`align`: from a base model to a chat model, all of section 4 in small.

    base     a pretrained model, as data/model
    sft      it learns conversations of the generated set (4.1)
    reward   a reward model, from answers of sft that a program judged
    stage 1  GRPO on what a program can check: the reward is its verdict (35). Asked are the kinds
             that sft gets right sometimes: where all or no answers are right there is no spread
    stage 2  GRPO on preference, three rewards added up (36): the reward model's number is helpful;
             safe is to refuse what should be refused and nothing else; the rule is to come to an
             end, and to write Chinese only where Chinese was asked. A reward model that is hardly
             better than chance on held-out pairs is not asked: what follows one forgets a lot

Every stage has a run folder in --out; one that is done is not done again.
"""

import json
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint, figures
from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.exam import exact_match, truth
from dsv2_ref.alignment.judged import judged_samples
from dsv2_ref.alignment.reward import preference_reward
from dsv2_ref.alignment.reward_training import as_reward, load_reward_model
from dsv2_ref.alignment.rollout import Reward, grpo_trainer
from dsv2_ref.commands.common import output_folder, say
from dsv2_ref.commands.grpo import rewarded
from dsv2_ref.commands.options import filled
from dsv2_ref.commands.reward import reward_command
from dsv2_ref.commands.sft import sft_command
from dsv2_ref.files.whole import write_text
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.text.corpora import Document, byte_count, open_corpus
from dsv2_ref.text.data import marked
from dsv2_ref.text.instructions import HELD_OUT_KINDS, TRAINED_KINDS, Example, examples
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import default_device
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder

TO_REFUSE = ("unknown", "refusal")
REASONING = tuple(kind for kind in TRAINED_KINDS if kind not in (*TO_REFUSE, "words"))
C_HELPFUL, C_SAFETY, C_RULE = 0.2, 1.0, 0.5          # of (36); the paper does not name them
SOMETIMES = (0.1, 0.9)                               # shares of right answers
TRUSTED = 0.6                                        # least share of pairs that it judges rightly
ANSWER = 40                                          # most tokens of one
PICTURE = "align.png"


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Base, SFT, reward model, GRPO in two stages, and a table of every checkpoint on every "
        "kind of held-out question, and on the text that the base was trained on. Started again, "
        "it goes on where it stopped."
    )
    add = parser.add_argument
    add("--from", dest="source", type=filled, metavar="MODEL", default="data/model",
        help="folder of a base model; default: data/model")
    add("--corpus", type=filled, default="stories",
        help="that the base was trained on; default: stories")
    add("--out", type=filled, default="build/align", help="default: build/align")
    add("--sft-steps", type=int, default=1000, help="of 32 conversations; default: 1000")
    add("--reward-questions", type=int, default=480,
        help="8 answers to each are judged; default: 480")
    add("--grpo-steps", type=int, default=60,
        help="of stage 1, 32 questions with 8 answers each; stage 2 has half as many; default: 60")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=align_command)


def align_command(
    source: str, corpus: str, out: str, sft_steps: int, reward_questions: int, grpo_steps: int,
    progress: bool,
) -> dict[str, Any]:
    """All stages into `out`, and the table. Times are of this call: 0 for what was done before."""
    _check(source, sft_steps=sft_steps, reward_questions=reward_questions, grpo_steps=grpo_steps)
    held_out = open_corpus(corpus).validation[:200]
    folder = output_folder(out)
    _check_same(folder, {"from": str(Path(source).resolve()), "corpus": corpus, "sft_steps":
                         sft_steps, "reward_questions": reward_questions, "grpo_steps": grpo_steps})
    models = {"base": Path(source)} | {
        name: folder / name / "model" for name in ("sft", "reward", "stage-1", "stage-2")}
    told, seconds = folder / "reward.json", {}

    def stage(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        if not models[name].exists():
            say(f"-- {name}")
            work()
        seconds[name] = round(time.perf_counter() - began, 1)

    def states(name: str) -> bool:
        return bool(RunFolder(folder / name).states)

    stage("sft", lambda: sft_command(
        source, "builtin", str(folder / "sft"), states("sft"), None, 100, progress,
        n_examples=max(sft_steps, 1) * 16, steps=sft_steps))
    if models["reward"].exists() and not told.exists():      # stopped before it was judged
        shutil.rmtree(models["reward"])
    stage("reward", lambda: write_text(told, json.dumps(reward_command(
        str(models["sft"]), "builtin", "pair", str(folder / "reward"), states("reward"), 3.0, 32,
        100, progress, reward_questions))))
    tokenizer = load_tokenizer(models["sft"] / "tokenizer.json")
    stage("stage-1", lambda: _grpo(
        models["sft"], RunFolder(folder / "stage-1"), tokenizer,
        examples(2000, seed=1, kinds=_sometimes_right(models["sft"], tokenizer)), grpo_steps, 3e-4,
        None, progress))
    judge = json.loads(told.read_text(encoding="utf-8"))
    stage("stage-2", lambda: _grpo(
        models["stage-1"], RunFolder(folder / "stage-2"), tokenizer, examples(2000, seed=2),
        max(grpo_steps // 2, 1), 1e-4, models["reward"], progress,
        _weight(judge["after"]["pair_accuracy"])))
    table = {name: _judged(models[name], tokenizer, held_out)
             for name in ("base", "sft", "stage-1", "stage-2")}
    figures.save(figures.exam_table(table), folder / PICTURE)
    say(_lines(table))
    accuracy = {when: judge[when]["pair_accuracy"] for when in ("before", "after")}
    return {"table": table, "reward_accuracy": accuracy, "seconds": seconds, "out": str(folder)}


def _weight(accuracy: float) -> float:
    """Of what the reward model says, by its accuracy on held-out pairs."""
    if accuracy >= TRUSTED:
        return C_HELPFUL
    say(f"the reward model judges {accuracy:.0%} of held-out pairs rightly, and is not asked")
    return 0.0


def _check(source: str, **numbers: int) -> None:
    if not Path(source).is_dir():
        raise ValueError(f"--from: {source!r} is no folder, expected a saved model, as data/model")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")


def _check_same(folder: Path, asked: dict[str, Any]) -> None:
    """ValueError where the folder holds other things than an earlier part of the same."""
    note = folder / "align.json"
    if not note.exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder}: holds other files, expected a new or empty folder, or an "
                             "earlier alignment")
        write_text(note, json.dumps(asked, indent=2) + "\n")
    before = json.loads(note.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(f"{name}: {value!r}, expected {before.get(name)!r}, with which "
                             f"{folder} was begun, or another --out")


def _sometimes_right(sft: Path, tokenizer: TextTokenizer) -> list[str]:
    """Kinds of reasoning of which some sampled answers are right and some are wrong; if there is
    none, all kinds."""
    model, found = checkpoint.load(sft, torch.float32, default_device()), []
    for kind in REASONING:
        asked = examples(16, seed=0, kinds=(kind,))
        shares = judged_samples(model, tokenizer, asked, 4, ANSWER).rewards.mean(1)
        if SOMETIMES[0] <= shares.mean() <= SOMETIMES[1]:
            found.append(kind)
    say(f"sometimes right: {', '.join(found) or 'nothing'}")
    return found or list(REASONING)


def _grpo(
    before: Path, run: RunFolder, tokenizer: TextTokenizer, asked: Sequence[Example], steps: int,
    lr: float, judge: Path | None, progress: bool, c_helpful: float = 0.0,
) -> None:
    """A stage: 1 without a reward model, 2 with one, which is followed more slowly."""
    ids = [prompt_ids(example.prompt, tokenizer) for example in asked]
    reward = truth(asked, tokenizer)
    if judge is not None:
        helpful = load_reward_model(judge, torch.float32, default_device())
        reward = preference(asked, tokenizer, as_reward(helpful, ids, tokenizer), c_helpful)
    recipe = Recipe(steps=steps, batch=256, optimizer="adamw", lr=lr, warmup=0.2,
                    weight_decay=0.0, protected=0.0)
    beta = 0.02 if judge is None else 0.1
    rewarded(before, run, True, lambda model: grpo_trainer(
        model, ids, reward, recipe, 8, ANSWER, beta=beta), 20, progress)


def preference(
    asked: Sequence[Example], tokenizer: TextTokenizer, helpful: Reward,
    c_helpful: float = C_HELPFUL,
) -> Reward:
    """(36) on these questions, from a reward model's numbers and two rules."""
    refusals = {e.answer for kind in TO_REFUSE for e in examples(40, kinds=(kind,))}

    def of(which: Sequence[int], answers: Sequence[list[int]]) -> list[float]:
        safety, rule = [], []
        for i, answer in zip(which, answers, strict=True):
            text = tokenizer.decode(answer).strip()
            right = asked[i].check(text) if asked[i].kind in TO_REFUSE else text not in refusals
            chinese = any("\u4e00" <= letter <= "\u9fff" for letter in text)
            safety.append(float(right))
            rule.append(float(len(answer) < ANSWER and chinese <= (asked[i].language == "zh")))
        scored = torch.tensor(helpful(which, answers), dtype=torch.float64)
        return preference_reward(scored, torch.tensor(safety).double(), torch.tensor(rule).double(),
                                 c_helpful, C_SAFETY, C_RULE).tolist()

    return of


def _judged(
    folder: Path, tokenizer: TextTokenizer, documents: list[Document]
) -> dict[str, float]:
    """Shares of held-out questions answered rightly by kind, and bits per byte of held-out text."""
    model = checkpoint.load(folder, torch.float32, default_device())
    kinds = (*TRAINED_KINDS, *HELD_OUT_KINDS)
    asked = examples(20 * len(kinds), 0, kinds, held_out=True)
    bits = bits_per_byte(model, list(marked(documents, tokenizer)), byte_count(documents),
                         min(256, model.config.max_positions))
    return exact_match(model, tokenizer, asked) | {"bits_per_byte": bits}


def _lines(table: dict[str, dict[str, float]]) -> str:
    """The table as text, a line for each kind."""
    rows = [f"{'':16}" + "".join(f"{name:>10}" for name in table)]
    for kind in next(iter(table.values())):
        digits = 3 if kind == "bits_per_byte" else 2
        rows.append(f"{kind:16}" + "".join(f"{of[kind]:10.{digits}f}" for of in table.values()))
    return "\n".join(rows)

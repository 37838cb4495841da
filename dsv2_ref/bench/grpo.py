# SPDX-License-Identifier: MIT
"""GRPO on addition: does a policy learn more from its own answers than from more of the examples?

A small model learns to add two numbers of two digits from `EXAMPLES` conversations (SFT), until
about four of ten of its answers to other questions are right. From there it goes on in three ways:

  grpo       its own answers, judged by a program, to questions whose answers it was never shown
  rejection  as many steps, but the answers that are right are learned like examples, others
             forgotten
  control    SFT goes on for as many CPU seconds as GRPO took: the same examples, the same
             optimiser, and no question outside them

Groups without spread are left out of both: their answers would cost as much as others and teach
nothing.

What is judged are pairs that nobody asks in training, nor in the other order (`held_out` of
alignment/addition.py). In the curves, by CPU seconds without judging: `right` is the share that the
most likely answer gets right, `sampled` that of one answer drawn at temperature 1. `crossover` is
the second from which on GRPO is ahead of the control to its end, or None.
`interval` is ± of the mean over the seeds, Student's t at 95 %.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv2_ref.alignment.addition import (
    ANSWER,
    EXAMPLES,
    POSITIONS,
    addition,
    addition_recipe,
    addition_tokenizer,
    addition_trainer,
)
from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.exam import truth
from dsv2_ref.alignment.rollout import Rollouts, greedy_reward, objective, sample_answers
from dsv2_ref.bench.needle import T_95
from dsv2_ref.inference.evaluate import token_log_probs
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.instructions import Example
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.machine import machine
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer

LEAST = 0.42                         # SFT stops when so many of other questions are right
STEPS, QUESTIONS, GROUP, LR = 300, 32, 16, 2e-4       # of GRPO
POINTS = 10                          # of a curve
Judge = Callable[[DeepSeekV2], dict[str, float]]


def grpo_recipe(seed: int, steps: int = STEPS, rows: int = QUESTIONS * GROUP) -> Recipe:
    """The rate falls to the end: a step is as noisy as its few questions."""
    return Recipe(steps=steps, optimizer="adamw", lr=LR, weight_decay=0.0, batch=rows, seed=seed,
                  protected=0.0, sequence=POSITIONS, precision="fp32")


def prompts(asked: Sequence[Example], tokenizer: TextTokenizer) -> list[list[int]]:
    return [prompt_ids(example.prompt, tokenizer) for example in asked]


def learned(
    questions: Sequence[Example], tokenizer: TextTokenizer, seed: int, least: float = LEAST
) -> tuple[Trainer, float]:
    """SFT up to `least`; the trainer as it stands, and its CPU seconds.

    When to stop is told by questions that are no examples. The held-out ones are not looked at.
    """
    recipe = addition_recipe(20_000, seed=seed)
    trainer, spent = addition_trainer(questions, tokenizer, recipe), 0.0
    asked = questions[EXAMPLES : EXAMPLES + 400]
    ids, reward = prompts(asked, tokenizer), truth(asked, tokenizer)
    while trainer.progress < 1:
        began = time.process_time()
        for _ in range(10):
            trainer.step()
        spent += time.process_time() - began
        if greedy_reward(trainer.model.eval(), ids, reward, ANSWER) >= least:
            break
    return trainer, spent


def judge_of(held_out: Sequence[Example], tokenizer: TextTokenizer) -> Judge:
    """Shares of right answers to the held-out questions."""
    ids, reward = prompts(held_out, tokenizer), truth(held_out, tokenizer)

    def judge(model: DeepSeekV2) -> dict[str, float]:
        model.eval()
        draws, drawn = torch.Generator().manual_seed(0), []
        for start in range(0, len(ids), 256):
            said = sample_answers(model, ids[start : start + 256], 1, ANSWER, draws)
            drawn += reward(range(start, start + len(said.answers)), said.answers)
        return {"right": greedy_reward(model, ids, reward, ANSWER),
                "sampled": statistics.fmean(drawn)}

    return judge


def rejection(model: DeepSeekV2, batch: Batch) -> Named:
    """The cross entropy of the right answers in a batch of `Rollouts`, in nats per token.

    An answer better than its group's mean is right. Groups that are all right teach nothing here
    either, so that both ways learn from the same answers.
    """
    ids, mask, _, _, A, _ = batch.tensors
    kept = mask & (A > 0)[:, None]
    return Named({"answer": -(token_log_probs(model, ids) * kept).sum() / kept.sum().clamp(min=1)})


def curve_of(trainer: Trainer, judge: Judge, steps: int = 0, seconds: float = 0.0,
             points: int = POINTS) -> list[dict[str, float]]:
    """Train for so many steps, or CPU seconds; judged at the beginning and `points` times."""
    curve, spent, first = [{"seconds": 0.0, "steps": 0, **judge(trainer.model)}], 0.0, trainer.steps
    for point in range(1, points + 1):
        began, entries = time.process_time(), []
        while (trainer.steps - first < steps * point / points if steps
               else spent + time.process_time() - began < seconds * point / points):
            entries.append(trainer.step())
        spent += time.process_time() - began
        names = ("reward", "kl_to_reference", "entropy", "no_spread", "length")
        means = {name: statistics.fmean(entry[name] for entry in entries)
                 for name in names if entries and name in entries[0]}
        curve.append({"seconds": spent, "steps": trainer.steps - first, **judge(trainer.model),
                      **means})
    return curve


def one_seed(seed: int, quick: bool = False) -> dict[str, Any]:
    """SFT, then the three ways from where it stopped."""
    (questions, held_out), tokenizer = addition(seed), addition_tokenizer()
    sft, seconds = learned(questions, tokenizer, seed, 0.0 if quick else LEAST)
    steps, points, rows = (2, 1, 2 * GROUP) if quick else (STEPS, POINTS, QUESTIONS * GROUP)
    judge, start = judge_of(held_out, tokenizer), copy.deepcopy(sft.model)

    def way(objective: Callable[[DeepSeekV2, Batch], Named]) -> Trainer:
        policy = copy.deepcopy(start)
        answers = Rollouts(policy, copy.deepcopy(start), prompts(questions, tokenizer),
                           truth(questions, tokenizer), GROUP, ANSWER, seed, only_spread=True)
        return Trainer(policy, grpo_recipe(seed, steps, rows), answers, objective)

    stopped = sft.steps
    curves = {"grpo": curve_of(way(objective()), judge, steps=steps, points=points),
              "rejection": curve_of(way(rejection), judge, steps=steps, points=points)}
    as_long = curves["grpo"][-1]["seconds"]
    curves["control"] = curve_of(sft, judge, seconds=as_long, points=points)
    return {"seed": seed, "sft_steps": stopped, "sft_cpu_seconds": seconds,
            "crossover": crossover(curves["grpo"], curves["control"]), "curves": curves}


def crossover(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float | None:
    """The first second from which on `one` is ahead at each of its points, `other` between its own
    on a straight line; None if it is not ahead at its end."""
    since = None
    for point in one[1:]:
        after = next((p for p in other if p["seconds"] >= point["seconds"]), other[-1])
        before = [p for p in other if p["seconds"] <= point["seconds"]][-1]
        width = after["seconds"] - before["seconds"]
        share = (point["seconds"] - before["seconds"]) / width if width > 0 else 0.0
        its = before["right"] + share * (after["right"] - before["right"])
        if point["right"] <= its:
            since = None
        elif since is None:
            since = point["seconds"]
    return since


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Share right before, and after each way: mean over the seeds, extremes, interval."""
    found = {}
    for name, way, at in (("before", "grpo", 0), ("grpo", "grpo", -1),
                          ("rejection", "rejection", -1), ("control", "control", -1)):
        values = [run["curves"][way][at]["right"] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        found[name] = {"mean": statistics.fmean(values), "least": min(values), "most": max(values),
                       "interval": T_95[len(values)] * spread / len(values) ** 0.5}
    return found


def record(runs: Sequence[dict[str, Any]], quick: bool = False) -> dict[str, Any]:
    """What `one_seed` gave for each of some seeds, as one record."""
    return {"name": "grpo", "quick": quick, **machine(), "examples": EXAMPLES, "steps": STEPS,
            "questions_a_step": QUESTIONS, "group": GROUP, "lr": LR,
            "summary": summary(runs) if len(runs) > 1 else None, "runs": list(runs)}


def run(quick: bool = False) -> dict[str, Any]:
    """One JSON-able record; with `quick` its numbers mean nothing. An hour of one core."""
    return record([one_seed(seed, quick) for seed in range(1 if quick else 3)], quick)

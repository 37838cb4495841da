# SPDX-License-Identifier: MIT
"""What GRPO makes of a compiler's word: function bodies that parse and do something (section 4.2).

A small model of Python source, the main job's kind, goes on behind a `def` line or a docstring
(alignment/bodies.py), 64 new tokens at temperature 1. It learns on functions of the files that it
was trained on, and is judged on functions of files that neither training has read, before and
after. Two rewards beside each other, from the same start, the same questions and draws:

  finished   1 for a body that parses, has 3 different statements that do something, and is over
             before the limit
  parses     1 for what parses: the control, which shows how such a reward is hacked

Of samples of the held-out functions, each with ± of the mean over functions at 95 %:

  parses, does_something   shares of all samples; the second is `finished` without its last word
  length                   tokens of an answer up to its first dedent, the token that shows it too
  whole                    tokens that were written, to the limit or an end mark
  ended                    share of answers with a dedent or an end mark before the limit

and of all samples together, `distinct_answers` (share of answers that no earlier one is equal to)
and `distinct_4` (the same of all runs of 4 tokens within answers): fewer mean that the policy
repeats itself. `bits_per_byte` is of held-out files: what the training costs elsewhere.
`curve` has the same shares of the training batches, and KL and entropy, step by step.

Training ends when two batches in a row got `GOALS` on average. Further on the share still rises,
and the bodies become alike: `distinct_4` was nearly halved when two of five parsed and did
something. The loss is averaged over each answer's tokens, then over answers: with a mean over all
tokens at once, bodies became a third shorter. Batches hold the answers to questions with some
spread alone. data/README.md says which of this was measured, and what came out.
"""

import copy
import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dsv2_ref import cost
from dsv2_ref.alignment.bodies import Bodies, heads
from dsv2_ref.alignment.rollout import Rollouts, objective, sample_answers
from dsv2_ref.config import SMALL, TINY, Config
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, byte_count, open_corpus
from dsv2_ref.text.data import marked
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.machine import keep_freed_memory, machine
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import set_up
from dsv2_ref.training.trainer import Trainer

GOALS = {"finished": 0.1, "parses": 0.9}
REWARDS = tuple(GOALS)
SHARES = ("parses", "does_something", "finished")
STEPS, RATE, CLIP, BETA = 40, 2e-4, 0.2, 0.05
START, SEEDS, SHOWN = 1000, 3, 8                 # steps of the start model; samples in a record
MEASURES = (*SHARES, "length", "distinct_answers", "distinct_4", "bits_per_byte")
KEPT = ("step", "reward", *SHARES, "length", "ended", "entropy", "kl_to_reference", "no_spread",
        "gradient_norm", "sampler_gap", "seconds")                            # of a log, in `curve`


class Sizes(NamedTuple):
    """How much is asked."""

    questions: int = 32          # of a batch
    group: int = 8               # answers to each
    new_tokens: int = 64
    functions: int = 2000        # to learn on
    held_out: int = 256          # functions to be judged on
    answers: int = 4             # to each of these
    files: int = 12              # whose bits per byte are taken


FULL = Sizes()
QUICK = Sizes(questions=2, group=2, new_tokens=4, functions=8, held_out=3, answers=2, files=1)


def tasks(corpus: Corpus, tokenizer: TextTokenizer, sizes: Sizes = FULL) -> tuple[Bodies, Bodies]:
    """Functions to learn on, of the corpus's training files, and held-out ones, of its test files.

    The training files are taken in a drawn order, and so are the held-out functions, each the same
    every time.
    """
    draws = random.Random(0)
    files = draws.sample(corpus.train, len(corpus.train))
    held = heads(corpus.test, tokenizer, most=10**9)
    return (Bodies(heads(files, tokenizer, sizes.functions), tokenizer),
            Bodies(draws.sample(held, min(sizes.held_out, len(held))), tokenizer))


def learned(
    model: DeepSeekV2, bodies: Bodies, seed: int, reward: str = "finished",
    steps: int = STEPS, sizes: Sizes = FULL,
) -> tuple[DeepSeekV2, list[dict[str, Any]]]:
    """A copy of the model after GRPO with a reward of `REWARDS`, and the log; one update a batch.

    It ends at the reward's goal, as the module says, or after so many steps. The log has all
    shares, whichever was learned from.
    """
    if reward not in REWARDS:
        raise ValueError(f"reward: {reward!r}, expected one of {', '.join(REWARDS)}")
    policy, shares = copy.deepcopy(model).requires_grad_(), {}

    def judge(which: Sequence[int], answers: Sequence[list[int]]) -> Sequence[float]:
        found = {name: getattr(bodies, name)(which, answers) for name in SHARES}
        shares.update({name: statistics.fmean(values) for name, values in found.items()})
        return found[reward]

    batches = Rollouts(policy, copy.deepcopy(model), bodies.questions, judge, sizes.group,
                       sizes.new_tokens, seed, bodies.cut, only_spread=True)
    recipe = Recipe(steps=steps, batch=sizes.questions * sizes.group, micro_batch=64, lr=RATE,
                    optimizer="adamw", weight_decay=0.0, protected=0.0, precision="fp32",
                    schedule="step", decay_at=(2.0, 2.0), seed=seed)              # no decay
    trainer = Trainer(policy, recipe, batches, objective(CLIP, BETA))
    log: list[dict[str, Any]] = []
    while len(log) < steps and not (len(log) > 1 and log[-1]["reward"] + log[-2]["reward"]
                                    >= 2 * GOALS[reward]):
        log.append(trainer.step() | shares)
    return policy.eval(), log


def measured(
    model: DeepSeekV2, bodies: Bodies, seed: int, sizes: Sizes = FULL, at_once: int = 32,
) -> dict[str, Any]:
    """Of a model's answers to the held-out functions, as the module says."""
    draws = torch.Generator(model.like.device)
    draws.manual_seed(seed)
    answers: list[list[int]] = []
    whole: list[int] = []
    ended: list[bool] = []
    for start in range(0, len(bodies.heads), at_once):

        def cut(place: int, answer: list[int], start: int = start) -> int:
            whole.append(len(answer))
            return bodies.cut(start + place, answer)

        said = sample_answers(model, bodies.questions[start : start + at_once], sizes.answers,
                              sizes.new_tokens, draws, cut)
        answers += said.answers
        ended += said.ended
    which = [n for n in range(len(bodies.heads)) for _ in range(sizes.answers)]
    values = {name: getattr(bodies, name)(which, answers) for name in SHARES}
    values |= {"length": list(map(len, answers)), "whole": whole, "ended": ended}
    result: dict[str, Any] = {}
    for name, of in values.items():
        result[name], result[f"{name}_interval"] = mean_over_groups(of, sizes.answers)
    shown = range(0, min(SHOWN, len(bodies.heads)) * sizes.answers, sizes.answers)
    return result | {"distinct_answers": distinct(map(tuple, answers)), "distinct_4": distinct(
        tuple(ids[i : i + 4]) for ids in answers for i in range(len(ids) - 3)),
        "samples": [bodies.program(which[i], answers[i]) for i in shown]}


def mean_over_groups(values: Sequence[float], group: int) -> tuple[float, float]:
    """Mean of values, `group` side by side for each question, and ± of it over the questions."""
    means = [statistics.fmean(values[i : i + group]) for i in range(0, len(values), group)]
    return statistics.fmean(means), 1.96 * statistics.stdev(means) / math.sqrt(len(means))


def distinct(things: Iterable[tuple[int, ...]]) -> float:
    """The share of things that no earlier one is equal to; 1 where there are none."""
    known = list(things)
    return len(set(known)) / len(known) if known else 1.0


def one_seed(
    model: DeepSeekV2, tokenizer: TextTokenizer, seed: int, reward: str = "finished",
    steps: int = STEPS, corpus: Corpus | None = None, sizes: Sizes = FULL,
) -> dict[str, Any]:
    """`before` and `after`, as the module says, and the `curve` between them; JSON-able.

    The model stays as it is. steps: at most so many. corpus: what the model was trained on, None
    for the running Python's library.
    """
    corpus = corpus or open_corpus("python")
    seen, held = tasks(corpus, tokenizer, sizes)
    files = corpus.test[: sizes.files]
    ids = list(marked(files, tokenizer))

    def judged(of: DeepSeekV2) -> dict[str, Any]:
        of.eval()
        bits = bits_per_byte(of, ids, byte_count(files), Recipe(steps=1).sequence)
        return measured(of, held, seed, sizes) | {"bits_per_byte": bits}

    before, began = judged(model), time.process_time()
    policy, log = learned(model, seen, seed, reward, steps, sizes)
    seconds = time.process_time() - began
    curve = [{name: round(entry[name], 5) for name in KEPT} for entry in log]
    return {"seed": seed, "reward": reward, "steps": len(log), "cpu_seconds": seconds,
            "functions": len(seen.heads), "held_out_functions": len(held.heads),
            "before": before, "after": judged(policy), "curve": curve}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By reward and measure: means over the seeds before and after, and of their quotient.

    No quotient where a seed had nothing to begin with.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for reward in dict.fromkeys(run["reward"] for run in runs):
        found[reward] = {}
        mine = [run for run in runs if run["reward"] == reward]
        for name in MEASURES:
            pairs = [(run["before"][name], run["after"][name]) for run in mine]
            before, after = (statistics.fmean(values) for values in zip(*pairs, strict=True))
            found[reward][name] = {"before": before, "after": after}
            if all(first for first, _ in pairs):
                times = [last / first for first, last in pairs]
                found[reward][name] |= {"times": statistics.fmean(times), "least": min(times),
                                        "most": max(times)}
    return found


def record(
    config: Config, start: dict[str, Any], runs: list[dict[str, Any]], quick: bool = False,
) -> dict[str, Any]:
    """What `one_seed` gave for some seeds and rewards, as one record; start: of the first model."""
    shape = {key: getattr(config, key) for key in "d n_layers n_h d_h d_r d_v d_c vocab".split()}
    return {"name": "grpo_code", "quick": quick, **machine(), "model": shape,
            "parameters": cost.parameters(config).total, "start": start,
            "grpo": {"rate": RATE, "clip": CLIP, "beta": BETA, "goals": GOALS, **FULL._asdict()},
            "summary": summary(runs), "runs": runs}


def run(quick: bool = False) -> dict[str, Any]:
    """One JSON-able record; with `quick` its numbers mean nothing. Half an hour of one core."""
    keep_freed_memory()
    corpus, sizes = open_corpus("python"), QUICK if quick else FULL
    if quick:
        few = [d for d in corpus.train if 2000 < len(d.text) < 4000][:12]
        corpus = replace(corpus, train=few[:9], test=few[9:])
    recipe = Recipe(steps=2 if quick else START)
    start = set_up(TINY if quick else SMALL, recipe, corpus)
    train(start.trainer, load_every=0, progress=False)
    model = start.model.bfloat16().float().eval()                # as a saved one would be
    runs = [one_seed(model, start.tokenizer, seed, reward, 2 if quick else STEPS, corpus, sizes)
            for seed in range(1 if quick else SEEDS) for reward in REWARDS]
    return record(model.config, {"steps": recipe.steps, "corpus": corpus.name}, runs, quick)

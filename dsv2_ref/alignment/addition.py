# SPDX-License-Identifier: MIT
"""A task whose truth a program knows: two numbers of two digits, added in a chat.

    User: 47 + 38 =        Assistant: 85

There are 8,100 pairs. One of five is *held out*, by a rule (`pair_is_held_out`) and not by a draw,
with both orders on the same side: no example has it and no rollout asks it, so it says what has
been learned beyond what was seen. Of the others the first `EXAMPLES` are shown with their answers
(SFT), and all may be asked, for a program to judge what the policy writes (GRPO).

A small model of its own goes with the task, with a token for each digit and for the words of the
template. It knows nothing before SFT.
"""

import random
from typing import Any

import torch

from dsv2_ref.alignment.sft import sft_trainer
from dsv2_ref.config import TINY, Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.instructions import Example, pair_is_held_out
from dsv2_ref.text.tokenizer import SMALLEST_VOCAB, TextTokenizer, train_tokenizer
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer

EXAMPLES = 420
STEPS = 600                          # of SFT: seed 0 gets about half of other sums right then
ANSWER = 4                           # most tokens of an answer: three digits and the end mark
POSITIONS = 32                       # a conversation needs fewer


def addition(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """All questions that may be asked in training, and the held-out ones, in an order each."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    asked = [pair for pair in pairs if not pair_is_held_out(*pair)]
    held_out = [pair for pair in pairs if pair_is_held_out(*pair)]
    return [_example(*pair) for pair in asked], [_example(*pair) for pair in held_out]


def _example(a: int, b: int) -> Example:
    messages = ({"role": "user", "content": f"{a} + {b} ="},
                {"role": "assistant", "content": str(a + b)})
    return Example("addition", "en", f"{min(a, b)} {max(a, b)}", messages)


def addition_tokenizer() -> TextTokenizer:
    """Bytes, and the words of the template; digits stay by themselves."""
    return train_tokenizer(["User:", " + ", " =\n\nAssistant:"] * 50, SMALLEST_VOCAB + 20)


def addition_config(tokenizer: TextTokenizer) -> Config:
    """About a million parameters. No slot is dropped."""
    return TINY.with_(
        vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos, d=128, d_h=32, d_r=16, d_v=32,
        d_c=64, d_cq=96, dense_width=256, expert_width=64, max_positions=POSITIONS,
        drop_capacity=None)


def addition_recipe(steps: int | None = None, **changes: Any) -> Recipe:
    """SFT with one rate after 40 steps of warm-up, so that it can be stopped anywhere."""
    steps = STEPS if steps is None else steps
    return Recipe(steps=steps, lr=4e-3, warmup=40 / max(steps, 40), batch=128, schedule="step",
                  decay_at=(1.0, 1.0), protected=0.0, sequence=POSITIONS,
                  precision="fp32").with_(**changes)


def addition_trainer(
    questions: list[Example], tokenizer: TextTokenizer, recipe: Recipe
) -> Trainer:
    """SFT of a new model on the first `EXAMPLES` questions; weights and data by the recipe's seed.
    """
    torch.manual_seed(recipe.seed)
    model = DeepSeekV2(addition_config(tokenizer))
    return sft_trainer(model, tokenizer, [e.messages for e in questions[:EXAMPLES]], recipe)

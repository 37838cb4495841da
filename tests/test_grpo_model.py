# SPDX-License-Identifier: MIT
"""The committed chat model that half knows sums (data/addition) learns from rewards."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.addition import (
    ANSWER,
    EXAMPLES,
    POSITIONS,
    addition,
    addition_tokenizer,
)
from dsv2_ref.alignment.chat import TEMPLATE, prompt_ids
from dsv2_ref.alignment.exam import truth
from dsv2_ref.alignment.rollout import greedy_reward, grpo_trainer
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "data" / "addition"
STEPS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER / "tokenizer.json")


def right(model, tokenizer, asked):
    ids = [prompt_ids(example.prompt, tokenizer) for example in asked]
    return greedy_reward(model.eval(), ids, truth(asked, tokenizer), ANSWER)


def test_it_is_small_and_a_chat_model_of_this_task(tokenizer):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3e6
    said = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert said["chat_template"] == TEMPLATE
    model, made = checkpoint.load(FOLDER), addition_tokenizer()
    assert model.config.max_positions == POSITIONS and model.config.vocab == made.vocab
    questions, _ = addition()
    assert all(prompt_ids(e.prompt, tokenizer) == prompt_ids(e.prompt, made)
               for e in questions[:20])


def test_it_knows_its_examples_and_half_of_the_rest(tokenizer):
    model, (questions, held_out) = checkpoint.load(FOLDER, torch.float32), addition()
    assert right(model, tokenizer, questions[:EXAMPLES]) > 0.95
    assert 0.4 < right(model, tokenizer, held_out) < 0.6


def test_rewards_alone_teach_it_sums_that_nobody_asked(tokenizer):
    """Half a minute of GRPO: the reward rises, and so do answers to held-out questions."""
    model, (questions, held_out) = checkpoint.load(FOLDER, torch.float32), addition()
    before = right(model, tokenizer, held_out)
    ids = [prompt_ids(example.prompt, tokenizer) for example in questions]
    recipe = Recipe(steps=STEPS, batch=256, optimizer="adamw", lr=2e-4, weight_decay=0.0,
                    protected=0.0, precision="fp32")
    trainer = grpo_trainer(model, ids, truth(questions, tokenizer), recipe, 8, ANSWER)
    rewards = [trainer.step()["reward"] for _ in range(STEPS)]
    assert statistics.fmean(rewards[-8:]) > statistics.fmean(rewards[:8]) + 0.04
    assert right(model, tokenizer, held_out) > before + 0.04

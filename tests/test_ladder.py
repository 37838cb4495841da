# SPDX-License-Identifier: MIT
"""The ladder's sizes, the mechanisms and proportions of V2 it keeps, and the truth of its table."""

import re

import pytest
import torch

from dsv2_ref import cost
from dsv2_ref.config import PRESETS, V2
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training import ladder
from dsv2_ref.training.ladder import LADDER, scaled

every = pytest.mark.parametrize("name", LADDER)


@every
def test_activated_parameters_are_what_the_name_says(name):
    c = PRESETS[name]
    assert cost.activated_parameters(c) / 1e6 == pytest.approx(float(name[:-1]), rel=0.05)
    with torch.device("meta"):
        model = DeepSeekV2(c)
    total = sum(p.numel() for p in model.parameters())
    assert total == cost.parameters(c).total
    moe = [block.experts for block in model.blocks[c.n_dense:]]
    idle = sum(W.numel() for e in moe for W in (e.W_gate, e.W_up, e.W_down))
    idle = idle * (c.n_routed - c.top_k) // c.n_routed
    assert total - idle == cost.activated_parameters(c)         # the tied head counts once


@every
def test_mechanisms_and_proportions_are_v2s(name):
    c = PRESETS[name]
    assert c.d_cq and c.n_dense == V2.n_dense == 1 and c.drop_capacity == V2.drop_capacity
    for field in ("n_shared", "top_k", "n_devices", "max_devices", "alpha_expert", "alpha_device",
                  "alpha_comm"):
        assert getattr(c, field) == getattr(V2, field), field
    assert (c.d_c, c.d_r, c.d_v) == (4 * c.d_h, c.d_h // 2, c.d_h)
    for config in (c, V2):
        assert config.dense_width == (config.n_shared + config.top_k) * config.expert_width
        gates = config.routed_scaling_factor * config.top_k / config.n_routed
        assert gates == pytest.approx(0.6)                       # of a router without preference


def test_rate_and_batch_follow_the_published_fit():
    c = PRESETS["10m"]
    tokens = 1e18 / cost.causal_training_flops(c, 2048)
    recipe = scaled(c, tokens)
    assert recipe.lr == pytest.approx(0.3118 * 10**-2.25)
    assert recipe.batch == round(0.2920 * 10**5.8878 / 2048) == 110
    assert recipe.steps * 110 * 2048 == pytest.approx(tokens, rel=1e-3)
    assert scaled(c, 1e6).lr > recipe.lr and scaled(c, 1e6).batch < 110


@every
def test_the_table_is_true(name):
    row = re.search(rf"\| {name} +\|(.*)\|\n", ladder.__doc__)[1]
    active, total, tokens, lr, batch, steps, minutes = (x.strip() for x in row.split("|"))
    c, recipe = PRESETS[name], LADDER[name]
    assert active == f"{cost.activated_parameters(c) / 1e6:.1f}M"
    assert total == f"{cost.parameters(c).total / 1e6:.1f}M"
    assert tokens == f"{ladder.TOKENS[name] / 1e6:.0f}M"
    assert float(lr) == float(f"{recipe.lr:.1e}")
    assert batch == f"{recipe.batch} x {recipe.sequence}" and steps == f"{recipe.steps:,}"
    assert minutes == f"{ladder.estimated_minutes(c, recipe):.1f}" and float(minutes) <= 6.1
    assert recipe.steps * recipe.batch * recipe.sequence == pytest.approx(
        ladder.TOKENS[name], rel=1e-3)


@every
def test_a_batch_is_whole_parts(name):
    recipe = LADDER[name]
    assert recipe.batch % (recipe.micro_batch or 1) == 0 and recipe.sequence <= 4096
    assert (recipe.optimizer, recipe.schedule, recipe.decay_at) == ("adamw", "step", (0.8, 0.9))

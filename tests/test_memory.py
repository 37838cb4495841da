# SPDX-License-Identifier: MIT
"""The memory plan against what the allocator is really asked for."""

import pytest
import torch
from alive import Alive
from torch.profiler import ProfilerActivity, profile

from dsv2_ref import cost, forms
from dsv2_ref.config import LITE, TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.memory import plan, state_bytes
from dsv2_ref.training.pretrain import Trainer
from dsv2_ref.training.recipe import Recipe

# enough weights and tokens that what is left out of the plan is small
CONFIG = TINY.with_(vocab=512, d=192, n_layers=8, n_h=4, d_h=32, d_r=16, d_v=32, d_c=64, d_cq=96,
                    dense_width=512, n_routed=16, expert_width=128, max_positions=512)


def measured_peak(trainer):
    """The most bytes in use within a step, above what was in use before it, and the latter."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        most = max(most, in_use)
    return most


def in_turn(s, top_k, n_devices, max_devices):
    N, E = s.shape
    return torch.arange(N * top_k, device=s.device).view(N, top_k) % E


def standing(trainer):
    weights = sum(p.nbytes for p in trainer.model.parameters())
    return weights + sum(t.nbytes for o in trainer.optimizers for state in o.state.values()
                         for t in state.values())


@pytest.mark.parametrize("changes", [
    {"optimizer": "adamw"}, {"optimizer": "muon"},
    {"optimizer": "adamw8", "weights": "bf16"},
    {"optimizer": "adamw8", "weights": "bf16", "recompute": 0.5},
    {"optimizer": "adamw8", "weights": "bf16", "recompute": 1.0, "micro_batch": 2},
], ids=lambda c: " ".join(str(v) for v in c.values()))
def test_the_peak_is_within_a_tenth_of_the_plan(changes, monkeypatch):
    """With experts in turn: how full the fullest is no plan can know, and it differs by CPU."""
    monkeypatch.setattr(forms, "select_device_limited", in_turn)
    recipe = Recipe(steps=9, batch=4, sequence=256, precision="fp32", protected=0.0, **changes)
    torch.manual_seed(0)
    trainer = Trainer(DeepSeekV2(CONFIG), recipe, torch.randint(512, (9000,)).numpy())
    planned = plan(trainer.model, recipe, "fp32")
    trainer.step()                                       # moments exist from here on
    assert standing(trainer) == pytest.approx(planned.weights + planned.moments, rel=1e-3)
    measured = standing(trainer) + measured_peak(trainer)
    assert planned.peak == pytest.approx(measured, rel=0.1)


def test_the_state_of_lite_fits_a_card_of_141_gb_only_in_bf16():
    n = cost.parameters(LITE).total
    little = state_bytes(n, Recipe(steps=1, optimizer="adamw8", weights="bf16"))
    assert little / 1e9 == pytest.approx(94.7, abs=0.1)
    assert state_bytes(n, Recipe(steps=1, optimizer="adamw")) / 1e9 == pytest.approx(251, abs=1)
    for optimizer, weights in (("adamw8", "bf16"), ("adamw", "fp32")):
        recipe = Recipe(steps=1, batch=1, sequence=16, optimizer=optimizer, weights=weights)
        trainer = Trainer(DeepSeekV2(CONFIG), recipe, torch.randint(512, (9000,)).numpy())
        planned = plan(trainer.model, recipe, "fp32")
        exact = planned.weights + planned.moments + planned.gradients
        assert state_bytes(cost.parameters(CONFIG).total, recipe) == pytest.approx(exact, rel=0.01)


def test_a_plan_leaves_nothing_behind():
    """What autograd kept was held by its own graph: on a card 3 GB of Lite's, until the end."""
    recipe = Recipe(steps=1, batch=2, sequence=32)
    model = DeepSeekV2(CONFIG)
    plan(model, recipe, "fp32")                          # rotations are kept, once for all
    with Alive() as alive:
        for W in model.parameters():
            alive.see(W)
        before = alive.now
        plan(model, recipe, "fp32")
    assert alive.peak > before + 1e6 and alive.now == before

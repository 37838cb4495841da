# SPDX-License-Identifier: MIT
import pytest

from dsv2_ref.training.recipe import PAPER, Recipe, linear_decay, step_decay


def test_step_decay_is_the_papers():
    assert step_decay(0.0, 0.1) == 0 and step_decay(0.05, 0.1) == 0.5
    assert step_decay(0.1, 0.1) == step_decay(0.599, 0.1) == 1
    assert step_decay(0.6, 0.1) == pytest.approx(0.316)
    assert step_decay(0.9, 0.1) == pytest.approx(0.316**2)
    assert step_decay(0.79, 0.1, at=(0.8, 0.9)) == 1


def test_linear_decay_ends_at_its_floor():
    assert linear_decay(0.015, 0.03) == 0.5
    assert linear_decay(0.03, 0.03) == linear_decay(0.3, 0.03) == 1
    assert linear_decay(0.65, 0.03) == pytest.approx((1 + 0.02) / 2)
    assert linear_decay(1.0, 0.03) == linear_decay(1.2, 0.03) == pytest.approx(0.02)


def test_papers_numbers():
    v2, lite = PAPER["v2"], PAPER["lite"]
    assert v2.lr == 2.4e-4 and lite.lr == 4.2e-4
    assert v2.warmup * v2.steps == pytest.approx(2000)
    assert lite.warmup * lite.steps == pytest.approx(2000)
    assert lite.steps * lite.batch * lite.sequence == pytest.approx(5.7e12, rel=0.01)
    # the ramp's smaller batches cost steps: 225B tokens of mean 5760 sequences, then 9216
    tokens = v2.sequence * (v2.batch_ramp * v2.steps * 5760 + (1 - v2.batch_ramp) * v2.steps * 9216)
    assert tokens == pytest.approx(8.1e12, rel=0.02)
    assert v2.batch_at(0) == 2304 and v2.batch_at(v2.batch_ramp) == v2.batch_at(1) == 9216
    assert v2.batch_at(v2.batch_ramp / 2) == 5760
    assert (v2.rate(0.59), round(v2.rate(0.61), 3), round(v2.rate(0.91), 4)) == (1, 0.316, 0.0999)
    assert lite.rate(0.61) == 1 and lite.batch_at(0) == 4608


@pytest.mark.parametrize(("changes", "message"), [
    (dict(), "steps: None and seconds: None, expected just one"),
    (dict(steps=1, seconds=1.0), "steps: 1 and seconds: 1.0, expected just one"),
    (dict(steps=0), "steps: 0, expected a number > 0"),
    (dict(steps=1, lr=float("nan")), "lr: nan, expected a number > 0"),
    (dict(steps=1, adamw_lr=-1.0), "adamw_lr: -1.0, expected a number > 0"),
    (dict(steps=1, warmup=1.5), "warmup: 1.5, expected a share from 0 to 1"),
    (dict(steps=1, optimizer="sgd"), "optimizer: 'sgd', expected one of"),
    (dict(steps=1, precision="fp8"), "precision: 'fp8', expected one of"),
    (dict(steps=1, weights="bf16"), "optimizer: 'muon', expected 'adamw8' for bf16 weights"),
    (dict(steps=1, recompute=2), "recompute: 2, expected a share"),
], ids=lambda x: x if isinstance(x, str) else None)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Recipe(**changes)


def test_with_swaps_steps_for_seconds():
    recipe = Recipe(steps=5, lr=1e-3).with_(seconds=2.0, lr=None)
    assert (recipe.steps, recipe.seconds, recipe.lr) == (None, 2.0, 1e-3)
    assert recipe.with_(steps=7).seconds is None


def test_one_rate_moves_the_other_in_proportion():
    assert Recipe(steps=1).with_(lr=1e-12).adamw_lr is None                # the same as lr
    assert Recipe(steps=1, lr=4e-3, adamw_lr=1e-3).with_(lr=2e-3).adamw_lr == 5e-4
    assert Recipe(steps=1, adamw_lr=1e-3).with_(lr=2e-3, adamw_lr=3e-3).adamw_lr == 3e-3


@pytest.mark.parametrize(("batch", "start"), [(1, 1), (4, 1), (8, 2), (100, 25), (9216, 2304)])
def test_the_ramp_keeps_its_ratio(batch, start):
    recipe = PAPER["v2"].with_(batch=batch)
    assert recipe.batch_start == recipe.batch_at(0) == start
    assert PAPER["v2"].with_(batch=batch, batch_start=1).batch_start == 1


def test_a_run_in_tokens_counts_the_ramp():
    flat = Recipe(steps=1, batch=4, sequence=100).lasting(4_000)
    assert flat.steps == 10
    ramped = Recipe(steps=1, batch=8, batch_start=2, batch_ramp=0.5, sequence=100).lasting(6e4)
    read = sum(ramped.batch_at(step / ramped.steps) * 100 for step in range(ramped.steps))
    assert abs(read - 6e4) < 800 * 3
    assert PAPER["v2"].lasting(8.1e12).steps == pytest.approx(220_000, rel=0.02)   # rounded
    assert PAPER["lite"].lasting(5.7e12).steps == pytest.approx(302_000, rel=0.01)
    for tokens in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"tokens: {tokens}, expected a finite number"):
            flat.lasting(tokens)

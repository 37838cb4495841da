# SPDX-License-Identifier: MIT
"""Four gloo ranks train as one process does, in fp64: gradients, norm, losses, weights; each holds
its share; and states go from one layout to another."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from mutants.mesh import MOMENTS, RANK_MUTANTS
from ranks import world
from refusals import refused
from small_run import CONFIG, tokens
from test_mutants import in_place

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel.gather import gather, is_share, scatter
from dsv2_ref.parallel.hybrid import Hybrid
from dsv2_ref.parallel.mesh import Mesh, check_layout
from dsv2_ref.parallel.split import Layout, layout_of
from dsv2_ref.training.optim import moments
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import load_state
from dsv2_ref.training.trainer import Trainer
from dsv2_ref.training.world import World

SMALL = CONFIG.with_(d=16, n_layers=4, dense_width=24, expert_width=6, tie_embeddings=True)
SMALLER = SMALL.with_(n_layers=2)
RECIPE = Recipe(steps=12, batch=8, micro_batch=4, sequence=9, precision="fp32", protected=0.3,
                clip=0.5, lr=3e-3, optimizer="adamw")
NAMES = ("language", "expert", "device", "communication", "loss", "gradient_norm")


@pytest.fixture(scope="module")
def four():
    with world(4) as ranks:
        yield ranks


class Watched:
    """A world that remembers the gradients as the norm finds them."""

    def norm(self, gradients):
        named = {id(W.grad): name for name, W in self.trainer.model.named_parameters()}
        self.gradients = {named[id(g)]: g.clone() for g in gradients}
        return super().norm(gradients)


class Alone(Watched, World):
    pass


class Several(Watched, Mesh):
    pass


def trainer_of(its_world, recipe, config=SMALL, seed=0):
    torch.manual_seed(seed)
    held = its_world.hold(DeepSeekV2(config).double(), recipe.sequence)
    its_world.trainer = Trainer(held, recipe, tokens(), world=its_world)
    return its_world.trainer


def some_steps(trainer, steps=5):
    """What is compared: gradients of the first step, losses of all, weights after them."""
    entries = [trainer.step(with_load=i == 0) for i in range(steps)]
    first = trainer.world.gradients if steps == 1 else None
    return {"log": [[entry[name] for name in NAMES] for entry in entries],
            "load": [(x.layer, x.experts.tolist(), x.devices.tolist(), round(x.dropped, 9),
                      round(x.entropy, 9)) for x in entries[0]["load"]],
            "gradients": first,
            "weights": {n: W.detach().clone() for n, W in trainer.model.named_parameters()},
            "weight_bytes": sum(W.nbytes for W in trainer.model.parameters()),
            "moment_bytes": sum(t.nbytes for t in moments(trainer.optimizers).values() if t.ndim)}


def on_ranks(layout, recipe, config=SMALL, mutant=None, steps=5):
    """Run by each rank."""
    with in_place(mutant) if mutant else nullcontext():
        trainer = trainer_of(Several(layout), recipe, config)
        gradients = some_steps(trainer, 1)
        rest = some_steps(trainer, steps - 1) if steps > 1 else gradients
        its = trainer.world
        return rest | {"gradients": gradients["gradients"], "load": gradients["load"],
                       "log": gradients["log"] + (rest["log"] if steps > 1 else []),
                       "place": (its.pp, its.dp, its.ep), "held": trainer.model.held}


@lru_cache
def alone(recipe, config=SMALL, steps=5):
    trainer = trainer_of(Alone(), recipe, config)
    gradients = some_steps(trainer, 1)
    rest = some_steps(trainer, steps - 1) if steps > 1 else gradients
    return rest | {"gradients": gradients["gradients"], "load": gradients["load"],
                   "log": gradients["log"] + (rest["log"] if steps > 1 else [])}


def worst(answers, expected):
    """The largest difference of any number on any rank from what one process has."""
    found = 0.0
    for answer in answers:
        rows = slice(None) if answer["held"] is None else slice(answer["held"].start,
                                                                answer["held"].stop)
        for what in ("gradients", "weights"):
            for name, t in answer[what].items():
                whole = expected[what][name]
                part = whole[rows] if is_share(name) else whole
                assert t.shape == part.shape, name
                found = max(found, (t - part).abs().max().item())
        for mine, theirs in zip(answer["log"], expected["log"], strict=True):
            found = max(found, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
    return found


LAYOUTS = {
    "ep4": Layout(ep=4), "ep2 dp2": Layout(ep=2, dp=2), "dp4": Layout(dp=4),
    "pp4 1f1b": Layout(pp=4), "pp2 ep2 1f1b": Layout(pp=2, ep=2),
    "pp2 ep2 zbv": Layout(pp=2, ep=2, schedule="zbv"),
    "pp2 dp2 dualpipev": Layout(pp=2, dp=2, schedule="dualpipev"),
}                                            # parallel_slow.py has others


def config_of(layout):
    """As few layers as there can be: four where there are four stages."""
    four = layout.pp == 4 or layout.schedule in ("zbv", "dualpipev", "interleaved")
    return SMALL if four else SMALLER


def recipe_of(layout, **changes):
    """As few micro-batches as there can be, but two at least: they differ from the batch."""
    return RECIPE.with_(micro_batch={1: 4, 2: 4, 4: 2}[layout.pp] if config_of(layout) is SMALLER
                        else 2, **changes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_train_as_one_process_does(name, four):
    """All three balance losses and dropping on, clipping active, embedding and head tied."""
    layout = LAYOUTS[name]
    recipe, config = recipe_of(layout), config_of(layout)
    expected = alone(recipe, config)
    answers = four(on_ranks, layout, recipe, config)
    assert worst(answers, expected) < 1e-10
    assert answers[0]["load"] == expected["load"]
    assert expected["log"][0][-1] > recipe.clip and any(drop for *_, drop, _ in expected["load"])
    assert all(answer["log"] == answers[0]["log"] for answer in answers)      # the same bits
    check_owned(layout, answers, expected)


def check_owned(layout, answers, expected):
    """Every rank has its layers and its experts alone; together they have all, so many times."""
    sizes = {name: W.nbytes for name, W in expected["weights"].items()}
    owners = dict.fromkeys(sizes, 0)
    for answer in answers:
        mine = 0
        for name in answer["weights"]:
            owners[name] += 1
            mine += sizes[name] // (layout.ep if is_share(name) else 1)
        assert answer["weight_bytes"] == mine
    replicas = layout.dp * layout.ep
    twice = layout.pp > 1 and layout.schedule not in ("zbv", "dualpipev")
    for name, n in owners.items():
        assert n == replicas * (2 if twice and name == "embedding.weight" else 1), name


@pytest.mark.parametrize("optimizer, layout", [
    ("muon", Layout(dp=4, zero1=True)), ("adamw", Layout(ep=2, dp=2, zero1=True)),
    ("adamw8", Layout(pp=2, ep=2, schedule="zbv", zero1=True)),
], ids=str)
def test_moments_are_shared_and_the_updates_those_of_one_process(optimizer, layout, four):
    recipe, config = recipe_of(layout, optimizer=optimizer), config_of(layout)
    expected = alone(recipe, config)
    answers = four(on_ranks, layout, recipe, config)
    assert worst(answers, expected) < 1e-10
    if optimizer == "adamw8":                                # its arithmetic is in fp32
        weights = [answer | {"gradients": {}, "log": []} for answer in answers]
        assert worst(weights, expected | {"log": []}) == 0
    taken = [answer["moment_bytes"] for answer in answers]
    assert sum(taken) == expected["moment_bytes"]            # each moment is on one rank
    assert max(taken) < 0.5 * expected["moment_bytes"]


def test_bf16_weights_are_rounded_as_in_one_process(four):
    """Stochastically, the router in fp32: two dtypes, two optimisers, and the same bits but where
    a sum of gradients rounds otherwise."""
    layout = Layout(ep=2, dp=2, zero1=True)
    recipe = RECIPE.with_(optimizer="adamw8", weights="bf16", lr=1e-4)
    expected = alone(recipe, SMALLER, 2)
    same = total = 0
    for answer in four(on_ranks, layout, recipe, SMALLER, None, 2):
        rows = slice(answer["held"].start, answer["held"].stop)
        for name, t in answer["weights"].items():
            whole = expected["weights"][name]
            part = whole[rows] if is_share(name) else whole
            assert t.dtype == part.dtype
            same, total = same + (t == part).sum().item(), total + t.numel()
    assert same > 0.9 * total, same / total                  # 0.7 with bits of their own


@pytest.mark.parametrize("mutant", RANK_MUTANTS, ids=lambda m: m.name)
def test_wrong_variants_are_seen(mutant, four):
    layout = LAYOUTS[mutant.node]
    expected = alone(recipe_of(layout), SMALLER, 1)
    assert worst(four(on_ranks, layout, recipe_of(layout), SMALLER, mutant, 1), expected) > 1e-7


# ---- what all agree on

def unusable(layout, bad):
    """The log of steps of which some have, on one rank alone, a gradient that is no number."""
    trainer = trainer_of(Several(layout), recipe_of(layout), SMALLER)
    backward, log = trainer.world.backward, []

    def spoilt(*arguments, **named):
        found = backward(*arguments, **named)
        if trainer.steps in bad and torch.distributed.get_rank() == 3:
            next(trainer.model.parameters()).grad[0] = float("nan")
        return found

    trainer.world.backward = spoilt
    try:
        for _ in range(5):
            log.append(trainer.step().get("skipped", False))
    except FloatingPointError as error:
        log.append(str(error))
    return log


def test_an_update_is_left_out_by_all_and_all_stop(four):
    layout = LAYOUTS["pp2 ep2 1f1b"]
    assert four(unusable, layout, (1, 2)) == [[False, True, True, False, False]] * 4
    logs = four(unusable, layout, (1, 2, 3))
    assert all(log == logs[0] for log in logs) and "step 4" in logs[0][-1]


def agreement(layout):
    its = Several(layout)
    rank = torch.distributed.get_rank()
    told = its.first_does(lambda: {"rank": rank})
    try:
        its.first_does(lambda: refuse(rank))
    except ValueError as error:
        told["refused"] = (type(error).__name__, str(error))
    return told | {"clock": its.clock(10.0 + rank), "asked": its.asked(15 if rank == 2 else None),
                   "nobody": its.asked(None)}


def refuse(rank):
    raise ValueError(f"rank {rank}: refused")


def test_all_are_told_the_same(four):
    told = four(agreement, Layout(ep=2, dp=2))
    for rank, answer in enumerate(told):
        kind = "Told" if rank else "ValueError"
        assert answer == {"rank": 0, "refused": (kind, "rank 0: refused"), "clock": 10.0,
                          "asked": 15, "nobody": None}


# ---- states

def saved_and_gone_on(layout, recipe, path):
    trainer = trainer_of(Several(layout), recipe, SMALLER)
    for _ in range(2):
        trainer.step()
    trainer.save(path)
    return some_steps(trainer, 2) | {"held": trainer.model.held, "gradients": {}}


def resumed(layout, recipe, path, mutant=None):
    """From other weights, all of them zero."""
    with in_place(mutant) if mutant else nullcontext():
        trainer = trainer_of(Several(layout), recipe, SMALLER, seed=5)
        with torch.no_grad():
            for W in trainer.model.parameters():
                W.zero_()
        trainer.load(path)
        return some_steps(trainer, 2) | {"held": trainer.model.held, "gradients": {}}


@pytest.mark.parametrize("optimizer", ["adamw8"])           # parallel_slow.py has others
def test_a_state_goes_from_one_layout_to_another_and_to_one_process(optimizer, four, tmp_path):
    """Names of the whole model, moments beside them, every expert in one tensor."""
    wrote = Layout(pp=2, ep=2, zero1=True)
    recipe = RECIPE.with_(optimizer=optimizer, micro_batch=4)
    path = tmp_path / "state-000000002"
    four(saved_and_gone_on, wrote, recipe, path)
    tensors, state = load_state(path)
    for name, W in DeepSeekV2(SMALLER).named_parameters():
        assert tensors.pop(f"model.{name}").shape == W.shape
        found = [n for n in tensors if n.startswith(f"moment.{name}.")]
        assert found and all(tensors.pop(n) is not None for n in found)
    assert set(tensors) == {"model.head.weight"} and state["steps"] == 2     # tied, a second name
    whole = trainer_of(Alone(), recipe, SMALLER, seed=5)
    whole.load(path)
    expected = some_steps(whole, 2) | {"gradients": {}}
    for layout in (Layout(ep=4), Layout(dp=2, pp=2, zero1=True)):
        assert worst(four(resumed, layout, recipe, path), expected) < 1e-10, layout
    unbroken = trainer_of(Alone(), recipe, SMALLER)
    for _ in range(2):
        unbroken.step()
    unbroken.save(tmp_path / "alone.safetensors")
    gone_on = some_steps(unbroken, 2) | {"gradients": {}}
    assert worst([expected | {"held": None}], gone_on) < 1e-10
    answers = four(resumed, wrote, recipe, tmp_path / "alone.safetensors")
    assert worst(answers, gone_on) < 1e-10
    answers = four(resumed, wrote, recipe, tmp_path / "alone.safetensors", MOMENTS)
    assert worst(answers, gone_on) > 1e-7


def test_a_resume_is_bit_equal(four, tmp_path):
    layout = Layout(ep=2, dp=2, zero1=True)
    path = tmp_path / "state-000000002"
    went_on = four(saved_and_gone_on, layout, RECIPE, path)
    again = four(resumed, layout, RECIPE, path)
    for a, b in zip(went_on, again, strict=True):
        assert a["log"] == b["log"]
        assert all(torch.equal(t, b["weights"][name]) for name, t in a["weights"].items())


def gathered(layout):
    trainer = trainer_of(Several(layout), recipe_of(layout))
    return trainer.world.with_whole(trainer.model, lambda model: {
        name: W.clone() for name, W in model.state_dict().items()})


def test_the_whole_model_is_brought_together(four):
    torch.manual_seed(0)
    expected = DeepSeekV2(SMALL).double().state_dict()
    for answer in four(gathered, LAYOUTS["pp2 ep2 zbv"]):
        assert answer.keys() == expected.keys()
        assert all(torch.equal(answer[n], W) for n, W in expected.items())


def changed_by_the_first(layout):
    """What a rank has after the first has doubled the whole model, without a file."""
    trainer = trainer_of(Several(layout), recipe_of(layout))
    mesh = trainer.world.mesh
    weights = gather(mesh, trainer.model)
    if weights is not None:
        weights = {name: 2 * W for name, W in weights.items()}
    scatter(mesh, weights, trainer.model)
    return {"weights": {n: W.detach() for n, W in trainer.model.named_parameters()},
            "held": trainer.model.held, "gradients": {}, "log": []}


def test_a_whole_model_goes_back_to_its_ranks(four):
    torch.manual_seed(0)
    doubled = {n: 2 * W.detach() for n, W in DeepSeekV2(SMALL).double().named_parameters()}
    expected = {"weights": doubled, "log": []}
    assert worst(four(changed_by_the_first, LAYOUTS["pp2 ep2 zbv"]), expected) == 0


# ---- layouts that cannot be

def test_a_layout_is_what_is_left_for_replicas():
    assert layout_of(8, 2, 2, "1f1b", True) == Layout(2, 2, 2, "1f1b", True)
    refused(lambda: layout_of(6, 4, 1, "1f1b", False), "ep x pp: 4 x 1", "6 ranks")
    refused(lambda: layout_of(4, 0, 1, "1f1b", False), "ep: 0")


@pytest.mark.parametrize("layout, changes, words", [
    (Layout(ep=3), {}, ("ep: 3", "8 routed experts")),
    (Layout(dp=4), {"micro_batch": 6, "batch": 12}, ("micro_batch: 6", "multiple", "4")),
    (Layout(dp=4), {"micro_batch": 4, "batch": 9}, ("micro_batch: 1", "at the end")),
    (Layout(dp=4), {"micro_batch": 8, "batch": 8, "batch_start": 2}, ("2 sequences",)),
    (Layout(pp=5), {"micro_batch": 1}, ("layers: 3", "expected at least 5")),
    (Layout(pp=2, schedule="zbv"), {"micro_batch": 1}, ("layers: 3", "at least 4")),
    (Layout(pp=2), {"micro_batch": 8}, ("micro-batches: 1", "at least 2")),
    (Layout(pp=2), {"micro_batch": 3}, ("batch: 8", "multiple")),
    (Layout(pp=2), {"micro_batch": 2, "batch_start": 4, "batch_ramp": 0.5}, ("batch: 4 to 8",)),
    (Layout(pp=2, schedule="zb-h1"), {"micro_batch": 2, "recompute": 0.5}, ("recompute: 0.5",)),
    (Layout(pp=2, schedule="none"), {"micro_batch": 2}, ("schedule: 'none'",)),
], ids=str)
def test_what_cannot_be_is_one_line(layout, changes, words):
    refused(lambda: check_layout(layout, TINY, RECIPE.with_(**changes)), *words)


def test_what_can_be_passes():
    ramp = RECIPE.with_(batch_start=4, batch_ramp=0.5, micro_batch=8)
    check_layout(Layout(dp=2, ep=2), TINY, ramp)
    check_layout(Layout(pp=2, ep=2), TINY, RECIPE.with_(micro_batch=2, recompute=0.5))


# ---- the hybrid engine

def trained_and_asked(layout, recipe, experts):
    """Logits in the inference layout between two steps, and what training goes on with."""
    trainer = trainer_of(Several(layout), recipe, SMALLER)
    trainer.step()
    engine = Hybrid(trainer, experts)
    plan = engine.plan()
    before = {n: t.clone() for n, t in moments(trainer.optimizers).items()}
    with engine.inference() as model, torch.no_grad():
        logits = model(torch.arange(20).view(2, 10))
        left = sum(W.nbytes for W in trainer.model.parameters())
        left += sum(t.nbytes for t in moments(trainer.optimizers).values() if t.ndim)
    after = moments(trainer.optimizers)
    same = all(torch.equal(t, after[n]) for n, t in before.items())
    return {"logits": logits, "left": left, "same": same, "plan": vars(plan),
            "peaks": engine.peaks, "freed": sum(W.nbytes for W in model.parameters()),
            "gradients": {}, "held": trainer.model.held} | {
                k: v for k, v in some_steps(trainer, 1).items() if k in ("log", "weights")}


@pytest.mark.parametrize("name, experts", [("pp2 ep2 1f1b", "all"), ("ep2 dp2", "share")])
def test_text_is_written_in_another_layout_and_training_goes_on(name, experts, four):
    layout = replace(LAYOUTS[name], zero1=True)
    recipe = recipe_of(layout)
    whole = trainer_of(Alone(), recipe, SMALLER)
    whole.step()
    with torch.no_grad():
        logits = whole.model.eval()(torch.arange(20).view(2, 10))
    expected = some_steps(whole, 1) | {"gradients": {}}
    answers = four(trained_and_asked, layout, recipe, experts)
    assert worst(answers, expected) < 1e-10
    for answer in answers:
        assert torch.allclose(answer["logits"], logits, rtol=0, atol=1e-10)
        assert answer["left"] == answer["freed"] == 0 and answer["same"]
        assert answer["peaks"] == answer["plan"]             # bytes, each phase, as planned
    full = sum(W.nbytes for W in whole.model.parameters())
    if experts == "all":
        assert all(answer["peaks"]["inference"] == full for answer in answers)
    else:
        assert all(answer["peaks"]["inference"] < full for answer in answers)

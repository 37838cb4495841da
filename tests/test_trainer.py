# SPDX-License-Identifier: MIT
"""One step, what a state holds, and the seams: objective and world."""

import gc
import json
import math
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
from refusals import refused
from small_run import CONFIG, RECIPE, tokens, trainer

from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.adamw8 import AdamW8
from dsv2_ref.training.objective import Batch, Named, pretraining
from dsv2_ref.training.optim import by_muon
from dsv2_ref.training.pretrain import (
    Stopped,
    Trainer,
    TrainingDiverged,
    clip_gradients,
    train,
)
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import load_state
from dsv2_ref.training.world import World

EXACT = ("step", "tokens", "language", "expert", "device", "communication", "gradient_norm", "lr",
         "batch")


def exact(log):
    return [[entry[key] for key in EXACT] for entry in log]


def floats(losses):
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("changes", [
    {"optimizer": "muon"}, {"optimizer": "adamw"}, {"optimizer": "adamw8"},
    {"optimizer": "adamw8", "weights": "bf16", "micro_batch": 2, "recompute": 0.5},
], ids=lambda changes: " ".join(map(str, changes.values())))
def test_resumed_losses_are_bit_equal(tmp_path, changes):
    """From other weights, all of them zero: nothing may be left of a fresh start."""
    recipe = RECIPE.with_(**changes)
    whole = train(trainer(recipe), progress=False)
    first = trainer(recipe)
    for _ in range(5):
        first.step()
    first.save(tmp_path / "state.safetensors")
    second = trainer(recipe)
    with torch.no_grad():
        for weight in second.model.parameters():
            weight.zero_()
    second.load(tmp_path / "state.safetensors")
    assert second.steps == 5
    rest = train(second, progress=False)
    assert exact(rest) == exact(whole[5:])


def test_tied_weights_survive_a_resume(tmp_path):
    first = trainer()
    first.step()
    first.save(tmp_path / "s")
    second = trainer()
    second.load(tmp_path / "s")
    assert second.model.head.weight is second.model.embedding.weight


def test_two_runs_are_equal_and_each_seed_matters_alone():
    def losses(weights, seed, **changes):
        recipe = RECIPE.with_(seed=seed, steps=3, **changes)
        return exact(train(trainer(recipe, seed=weights), progress=False))

    assert losses(0, 0) == losses(0, 0)
    assert losses(0, 0) != losses(1, 0)                    # the weights
    assert losses(0, 0) != losses(0, 1)                    # the recipe's: data and protection
    seen = [trainer(RECIPE.with_(seed=seed)).batches.next_batch(9)[0] for seed in (0, 1)]
    assert not torch.equal(*seen)


def test_state_of_another_run_is_refused(tmp_path):
    trainer().save(tmp_path / "s")
    with pytest.raises(ValueError, match="recipe.lr was 0.006, expected 0.1"):
        trainer(RECIPE.with_(lr=0.1)).load(tmp_path / "s")
    with pytest.raises(ValueError, match="config.hidden_size was 24, expected 20"):
        trainer(config=CONFIG.with_(d=20)).load(tmp_path / "s")
    other = Trainer(DeepSeekV2(CONFIG), RECIPE, tokens()[:-1])
    with pytest.raises(ValueError, match="cannot resume: tokens"):
        other.load(tmp_path / "s")


def test_losses_that_are_no_numbers_stop_the_run_and_leave_the_weights():
    run = trainer()
    run.step()
    with torch.no_grad():
        run.model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in run.model.parameters()]
    assert [run.step().get("skipped") for _ in range(2)] == [True, True]
    with pytest.raises(TrainingDiverged, match=r"step 4: loss nan.*weights are those of step 1"):
        run.step()
    assert all(torch.equal(a, b) or a.isnan().any()
               for a, b in zip(before, run.model.parameters(), strict=True))


def test_one_bad_batch_is_left_out_and_the_run_goes_on(monkeypatch):
    run = trainer(RECIPE.with_(steps=80))
    real = run._backward

    def bad(*args):
        sums, load = real(*args)
        if run.steps == 3:
            run.model.head.weight.grad[0, 0] = float("inf")
        if run.steps in (70, 75, 76, 77, 78):
            for p in run.model.parameters():
                p.grad *= 1e3
        return sums, load

    monkeypatch.setattr(run, "_backward", bad)
    seen = []
    for _ in range(79):
        before = run.model.head.weight.detach().clone()
        entry = run.step()
        assert torch.equal(before, run.model.head.weight) == entry.get("skipped", False)
        seen += [entry["step"]] * entry.get("skipped", False)
    assert seen == [4, 71, 76, 77, 78]        # the fourth large one in a row, 79, is believed


def test_micro_batches_give_the_gradient_of_the_batch():
    """Dropping off: its budget is taken for each micro-batch, as the paper's is for each device."""
    config = CONFIG.with_(drop_capacity=None)
    gradients, entries = [], []
    for micro in (None, 2, 1):
        run = trainer(Recipe(steps=2, batch=5, sequence=17, precision="fp32", micro_batch=micro),
                      config)
        run.model.double()
        batch = Batch(run.batches.next_batch(5), torch.zeros(5, dtype=torch.bool))
        entries.append(floats(run._backward(batch)[0]))
        gradients.append([p.grad for p in run.model.parameters()])
    for other, sums in zip(gradients[1:], entries[1:], strict=True):
        assert sums == pytest.approx(entries[0], rel=1e-10)
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_recomputing_changes_nothing():
    """Balance losses, dropping and the load included, though blocks run twice."""
    entries, gradients = [], []
    for share in (0.0, 0.5, 1.0):
        run = trainer(RECIPE.with_(recompute=share))
        batch = Batch(run.batches.next_batch(3), torch.tensor([True, False, False]), True)
        sums, load = run._backward(batch)
        entries.append((floats(sums), [layer.experts.tolist() for layer in load]))
        gradients.append([p.grad for p in run.model.parameters()])
    assert entries[0] == entries[1] == entries[2] and len(entries[0][1]) == 1
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


def saved_bytes(run):
    """What autograd keeps between forward and backward, each storage once, without the weights."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = run.batches.next_batch(3)
    run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = run.model.losses(x, y)
    assert losses.total > 0
    return sum(kept.values())


def test_recomputing_keeps_less():
    config = CONFIG.with_(n_layers=6)
    kept = [saved_bytes(trainer(RECIPE.with_(recompute=share), config)) for share in (0, 0.5, 1)]
    assert kept[2] < kept[1] / 2 < kept[0] / 2


def test_bf16_weights_learn_and_the_router_stays_in_fp32():
    recipe = RECIPE.with_(steps=160, optimizer="adamw8", weights="bf16", precision="auto", lr=5e-3)
    run = trainer(recipe)
    assert run.precision == "fp32"                         # no autocast over bf16 weights
    for name, weight in run.model.named_parameters():
        assert weight.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    log = train(run, progress=False)
    master = train(trainer(recipe.with_(weights="fp32", optimizer="adamw", precision="fp32")),
                   progress=False)
    last = [np.mean([e["language"] for e in entries[-10:]]) for entries in (log, master)]
    assert last[0] < 2.2 and abs(last[0] - last[1]) < 0.2


def test_the_norm_of_bf16_gradients_is_taken_in_fp32():
    weights = [torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16)) for _ in range(3)]
    g = torch.Generator().manual_seed(0)
    for W in weights:
        W.grad = torch.randn(300, generator=g).bfloat16()
    exact = math.sqrt(sum(W.grad.double().square().sum().item() for W in weights))
    assert clip_gradients(weights, 1e9).item() == pytest.approx(exact, rel=1e-6)
    assert clip_gradients(weights, 2.0).item() == pytest.approx(exact, rel=1e-6)
    assert clip_gradients(weights, 2.0).item() == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("most", [0.2, 1e3])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8"])
def test_an_update_is_that_of_clipped_gradients(optimizer, most, monkeypatch):
    """In fp32 bit for bit, whether they are scaled first or the factor is multiplied in."""
    recipe = RECIPE.with_(optimizer=optimizer, batch_start=3, clip=most)
    folded, seen = trainer(recipe), []
    kind = AdamW8 if optimizer == "adamw8" else torch.optim.AdamW
    real = kind.step

    def watched(self, **more):
        squares = [W.grad.square().sum() for g in self.param_groups for W in g["params"]]
        seen.append(sum(squares).sqrt().item())
        real(self, **more)

    monkeypatch.setattr(kind, "step", watched)
    norms = [folded.step()["gradient_norm"] for _ in range(3)]
    monkeypatch.undo()
    assert 0.4 < min(norms) and max(norms) < 1e3
    scaled = norms if optimizer == "adamw8" else [min(norm, most) for norm in norms]
    assert seen == pytest.approx(scaled, rel=1e-4)
    first = trainer(recipe)
    for _ in range(3):
        first._set_rate()
        _, _, norm = first._gradients(first._read(False))
        clip_gradients(first.model.parameters(), most, norm)
        for o in first.optimizers:
            o.step()
            o.zero_grad()
        first.steps += 1
    found = [dict(run.model.named_parameters()) for run in (folded, first)]
    assert all(torch.equal(W, found[1][name]) for name, W in found[0].items())


def test_memory_is_flat_over_fifty_steps():
    run = trainer(RECIPE.with_(steps=60))
    counts = []
    for i in range(53):
        run.step(with_load=True)
        if i in (2, 52):
            gc.collect()
            counts.append(sum(o.nbytes for o in gc.get_objects()
                              if type(o) in (torch.Tensor, torch.nn.Parameter)))
    assert counts[0] == counts[1]


def test_protected_sequences_drop_nothing():
    def dropped(share):
        run = trainer(RECIPE.with_(protected=share, batch_start=3))
        return run.step(with_load=True)["load"][0].dropped

    assert dropped(1.0) == 0.0 < dropped(0.0)


def test_the_share_of_protected_sequences_and_other_ones_at_each_step():
    run = trainer(RECIPE.with_(batch=40, batch_start=40, protected=0.3, steps=60))
    drawn = []
    for run.steps in range(60):
        drawn.append(run._read(False).protected)
    share = torch.stack(drawn).double().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2400)
    assert len({tuple(d.tolist()) for d in drawn}) == 60
    run.steps = 7
    assert torch.equal(run._read(False).protected, drawn[7])           # of (seed, step) alone
    other = trainer(RECIPE.with_(batch=40, batch_start=40, protected=0.3, steps=60, seed=1))
    assert not torch.equal(other._read(False).protected, drawn[0])


def test_what_is_protected_reaches_the_model():
    seen = []

    def watching(model, batch):
        seen.append(batch.protected)
        return pretraining(model, batch)

    run = trainer(RECIPE.with_(protected=0.5, batch_start=3), objective=watching)
    expected = []
    for _ in range(4):
        draw = torch.Generator().manual_seed(run.steps)
        expected.append(torch.rand(3, generator=draw) < 0.5)
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert 0 < torch.cat(seen).double().mean() < 1


def test_bf16_matmuls_leave_weights_and_router_in_fp32():
    run = trainer(RECIPE.with_(precision="bf16"))
    load = run.step(with_load=True)["load"][0]
    assert load.routing.scores.dtype == torch.float32
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


# ---- what a state holds

def spiky(run):
    """The same trainer, with gradients 1000 times too large at five steps."""
    real = run._backward

    def bad(*args):
        found = real(*args)
        if run.steps in (66, 70, 71, 72, 73):
            for p in run.model.parameters():
                p.grad *= 1e3
        return found

    run._backward = bad
    return run


def fields(run):
    """Everything a trainer is made of, comparable; a new field has to find its place here."""
    values = dict(vars(run))
    values.pop("_backward", None)
    model, optimizers, world = (values.pop(name) for name in ("model", "optimizers", "world"))
    values["batches"] = (run.batches.state(), vars(run.batches)["_starts"].tolist())
    values["recipe"], values["world"] = asdict(run.recipe), (type(world), vars(world))
    values["weights"] = {name: (W.dtype, W.tolist()) for name, W in model.state_dict().items()}
    values["recompute"], values["tied"] = model.recompute, model.head.weight is \
        model.embedding.weight
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        values[f"groups {i}"] = [{k: v for k, v in group.items() if k != "lr"}    # set each step
                                 for group in json.loads(json.dumps(state["param_groups"]))]
        values[f"moments {i}"] = {(j, key): (t.dtype, t.tolist())
                                  for j, of in state["state"].items() for key, t in of.items()}
    return values


@pytest.mark.parametrize("changes", [
    {"optimizer": "muon"}, {"optimizer": "adamw"},
    {"optimizer": "adamw8", "weights": "bf16", "micro_batch": 2, "recompute": 0.5, "seed": 3},
], ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_field_of_a_resumed_trainer_is_as_it_was(tmp_path, changes):
    """In the middle of a spike, with the guard's memory full; and it goes on the same way."""
    recipe = RECIPE.with_(steps=80, protected=0.3, **changes)
    first = spiky(trainer(recipe))
    for _ in range(72):
        first.step()
    first.save(tmp_path / "s")
    second = spiky(trainer(recipe, seed=1))
    assert fields(second) != fields(first)
    second.load(tmp_path / "s")
    assert fields(second) == fields(first)
    assert second.skipped == 2 and len(second.norms) == 64 and second.elapsed > 0
    logs = [[run.step() for _ in range(6)] for run in (first, second)]
    assert exact(logs[0]) == exact(logs[1])
    assert [e["step"] for e in logs[1] if e.get("skipped")] == [73]    # 74 is believed
    assert fields(second) | {"elapsed": 0} == fields(first) | {"elapsed": 0}


def test_the_clock_goes_on_after_a_resume(tmp_path):
    first = trainer()
    first.step()
    first.elapsed = 1234.5
    first.save(tmp_path / "s")
    second = trainer()
    second.load(tmp_path / "s")
    assert 1234.5 < second.step()["seconds"] < 1300
    by_clock = trainer(Recipe(seconds=2000.0, batch=3, sequence=17, precision="fp32"))
    by_clock.elapsed = 500.0
    assert by_clock.progress == 0.25


def test_a_state_that_lacks_something_is_one_line(tmp_path):
    run = trainer()
    run.step()
    run.save(tmp_path / "s")
    tensors, state = load_state(tmp_path / "s")
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        refused(lambda rest=rest: trainer().restore("s", tensors, rest), f"{key}: missing")
    for key in ("model.norm.weight", "moment.norm.weight.exp_avg",
                "moment.blocks.1.ffn.experts.W_up.momentum"):
        rest = {k: v for k, v in tensors.items() if k != key}
        refused(lambda rest=rest: trainer().restore("s", rest, state), key, "missing")
    for key in ("model.extra", "moment.extra.exp_avg"):
        more = tensors | {key: torch.ones(1)}
        refused(lambda more=more: trainer().restore("s", more, state), key, "not expected")
    for key in ("model.norm.weight", "moment.norm.weight.exp_avg"):
        other = tensors | {key: torch.ones(5)}
        refused(lambda other=other: trainer().restore("s", other, state), key, "(5,)", "(24,)")
    untouched = trainer()
    before = fields(untouched)
    refused(lambda: untouched.restore("s", other, state), "shape")
    assert fields(untouched) == before


def test_a_state_of_an_earlier_version_is_one_line(tmp_path):
    run = trainer()
    run.step()
    run.save(tmp_path / "s")
    tensors, state = load_state(tmp_path / "s")
    numbered = {name: t for name, t in tensors.items() if name.startswith("model.")}
    numbered |= {"optimizer.0.1.exp_avg": torch.ones(24)}
    refused(lambda: trainer().restore("s", numbered, state | {"groups": []}), "earlier version",
            "by name")


@pytest.mark.parametrize("optimizer", ["muon", "adamw8"])
def test_a_state_speaks_of_everything_by_name(tmp_path, optimizer):
    """So that others may read it who hold other parts, or have other numbers for them."""
    run = trainer(RECIPE.with_(optimizer=optimizer))
    run.step()
    run.save(tmp_path / "s")
    tensors, _ = load_state(tmp_path / "s")
    names = {name for name, _ in run.model.named_parameters()}
    keys = {"adamw8": {"step", "m", "v", "m_largest", "v_largest"}}
    found = {}
    for full in tensors:
        kind, name = full.split(".", 1)
        if kind == "moment":
            name, _, key = name.rpartition(".")
            found.setdefault(name, set()).add(key)
        assert kind in ("model", "moment") and (kind == "model" or name in names), full
    assert found.keys() == names
    for name, of in found.items():
        muon = optimizer == "muon" and by_muon(name, run.model.get_parameter(name))
        adamw = {"step", "exp_avg", "exp_avg_sq"}
        assert of == ({"momentum"} if muon else keys.get(optimizer, adamw)), name


def test_a_resumed_run_may_have_another_rate_where_that_is_asked_for(tmp_path):
    first = trainer()
    first.step()
    first.save(tmp_path / "s")
    path, *state = tmp_path / "s", *load_state(tmp_path / "s")
    lower = trainer(RECIPE.with_(lr=1e-3))
    refused(lambda: lower.restore(path, *state), "recipe.lr was 0.006, expected 0.001")
    lower.restore(path, *state, other_rates=True)
    entry = lower.step()
    assert entry["lr"] == entry["adamw_lr"] == 1e-3
    assert [g["lr"] for o in lower.optimizers for g in o.param_groups] == [1e-3] * 3
    other = trainer(RECIPE.with_(clip=2.0))
    refused(lambda: other.restore(path, *state, other_rates=True), "recipe.clip was 1.0")


# ---- rates and seeds reach everything

@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adamw8"])
def test_a_step_moves_every_weight_and_the_rate_all_of_them(optimizer):
    """Learning by the head and the embedding alone would make the loss fall, too."""
    moves = {}
    for lr in (1e-3, 1e-4):
        run = trainer(RECIPE.with_(optimizer=optimizer, batch_start=3, weight_decay=0.0, lr=lr))
        before = {n: W.detach().clone() for n, W in run.model.named_parameters()}
        run.step()
        moves[lr] = {n: (W.detach() - before[n]).norm().item()
                     for n, W in run.model.named_parameters()}
    for name, far in moves[1e-3].items():
        assert far > 0, name
        assert far / moves[1e-4][name] == pytest.approx(10, rel=0.01), name


def test_the_head_alone_can_be_trained():
    run = trainer(RECIPE.with_(optimizer="adamw", steps=3), CONFIG.with_(tie_embeddings=False))
    run.model.requires_grad_(False)
    run.model.head.weight.requires_grad_(True)
    before = {n: W.clone() for n, W in run.model.state_dict().items()}
    run.step()
    moved = {n for n, W in run.model.state_dict().items() if not torch.equal(W, before[n])}
    assert moved == {"head.weight"}


def test_the_optimiser_draws_from_the_recipes_seed():
    recipe = RECIPE.with_(optimizer="adamw8", weights="bf16", lr=1e-3)
    for seed in (0, 5):
        run = trainer(recipe.with_(seed=seed))
        assert {g["seed"] for o in run.optimizers for g in o.param_groups} == {seed}


def test_the_log_says_the_rate_of_both_optimisers():
    run = trainer(RECIPE.with_(adamw_lr=3e-3).with_(lr=2e-3))
    entry = run.step()
    assert (entry["lr"], entry["adamw_lr"]) == (2e-3, 1e-3)
    adamw, muon = run.optimizers
    assert [g["lr"] for g in (*adamw.param_groups, *muon.param_groups)] == [1e-3, 1e-3, 2e-3]
    assert "adamw_lr" not in trainer(RECIPE.with_(optimizer="adamw")).step()
    entry = trainer(Recipe(steps=12, batch=2, sequence=17, precision="fp32", lr=1e-12)).step()
    assert entry["lr"] == entry["adamw_lr"] == 1e-12


# ---- objective and world

def test_another_objective_reads_what_its_batches_give():
    """Two losses by name; their sum is trained on, and the log has both."""
    class Pairs:
        def next_batch(self, batch):
            x = torch.arange(batch * 9).view(batch, 9) % 61
            return x, x.roll(-1, 1), torch.full((batch,), 2.0)

        def state(self):
            return {}

        def load(self, state):
            pass

    def objective(model, batch):
        tokens, targets, weight = batch.tensors
        losses = model.losses(tokens, targets)
        return Named({"policy": losses.language * weight.mean(), "pull": losses.expert})

    torch.manual_seed(0)
    run = Trainer(DeepSeekV2(CONFIG), RECIPE.with_(micro_batch=2, batch_start=3), Pairs(),
                  objective)
    entry = run.step()
    assert entry["policy"] == pytest.approx(2 * math.log(61), rel=0.05)
    assert entry["loss"] == entry["policy"] + entry["pull"] and "language" not in entry
    assert train(run, progress=False)[-1]["step"] == 12


class Two(World):
    """One of two threads that train together: sums are made where both have come."""

    def __init__(self, rank, meet, given):
        self.rank, self.meet, self.given = rank, meet, given
        self.first = rank == 0

    def share(self, batch):
        half = len(batch) // 2
        self.seen = batch
        return batch.rows(slice(0, half) if self.rank == 0 else slice(half, None))

    def reduce(self, tensors):
        self.given[self.rank] = [t.clone() for t in tensors]
        self.meet.wait()
        for t, a, b in zip(tensors, *self.given, strict=True):
            t.copy_(a + b)
        self.meet.wait()

    def save(self, path, tensors, state):
        if self.first:
            super().save(path, tensors, state)


def two_ranks(recipe, work):
    """What `work` does with the trainer of each of two ranks, one after the other's name."""
    meet, given, done = threading.Barrier(2, timeout=60), [None, None], [None, None]
    runs = [trainer(recipe, world=Two(rank, meet, given)) for rank in (0, 1)]

    def one(rank):
        try:
            done[rank] = work(runs[rank])
        except BaseException:
            meet.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return runs, done


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_ranks_train_as_one_process_does_with_micro_batches(optimizer):
    """In fp64; each rank drops within its own budget, as a micro-batch does."""
    recipe = RECIPE.with_(batch=4, batch_start=4, steps=5, optimizer=optimizer, protected=0.4,
                          clip=0.5)

    def work(run):
        run.model.double()
        return [run.step() for _ in range(5)]

    alone = trainer(recipe.with_(micro_batch=2))
    expected = work(alone)
    runs, logs = two_ranks(recipe, work)
    for run, log in zip(runs, logs, strict=True):
        for a, b in zip(exact(log), exact(expected), strict=True):
            assert a == pytest.approx(b, rel=1e-10)
        assert run.batches.state() == alone.batches.state()
    for a, b, c in zip(*(r.model.parameters() for r in (*runs, alone)), strict=True):
        assert torch.equal(a, b) and torch.allclose(a, c, rtol=0, atol=1e-10)
    assert torch.equal(runs[0].world.seen.protected, runs[1].world.seen.protected)


def test_two_ranks_write_one_log_and_one_state(tmp_path):
    recipe = RECIPE.with_(batch=2, batch_start=2, steps=4)
    _, logs = two_ranks(recipe, lambda run: train(run, tmp_path, 2, progress=False))
    assert exact(logs[0]) == exact(logs[1])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {
        f"state-{step:09}.safetensors" for step in (2, 4)}


def test_all_ranks_stop_at_the_step_after_a_signal_to_one(tmp_path):
    recipe = RECIPE.with_(batch=2, batch_start=2, steps=9)
    told = [None, None]

    def work(run):
        def asked(signal, me=run.world.rank):
            told[me] = 15 if me == 1 and run.steps == 3 else signal
            run.world.meet.wait()
            found = told[0] or told[1]
            run.world.meet.wait()
            return found

        run.world.asked = asked
        try:
            train(run, tmp_path, 0, progress=False)
        except Stopped as stopped:
            return run.steps, stopped.code
        return run.steps, None

    _, done = two_ranks(recipe, work)
    assert done == [(3, 143), (3, 143)]
    assert (tmp_path / "state-000000003.safetensors").exists()


def test_a_batch_too_small_for_the_world_is_one_line():
    class Last(World):
        def share(self, batch):
            return batch.rows(slice(1, None))

    run = trainer(RECIPE, world=Last())                    # the ramp begins with one sequence
    refused(run.step, "micro-batch: 1 sequences", "one for each process")


def test_the_device_is_waited_for_once_a_step(monkeypatch):
    """However many micro-batches there are; the objective is one that waits for nothing."""
    def objective(model, batch):
        return Named({"a": model.embedding.weight.square().sum(), "b": model.norm.weight.sum()})

    run = trainer(RECIPE.with_(batch=6, batch_start=6, micro_batch=1, optimizer="muon"),
                  objective=objective)
    run.step()
    waits = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, real=real, name=name: (
            waits.append(name), real(self, *a))[1])
    for optimizer in run.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: None)
    run.step()
    assert waits == ["tolist"]

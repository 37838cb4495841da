# SPDX-License-Identifier: MIT
import gc
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training import machine, pretrain
from dsv2_ref.training.pretrain import Trainer, TrainingDiverged, train
from dsv2_ref.training.recipe import Recipe

CONFIG = TINY.with_(vocab=61, d=24, n_layers=2, dense_width=40, n_routed=8, expert_width=12,
                    n_h=2, d_h=6, d_r=4, d_v=6, d_c=10, d_cq=14)
RECIPE = Recipe(steps=12, batch=3, sequence=17, precision="fp32", batch_start=1, batch_ramp=0.4)


def tokens():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.integers(1, 4, 3000)) % 61       # the next token is one of three
    return walk.astype(np.uint16)


def trainer(recipe=RECIPE, config=CONFIG):
    torch.manual_seed(recipe.seed)
    return Trainer(DeepSeekV2(config), recipe, tokens())


def test_it_learns():
    log = train(trainer(RECIPE.with_(steps=160)), progress=False)
    first, last = (np.mean([e["language"] for e in part]) for part in (log[:5], log[-5:]))
    assert first == pytest.approx(np.log(61), abs=0.3)
    assert last < 1.8                                      # ln 3 = 1.10 is the floor


def test_log_names_everything():
    log = train(trainer(), progress=False, load_every=5)
    assert [e["batch"] for e in log][:6] == [1, 1, 2, 2, 3, 3]
    assert [e["tokens"] for e in log][:3] == [17, 34, 68]
    loads = [e for e in log if "expert_load" in e]
    assert [e["step"] for e in loads] == [1, 6, 11]
    for e in loads:                                        # one MoE layer; K slots a token
        assert np.array(e["expert_load"]).shape == (1, 8)
        assert np.sum(e["expert_load"]) == e["batch"] * 17 * CONFIG.top_k
        assert 0 < e["dropped"][0] < 1
        assert np.log(8) - 0.1 < e["gate_entropy"][0] < np.log(8)         # a fresh router
    assert all(e[k] > 0 for e in log for k in ("expert", "device", "communication"))


@pytest.mark.parametrize("changes", [
    {"optimizer": "muon"}, {"optimizer": "adamw"}, {"optimizer": "adamw8"},
    {"optimizer": "adamw8", "weights": "bf16", "micro_batch": 2, "recompute": 0.5},
], ids=lambda changes: " ".join(map(str, changes.values())))
def test_resumed_losses_are_bit_equal(tmp_path, changes):
    recipe = RECIPE.with_(**changes)
    whole = train(trainer(recipe), progress=False)
    first = trainer(recipe)
    for _ in range(5):
        first.step()
    first.save(tmp_path / "state.safetensors")
    second = trainer(recipe.with_(seed=0), CONFIG)
    with torch.no_grad():
        for weight in second.model.parameters():
            weight.zero_()                                 # nothing may be left of a fresh start
    second.load(tmp_path / "state.safetensors")
    assert second.steps == 5
    rest = train(second, progress=False)
    exact = ("step", "tokens", "language", "expert", "device", "communication", "gradient_norm")
    assert [[e[k] for k in exact] for e in rest] == [[e[k] for k in exact] for e in whole[5:]]


def test_tied_weights_survive_a_resume(tmp_path):
    first = trainer()
    first.step()
    first.save(tmp_path / "s")
    second = trainer()
    second.load(tmp_path / "s")
    assert second.model.head.weight is second.model.embedding.weight


def test_two_runs_are_equal_and_seeds_matter():
    runs = [train(trainer(RECIPE.with_(seed=s, steps=3)), progress=False) for s in (0, 0, 1)]
    losses = [[e["language"] for e in run] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_state_of_another_run_is_refused(tmp_path):
    trainer().save(tmp_path / "s")
    with pytest.raises(ValueError, match="recipe.lr was 0.006, expected 0.1"):
        trainer(RECIPE.with_(lr=0.1)).load(tmp_path / "s")
    with pytest.raises(ValueError, match="config.hidden_size was 24, expected 20"):
        trainer(config=CONFIG.with_(d=20)).load(tmp_path / "s")
    other = Trainer(DeepSeekV2(CONFIG), RECIPE, tokens()[:-1])
    with pytest.raises(ValueError, match="cannot resume: tokens"):
        other.load(tmp_path / "s")


def test_ctrl_c_saves_between_steps(tmp_path, monkeypatch):
    run = trainer()
    step = run.step

    def interrupted(*args):
        if run.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)            # in the middle of step 5
        return step(*args)

    monkeypatch.setattr(run, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    again = trainer()
    again.load(tmp_path / "state-000000005.safetensors")
    assert again.steps == 5
    rest = train(again, tmp_path, progress=False)
    whole = train(trainer(), progress=False)
    assert [e["language"] for e in rest] == [e["language"] for e in whole[5:]]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines] == list(range(1, 13))
    assert [e["language"] for e in lines] == [e["language"] for e in whole]


def test_interrupted_save_keeps_the_good_state(tmp_path, monkeypatch):
    run = trainer()
    run.step()
    run.save(tmp_path / "s")
    good = (tmp_path / "s").read_bytes()

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    run.step()
    with pytest.raises(ValueError, match="cannot be written"):
        run.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


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
        x, y = run.batches.next_batch()
        entries.append(run._backward(x, y, torch.zeros(5, dtype=torch.bool), False)[0])
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
        x, y = run.batches.next_batch(3)
        run.model.train()
        sums, load = run._backward(x, y, torch.tensor([True, False, False]), True)
        entries.append((sums, [layer.experts.tolist() for layer in load]))
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
    assert pretrain.clip_gradients(weights, 1e9) == pytest.approx(exact, rel=1e-6)
    assert pretrain.clip_gradients(weights, 2.0) == pytest.approx(exact, rel=1e-6)
    assert pretrain.clip_gradients(weights, 2.0) == pytest.approx(2.0, rel=1e-2)


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


def test_by_the_clock_the_schedule_follows_the_time(monkeypatch):
    now = iter(range(0, 1000))
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: float(next(now)))
    run = trainer(Recipe(seconds=5.0, batch=2, sequence=9, precision="fp32"))
    log = train(run, progress=False)
    assert [e["seconds"] for e in log] == [1, 2, 3, 4, 5]  # each step takes "one second"
    assert [round(e["lr"] / 6e-3, 3) for e in log] == [0.0, 1.0, 0.86, 0.58, 0.3]


def test_protected_sequences_drop_nothing():
    def dropped(share):
        run = trainer(RECIPE.with_(protected=share, batch_start=3))
        return run.step(with_load=True)["load"][0].dropped

    assert dropped(1.0) == 0.0 < dropped(0.0)


def test_bf16_matmuls_leave_weights_and_router_in_fp32():
    run = trainer(RECIPE.with_(precision="bf16"))
    load = run.step(with_load=True)["load"][0]
    assert load.routing.scores.dtype == torch.float32
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        train(trainer(), tmp_path / "file" / "run", progress=False)


def test_the_fastest_number_of_threads_is_found(monkeypatch):
    monkeypatch.setattr(machine, "_CORES", 4)
    threads, now = [1], [0.0]

    def work():                      # four threads that get into each other's way
        now[0] += {1: 1.0, 4: 3.0}[threads[-1]]

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(machine.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: threads[-1])
    machine.set_fastest_threads(work)
    assert threads[-1] == 1 and 4 in threads

# SPDX-License-Identifier: MIT
"""The loop: the log, signals, divergence, the clock."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from small_run import CONFIG, RECIPE, trainer

from dsv2_ref.training import machine
from dsv2_ref.training import trainer as one_step
from dsv2_ref.training.pretrain import Stopped, TrainingDiverged, train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder, read_log


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
    for e in loads:                                        # one MoE layer; K slots per token
        assert np.array(e["expert_load"]).shape == (1, 8)
        assert np.sum(e["expert_load"]) == e["batch"] * 17 * CONFIG.top_k
        assert 0 < e["dropped"][0] < 1
        assert np.log(8) - 0.1 < e["gate_entropy"][0] < np.log(8)         # a fresh router
    assert all(e[k] > 0 for e in log for k in ("expert", "device", "communication"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129),
                                            ("SIGUSR1", 138)])
def test_a_signal_saves_between_steps(tmp_path, monkeypatch, name, code):
    run, number = trainer(), getattr(signal, name)
    step = run.step

    def interrupted(*args):
        if run.steps == 4:
            os.kill(os.getpid(), number)                   # in the middle of step 5
        return step(*args)

    monkeypatch.setattr(run, "step", interrupted)
    before = {n: signal.getsignal(n) for n in (number, signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(Stopped) as stopped:
        train(run, tmp_path, progress=False)
    assert stopped.value.code == code and isinstance(stopped.value, KeyboardInterrupt)
    assert {n: signal.getsignal(n) for n in before} == before
    again = trainer()
    again.load(tmp_path / "state-000000005.safetensors")
    assert again.steps == 5
    rest = train(again, tmp_path, progress=False)
    whole = train(trainer(), progress=False)
    assert [e["language"] for e in rest] == [e["language"] for e in whole[5:]]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines] == list(range(1, 13))
    assert [e["language"] for e in lines] == [e["language"] for e in whole]


def test_a_second_ctrl_c_stops_at_once_and_other_signals_do_not(tmp_path, monkeypatch):
    for number, steps in ((signal.SIGINT, 4), (signal.SIGTERM, 5)):
        run = trainer()
        step = run.step

        def interrupted(*args, run=run, step=step, number=number):
            if run.steps == 4:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return step(*args)

        monkeypatch.setattr(run, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run, tmp_path / str(number), progress=False)
        assert run.steps == steps


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = trainer(RECIPE.with_(steps=2))
        step = run.step
        monkeypatch.setattr(run, "step", lambda *a: os.kill(os.getpid(), signal.SIGHUP) or step(*a))
        assert len(train(run, progress=False)) == 2
    except Stopped:
        pytest.fail("the signal was taken")
    finally:
        signal.signal(signal.SIGHUP, before)


KILLED = """
import os, signal, sys
from small_run import trainer
from dsv2_ref.training.pretrain import Stopped, train
try:
    train(trainer(), sys.argv[1], progress=False, watch=lambda entry: (
        os.kill(os.getpid(), signal.SIGTERM) if entry["step"] == 3 else None))
except Stopped as stopped:
    sys.exit(stopped.code)
"""


def test_a_preempted_process_leaves_its_last_step(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120,
                          cwd=Path(__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 128 + signal.SIGTERM
    assert RunFolder(tmp_path).states[0].name == "state-000000003.safetensors"


def files(folder):
    return {p.name for p in folder.iterdir()}


def ruined(at, steps=12):
    """A trainer whose update in step `at` leaves no number behind."""
    run = trainer(RECIPE.with_(steps=steps))
    real = run.optimizers[0].step

    def step():
        real()
        if run.steps + 1 == at:
            with torch.no_grad():
                run.model.norm.weight[0] = float("nan")

    run.optimizers[0].step = step
    return run


@pytest.mark.parametrize(("at", "steps", "save_every", "kept"), [
    (3, 12, 1, [2]), (3, 12, 2, [0, 2]), (2, 12, 2, [0]), (4, 5, 1, [3]), (1, 3, 100, [0]),
])
def test_a_run_that_diverges_keeps_a_state_from_before(tmp_path, at, steps, save_every, kept):
    with pytest.raises(TrainingDiverged, match="loss nan.*try a lower lr"):
        train(ruined(at, steps), tmp_path, save_every, progress=False)
    names = [f"state-{step:09}.safetensors" for step in kept]
    assert files(tmp_path) == {"log.jsonl", *names}
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["language"] is None and last["skipped"] is True
    assert math.isnan(read_log(tmp_path)[-1]["language"])
    again = trainer(RECIPE.with_(steps=steps, lr=1e-3))
    again.restore(*RunFolder(tmp_path).newest(print), other_rates=True)
    assert again.steps == kept[-1]
    log = train(again, tmp_path, save_every, progress=False)
    assert all(math.isfinite(e["loss"]) for e in log) and log[-1]["lr"] == pytest.approx(2e-5)
    assert RunFolder(tmp_path).states[0].name == f"state-{steps:09}.safetensors"


@pytest.mark.parametrize("steps", [3, 4])
def test_a_gradient_without_numbers_is_gone_over_but_no_end(tmp_path, monkeypatch, steps):
    """The loss may be a number all the same: a norm of what is too large is 0, not NaN."""
    run = trainer(RECIPE.with_(steps=steps))
    real = run._backward

    def bad(*args):
        found = real(*args)
        if run.steps == 2:
            run.model.head.weight.grad[0, 0] = float("inf")
        return found

    monkeypatch.setattr(run, "_backward", bad)
    if steps == 3:
        with pytest.raises(TrainingDiverged, match="step 3: loss 4.*, gradient norm inf at"):
            train(run, tmp_path, 1, progress=False)
    else:
        train(run, tmp_path, 1, progress=False)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[2])
    assert entry["skipped"] and math.isfinite(entry["loss"]) and entry["gradient_norm"] is None
    kept = {3: [1], 4: [2, 4]}[steps]
    assert files(tmp_path) == {"log.jsonl", *(f"state-{step:09}.safetensors" for step in kept)}


def test_a_shorter_run_into_a_folder_keeps_its_own_states(tmp_path):
    for steps in (6, 4, 2):
        train(trainer(RECIPE.with_(steps=steps)), tmp_path, save_every=1, progress=False)
        names = [p.name for p in RunFolder(tmp_path).states]
        assert names == [f"state-{steps - i:09}.safetensors" for i in (0, 1)]
    seen = []
    train(trainer(RECIPE.with_(steps=1)), tmp_path, progress=False,
          watch=lambda entry: seen.extend(p.name for p in RunFolder(tmp_path).states))
    assert seen == ["state-000000000.safetensors"]        # of this run alone, from its beginning


def test_the_log_of_others_is_not_overwritten(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 2.0}\n')
    refused(lambda: train(trainer(), tmp_path, progress=False), "log.jsonl", "not written by")
    assert files(tmp_path) == {"log.jsonl"}
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "reward": 2.0}\n'


def test_by_the_clock_the_schedule_follows_the_time(monkeypatch):
    now = iter(range(0, 1000))
    monkeypatch.setattr(one_step.time, "perf_counter", lambda: float(next(now)))
    run = trainer(Recipe(seconds=5.0, batch=2, sequence=9, precision="fp32"))
    log = train(run, progress=False)
    assert [e["seconds"] for e in log] == [1, 2, 3, 4, 5]  # each step takes "one second"
    assert [round(e["lr"] / 6e-3, 3) for e in log] == [0.0, 1.0, 0.86, 0.58, 0.3]


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

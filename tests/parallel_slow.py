# SPDX-License-Identifier: MIT
"""Slower: eight ranks; and the command itself under torchrun, killed, restarted, resumed by others
(`make parallel`)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import world
from test_parallel_mesh import (
    RECIPE,
    SMALLER,
    Alone,
    alone,
    check_owned,
    on_ranks,
    resumed,
    saved_and_gone_on,
    some_steps,
    trainer_of,
    worst,
)

from dsv2_ref import checkpoint
from dsv2_ref.parallel.split import Layout

ROOT = Path(__file__).parents[1]
EXACT = ("step", "tokens", "language", "expert", "device", "communication", "gradient_norm", "lr")
COMMON = ["--preset", "tiny", "--corpus", "stories", "--text-bytes", "2e5", "--sequence", "32",
          "--batch", "8", "--micro-batch", "2", "--precision", "fp32", "--quiet"]


@pytest.fixture(scope="module")
def eight():
    with world(8) as ranks:
        yield ranks


@pytest.mark.parametrize("layout", [
    Layout(pp=2, dp=2, ep=2), Layout(pp=2, dp=2, ep=2, schedule="zbv", zero1=True),
    Layout(pp=2, dp=2, ep=2, schedule="dualpipev"), Layout(ep=8, zero1=True),
    Layout(pp=2, ep=4, schedule="interleaved-zb", zero1=True), Layout(pp=4, ep=2, zero1=True),
], ids=str)
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adamw8"])
def test_eight_ranks_train_as_one_process_does(layout, optimizer, eight):
    recipe = RECIPE.with_(optimizer=optimizer, batch=32, micro_batch=8)
    expected = alone(recipe)
    answers = eight(on_ranks, layout, recipe)
    assert worst(answers, expected) < 1e-10
    check_owned(layout, answers, expected)
    if layout.zero1:
        each = [answer["moment_bytes"] for answer in answers]
        assert max(each) < 0.4 * expected["moment_bytes"]


@pytest.mark.parametrize("layout", [
    Layout(pp=2, dp=4, schedule="gpipe"), Layout(pp=2, ep=4, schedule="zb-h1"),
    Layout(pp=2, dp=2, ep=2, schedule="interleaved"), Layout(dp=8, zero1=True),
], ids=str)
def test_other_layouts(layout, eight):
    recipe = RECIPE.with_(batch=32, micro_batch=8)
    assert worst(eight(on_ranks, layout, recipe), alone(recipe)) < 1e-10


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_state_of_eight_is_read_by_eight_others_and_by_one(optimizer, eight, tmp_path):
    wrote = Layout(pp=2, dp=2, ep=2, zero1=True)
    recipe = RECIPE.with_(optimizer=optimizer, batch=32, micro_batch=8)
    eight(saved_and_gone_on, wrote, recipe, tmp_path / "s")
    whole = trainer_of(Alone(), recipe, SMALLER, seed=5)
    whole.load(tmp_path / "s")
    expected = some_steps(whole, 2) | {"gradients": {}}
    for layout in (wrote, Layout(ep=8, zero1=True), Layout(dp=4, pp=2)):
        assert worst(eight(resumed, layout, recipe, tmp_path / "s"), expected) < 1e-10


# ---- the command

def command(n, *args, restarts=0):
    """What starts `train` on n processes; on one without torchrun where n is 0."""
    run = [sys.executable, "-m"]
    if n:
        run += ["torch.distributed.run", f"--nproc-per-node={n}", "--master-port=0",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                f"--max-restarts={restarts}", "-m"]
    return [*run, "dsv2_ref", "train", *COMMON, *map(str, args)]


def start(*args, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}     # see several_nodes.md
    return subprocess.Popen(command(*args, **options), text=True, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def finished(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def exact(folder):
    return [[entry[key] for key in EXACT] for entry in log_of(folder)]


FOUR = ("--ep", 2, "--pp", 2, "--schedule", "1f1b", "--zero1")


def test_four_processes_log_what_one_does(tmp_path):
    runs = {}
    for name, n, flags in (("one", 0, ()), ("four", 4, FOUR)):
        out, err = finished(start(n, "--steps", 6, "--out", tmp_path / name, *flags))
        runs[name] = json.loads(out)                      # one result, of the first
        if n:
            assert err.count("on this rank") == 1
    for mine, theirs in zip(log_of(tmp_path / "four"), log_of(tmp_path / "one"), strict=True):
        assert mine["language"] == pytest.approx(theirs["language"], rel=2e-4)
        for key in ("expert", "device", "communication"):
            assert mine[key] == pytest.approx(theirs[key], abs=2e-4)     # nats, beside 6
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-3)
        assert mine.get("expert_load") == theirs.get("expert_load")      # of the first step
        assert mine.get("dropped") == theirs.get("dropped")
    assert runs["four"]["bits_per_byte"] == pytest.approx(runs["one"]["bits_per_byte"], rel=1e-3)
    names = {p.name for p in (tmp_path / "four").iterdir()}
    assert names == {"config.json", "tokenizer.json", "log.jsonl", "model", "state-000000000",
                     "state-000000006"}
    checkpoint.load(tmp_path / "four" / "model")


def test_a_state_of_four_is_gone_on_with_by_two_and_by_one(tmp_path):
    out = tmp_path / "run"
    finished(start(4, "--steps", 8, "--out", tmp_path / "whole", *FOUR))
    finished(start(4, "--steps", 4, "--out", out, *FOUR))
    for n, steps, flags in ((2, 6, ("--ep", 2)), (0, 8, ())):
        finished(start(n, "--steps", steps, "--out", out, "--resume", *flags))
    # a rate depends on the share of the run that is done, so runs of other lengths differ
    assert [e["step"] for e in log_of(out)] == list(range(1, 9))
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.n_routed_experts == 8


def ranks_of(process):
    """Processes that torchrun has started."""
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True,
                          check=False)
    return [int(line) for line in done.stdout.split()]


def wait_for(folder, step):
    for _ in range(1200):
        if (folder / "log.jsonl").exists() and len(log_of(folder)) >= step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was not reached")


def test_a_killed_rank_ends_the_others_and_a_resume_is_bit_equal(tmp_path):
    flags = ("--steps", 40, "--save-every", 10, *FOUR)
    finished(start(4, "--out", tmp_path / "whole", *flags))
    process = start(4, "--out", tmp_path / "run", *flags)
    wait_for(tmp_path / "run", 14)
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    began = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert time.perf_counter() - began < 60 and process.returncode != 0
    assert "another process has ended" in err
    finished(start(4, "--out", tmp_path / "run", "--resume", *flags))
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def test_torchrun_restarts_and_the_run_goes_on(tmp_path):
    process = start(2, "--steps", 60, "--save-every", 5, "--out", tmp_path, "--ep", 2, restarts=1)
    wait_for(tmp_path, 7)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = finished(process)
    assert "resumed after step" in err
    assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, 61))


def test_a_signal_to_torchrun_saves_and_stops_all(tmp_path):
    process = start(2, "--steps", 4000, "--out", tmp_path, "--ep", 2)
    wait_for(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = log_of(tmp_path)[-1]["step"]
    assert (tmp_path / f"state-{last:09}").is_dir()


@pytest.mark.parametrize("flags, words", [
    (("--ep", 3), "ep x pp: 3 x 1, expected a divisor of the 2 ranks"),
    (("--pp", 2, "--schedule", "zbv"), "layers: 3, expected at least 4"),
    (("--schedule", "zbv"), "--schedule: zbv without stages"),
])
def test_contradictions_are_one_line(flags, words, tmp_path):
    _, err = finished(start(2, "--steps", 2, "--out", tmp_path / "x", *flags), code=1)
    assert err.count(words) == 1 and not (tmp_path / "x").exists()


def test_by_the_clock_of_the_first(tmp_path):
    out, _ = finished(start(2, "--seconds", 3, "--out", tmp_path, "--ep", 2))
    assert json.loads(out)["steps"] == log_of(tmp_path)[-1]["step"] > 3
    assert 3 <= log_of(tmp_path)[-1]["seconds"] < 10

# SPDX-License-Identifier: MIT
"""A run survives what may happen to it: kills, a damaged file, a torn log, a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_and_resume import SAVE_EVERY, live
from refusals import refused

from dsv2_ref.training.run_folder import RunFolder

KILLS = int(os.environ.get("DSV2_KILLS", "5"))          # `make kill`: 200
EXACT = ("step", "tokens", "language", "expert", "device", "communication", "gradient_norm", "lr")


def exact(entries):
    return [[entry[key] for key in EXACT] for entry in entries]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_kills_lose_no_more_than_the_steps_since_the_last_state(tmp_path):
    script = Path(__file__).parent / "kill_and_resume.py"
    seed = int.from_bytes(os.urandom(3))
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "killed"), str(KILLS),
                           str(seed)], capture_output=True, text=True, check=False,
                          timeout=120 + 10 * KILLS, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    assert done.stderr == ""                             # no state was ever damaged
    told = json.loads(done.stdout)
    assert sum(life["killed"] for life in told["lives"]) == KILLS, f"seed {seed}: ended too early"
    for life in told["lives"]:
        assert 0 <= life["after"]["logged"] - life["after"]["saved"] <= SAVE_EVERY, (seed, life)
        assert life["after"]["saved"] >= life["before"]["saved"], (seed, life)
    whole = live(tmp_path / "whole", told["steps"])
    assert exact(read_log(tmp_path / "killed" / "run")) == exact(whole), f"seed {seed}"
    final = [RunFolder(f).states[0].name
             for f in (tmp_path / "killed" / "run", tmp_path / "whole")]
    assert final[0] == final[1]
    files = {p.name for p in (tmp_path / "killed" / "run").iterdir()}
    assert len(files) == 3 and "log.jsonl" in files      # two states, nothing half-written


def damage(path, where=-20):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [
    damage, lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(b"\0" * 5000),
], ids=["one bit", "cut off", "empty", "zeros"])
def test_a_damaged_state_is_told_and_the_one_before_is_used(tmp_path, spoil):
    whole = live(tmp_path / "whole", 8)
    live(tmp_path / "run", 8)
    newest, before = RunFolder(tmp_path / "run").states
    spoil(newest)
    told = []
    path, _, state = RunFolder(tmp_path / "run").newest(told.append)
    assert path == before and state["steps"] == 6
    assert len(told) == 1 and newest.name in told[0] and "damaged" in told[0]
    live(tmp_path / "run", 8)
    assert exact(read_log(tmp_path / "run")) == exact(whole)
    for state in RunFolder(tmp_path / "run").states:
        damage(state)
    refused(lambda: RunFolder(tmp_path / "run").newest(told.append), "every saved state")
    refused(lambda: RunFolder(tmp_path / "none").newest(told.append), "none", "expected a saved")


def test_the_last_states_are_kept_in_order(tmp_path):
    run = RunFolder(tmp_path, keep=3)
    for step in (9, 10, 99, 100, 1000):
        run.save(step, lambda path: path.write_text("x"))
    assert [int(p.stem.split("-")[1]) for p in run.states] == [1000, 100, 99]


def test_a_torn_log_is_mended(tmp_path):
    whole = live(tmp_path, 8)
    RunFolder(tmp_path).states[0].unlink()               # as if killed before it was saved
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "language": 3.1')
    (tmp_path / ".state-000000009.safetensors.123.tmp").write_text("half")
    (tmp_path / ".tmp7VDIXW").write_text("half")         # what safetensors writes into first
    live(tmp_path, 8)
    assert exact(read_log(tmp_path)) == exact(whole)
    assert not list(tmp_path.glob(".*"))


FULL = """
import resource, sys
from pathlib import Path
from kill_and_resume import live
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    live(Path(sys.argv[1]), 8)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [200, 20_000], ids=["for the log", "for a state"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, room):
    """A limit on the size of a file stands for the disk: writing fails in the middle."""
    whole = live(tmp_path, 8)
    RunFolder(tmp_path).states[0].unlink()
    states = {p.name: p.read_bytes() for p in RunFolder(tmp_path).states}
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), str(room)], text=True,
                          cwd=Path(__file__).parent, capture_output=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "cannot be written" in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    assert {p.name: p.read_bytes() for p in RunFolder(tmp_path).states} == states
    live(tmp_path, 8)
    assert exact(read_log(tmp_path)) == exact(whole)

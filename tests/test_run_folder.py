# SPDX-License-Identifier: MIT
"""A run survives what may happen to it: kills, a damaged file, a torn log, a full disk; and so do
the files of others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import CONFIG, SAVE_EVERY, live
from refusals import refused
from small_run import trainer
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.files import lock, whole
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training import run_folder
from dsv2_ref.training.run_folder import RunFolder, load_state, save_state

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
        run.save(step, lambda path: save_state(path, {}, {}))
    assert [int(p.stem.split("-")[1]) for p in run.states] == [1000, 100, 99]
    RunFolder(tmp_path, keep=3).save(1001, lambda path: save_state(path, {}, {}))
    assert [int(p.stem.split("-")[1]) for p in run.states] == [1001, 1000, 100]


def test_a_torn_log_is_mended(tmp_path):
    whole = live(tmp_path, 8)
    RunFolder(tmp_path).states[0].unlink()               # as if killed before it was saved
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "language": 3.1')
    (tmp_path / ".state-000000009.safetensors.123.tmp").write_text("half")
    (tmp_path / ".state-000000009.safetensors.123.safetensors").mkdir()   # what it is made in
    (tmp_path / ".state-000000009.safetensors.123.safetensors" / ".tmp7VDIXW").write_text("half")
    others = {".tmp7VDIXW", ".state.tmp", ".state-of-mind.safetensors.1.tmp", ".log.jsonl.tmp"}
    for name in others:
        (tmp_path / name).write_text("of others")
    live(tmp_path, 8)
    assert exact(read_log(tmp_path)) == exact(whole)
    assert {p.name for p in tmp_path.glob(".*")} == others


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


# ---- training states

def _state() -> tuple[dict[str, Tensor], dict]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(3, 5, generator=g), "w.t": torch.randn(4, 2, generator=g).T,
        "half": torch.randn(7, generator=g).bfloat16(), "rng": g.get_state(),
        "step": torch.tensor(12),
    }
    return tensors, {"step": 12, "lr": 3e-4, "files": ["a", "ä"], "none": None}


def test_state_round_trip(tmp_path) -> None:
    tensors, state = _state()
    save_state(tmp_path / "new" / "state.safetensors", tensors, state)
    back, back_state = load_state(str(tmp_path / "new" / "state.safetensors"))
    assert back_state == state and set(back) == set(tensors)
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t), name
    assert os.listdir(tmp_path / "new") == ["state.safetensors"]


def test_state_of_tied_weights(tmp_path) -> None:
    """A state dict names the tied matrix twice; both names come back."""
    weights = DeepSeekV2(CONFIG.with_(tie_embeddings=True)).state_dict()
    save_state(tmp_path / "s", weights, {})
    back, _ = load_state(tmp_path / "s")
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def listing(path: Path) -> dict[str, bytes]:
    """Every file below `path`, hidden ones too, with its content."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("accident", [RuntimeError("disk"), KeyboardInterrupt()])
def test_interrupted_state_leaves_the_good_file(
    tmp_path, monkeypatch, accident: BaseException
) -> None:
    tensors, state = _state()
    file = tmp_path / "state.safetensors"
    save_state(file, tensors, state)
    before = listing(tmp_path)

    def failing_save(_, path, **__):
        Path(path).write_bytes(b"half a file")
        raise accident

    monkeypatch.setattr(run_folder, "save_file", failing_save)
    with pytest.raises(type(accident)):
        save_state(file, tensors, state | {"step": 13})
    assert listing(tmp_path) == before
    assert load_state(file)[1] == state


def test_state_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    tensors, state = _state()
    refused(lambda: save_state(tmp_path / "file" / "s", tensors, state),
            tmp_path / "file" / "s", "cannot be written")
    assert listing(tmp_path) == {"file": b"mine"}


def test_state_from_the_wrong_file(tmp_path) -> None:
    checkpoint.save(DeepSeekV2(CONFIG), saved := tmp_path / "model")
    refused(lambda: load_state(saved / "model.safetensors"),
            saved / "model.safetensors", "no training state")
    refused(lambda: load_state(saved / "config.json"), "config.json", "damaged")
    refused(lambda: load_state(tmp_path / "nowhere"), "nowhere", "no such file")
    refused(lambda: load_state(saved), saved, "expected a whole safetensors file")


def test_a_bit_of_any_tensor_is_missed(tmp_path):
    """Each tensor's first, middle and last byte, and every byte of the small ones."""
    tensors, state = _state()
    save_state(tmp_path / "s", tensors, state)
    good = (tmp_path / "s").read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, end = entry["data_offsets"]
        places = range(first, end) if end - first < 70 else (first, (first + end) // 2, end - 1)
        for place in places:
            bad = bytearray(good)
            bad[start + place] ^= 1 << place % 8
            (tmp_path / "s").write_bytes(bad)
            refused(lambda: load_state(tmp_path / "s"), "damaged", "checksum")
    (tmp_path / "s").write_bytes(good)
    assert load_state(tmp_path / "s")[1] == state


def test_a_state_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(whole, "flush", lambda path: calls.append(("flush", path.suffix)))
    monkeypatch.setattr(os, "replace", lambda a, b: (
        calls.append(("rename", Path(b).suffix)), replace(a, b)))
    trainer().save(tmp_path / "a.state")
    assert calls == [("rename", ".tmp"), ("flush", ".tmp"), ("rename", ".state"),
                     ("flush", tmp_path.suffix)]


def test_a_line_of_the_log_is_there_at_once(tmp_path):
    run = RunFolder(tmp_path).open_log(0)
    for step in (1, 2):
        run.log({"step": step, "gradient_norm": float("inf"), "load": [[float("nan"), 1.0]]})
        last = (tmp_path / "log.jsonl").read_text().splitlines()[step - 1]
        assert last == f'{{"step": {step}, "gradient_norm": null, "load": [[null, 1.0]]}}'
    run.close()


# ---- the files of others, and other processes

def test_nothing_is_made_by_looking(tmp_path):
    assert RunFolder(tmp_path / "x").states == [] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["state-of-the-art.safetensors", "state-1.safetensors",
                                  "state-000000001.safetensors", "estate-000000001.safetensors"])
def test_a_file_that_is_no_state_is_not_pruned(tmp_path, name):
    (tmp_path / name).write_text("weights of somebody")
    run = RunFolder(tmp_path).open_log(0)
    for step in (2, 3, 4):
        run.save(step, lambda path: save_state(path, {}, {}))
    run.forget_from(1)
    run.close()
    assert (tmp_path / name).read_text() == "weights of somebody"


HOLD = """
import sys
from dsv2_ref.training.run_folder import RunFolder
with RunFolder(sys.argv[1]).held() as run:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_dies_with_its_process_and_refuses_first(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        scratch = tmp_path / ".state-000000009.safetensors.123.tmp"
        scratch.write_text("of the live run")
        refused(lambda: live(tmp_path, 4), tmp_path, "another process trains into it")
        assert listing(tmp_path) == {scratch.name: b"of the live run"}
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert len(live(tmp_path, 4)) == 4 and not scratch.exists()


def test_one_holder_at_a_time_in_a_process_too(tmp_path):
    run = RunFolder(tmp_path)
    with run.held(), run.held():                             # its own is no obstacle
        refused(lambda: RunFolder(tmp_path).held().__enter__(), "another process")
    with RunFolder(tmp_path).held():
        pass


def test_where_folders_cannot_be_locked_training_works(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    assert len(live(tmp_path, 2)) == 2


@pytest.mark.parametrize(("name", "text"), [
    ("config.json", '{"mine": 1}'), ("config.json", ""), ("tokenizer.json", "{}"),
    ("log.jsonl", "hello\n"), ("log.jsonl", '{"step": 1, "reward": 2}\n'),
])
def test_a_new_run_takes_no_place_of_others(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    refused(RunFolder(tmp_path).check_new, tmp_path / name, "not written by")
    assert listing(tmp_path) == {name: text.encode()}


def test_what_a_run_wrote_is_known_again(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = RunFolder(tmp_path).open_log(0)
    run.check_new()
    run.log({"step": 1, "gradient_norm": 1.0})
    run.close()
    run.check_new()
    for torn in ('{"step": 2, "gra', '{"st', "\0\0\0"):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "gradient_norm": 1.0}\n' + torn)
        run.check_new()
    run.save(1, lambda path: save_state(path, {}, {}))
    refused(run.check_new, "state-000000001", "expected --resume")

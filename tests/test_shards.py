# SPDX-License-Identifier: MIT
"""A state that is a folder, written and read by one process; test_parallel_mesh.py has four."""

from contextlib import closing

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from refusals import refused
from small_run import trainer

from dsv2_ref.training.run_folder import RunFolder, load_state, save_state, state_of
from dsv2_ref.training.shards import files_of_sharded, is_sharded, save_sharded


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(path, tensors, state):
    save_sharded(path, tensors, state, lambda work: work())


def some_state():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, generator=g)
    return {"model.a.weight": W, "model.b.weight": W, "model.c": torch.randn(4, 2, generator=g).T,
            "moment.a.weight.m": torch.randint(-127, 128, (2, 256), dtype=torch.int8, generator=g),
            "moment.a.weight.step": torch.tensor(12), "half": torch.ones(7).bfloat16()}, {
                "steps": 12, "lr": 3e-4, "none": None}


def test_what_was_written_comes_back(tmp_path):
    tensors, state = some_state()
    path = tmp_path / "new" / "state-000000012"
    save(path, tensors, state)
    back, its = load_state(path)
    assert its == state and back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t), name
    assert {p.name for p in path.iterdir()} == files_of_sharded(path) == {
        ".metadata", "__0_0.distcp", "state.json"}
    assert state_of(path) == ({}, state) and is_sharded(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    save(path, tensors, state | {"steps": 13})                    # in the place of the old one
    assert load_state(path)[1]["steps"] == 13 and [p.name for p in path.parent.iterdir()] == [
        path.name]


def test_a_run_goes_on_from_it(tmp_path):
    first = trainer()
    first.world.save = save
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state-000000003")
    second = trainer(seed=1)
    second.load(tmp_path / "state-000000003")
    for _ in range(3):
        a, b = first.step(), second.step()
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"}


def test_damage_is_told_and_the_state_before_it_used(tmp_path):
    tensors, state = some_state()
    for step in (1, 2):
        save(tmp_path / f"state-{step:09}", tensors, state | {"steps": step})
    newest = tmp_path / "state-000000002"
    for name in sorted(files_of_sharded(newest)):
        good = (newest / name).read_bytes()
        for bad in (good[:-30] + bytes([good[-30] ^ 1]) + good[-29:], good[:-9], b""):
            (newest / name).write_bytes(bad)
            if name != "state.json" or bad != good[:-30] + bytes([good[-30] ^ 1]) + good[-29:]:
                told = []
                path, _, found = RunFolder(tmp_path).newest(told.append)
                assert (path.name, found["steps"]) == ("state-000000001", 1), (name, len(bad))
                assert len(told) == 1 and str(newest) in told[0] and "going back" in told[0]
        (newest / name).write_bytes(good)
    (newest / "__0_0.distcp").unlink()
    refused(lambda: load_state(newest), newest / "__0_0.distcp", "damaged", "No such file")
    refused(lambda: state_of(newest), newest / "__0_0.distcp", "damaged")


@pytest.mark.parametrize("accident", [RuntimeError("disk"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch, accident):
    tensors, state = some_state()
    path = tmp_path / "state-000000012"
    save(path, tensors, state)

    def failing(*_, **__):
        raise accident

    monkeypatch.setattr(dcp, "save", failing)
    with pytest.raises(type(accident)):
        save(path, tensors, state | {"steps": 13})
    assert load_state(path)[1] == state and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    tensors, state = some_state()
    (tmp_path / "file").write_text("mine")
    refused(lambda: save(tmp_path / "file" / "s", tensors, state), "cannot be written")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    refused(lambda: save(tmp_path / "s", tensors, state), tmp_path / "s", "cannot be written",
            "No space left")
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_file_on_another_nodes_disk_is_one_line(tmp_path, monkeypatch):
    """All files were written, but the first process does not see the one of another."""
    tensors, state = some_state()

    def gather(sums, own):
        sums[:] = [own | {"__1_0.distcp": "00000000"}]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    refused(lambda: save(tmp_path / "s", tensors, state), tmp_path / "s", "__1_0.distcp",
            "a file system that all nodes see")
    assert not any(tmp_path.iterdir())


def test_the_last_two_are_kept_whatever_they_are(tmp_path):
    tensors, state = some_state()
    with closing(RunFolder(tmp_path).open_log(0)) as run:
        for step in (1, 2, 3):
            run.save(step, lambda path: save(path, tensors, state), suffix="")
        assert [p.name for p in run.states] == ["state-000000003", "state-000000002"]
        run.save(4, lambda path: save_state(path, tensors, state))
        assert [p.name for p in run.states] == ["state-000000004.safetensors", "state-000000003"]
        run.save(5, lambda path: save(path, tensors, state), suffix="", forget=False)
        assert len(run.states) == 3                            # another process forgets
        run.forget_from(4)
    assert {p.name for p in tmp_path.iterdir()} == {"state-000000003", "log.jsonl"}


def test_what_others_put_into_it_is_not_deleted(tmp_path):
    tensors, state = some_state()
    (tmp_path / "state-000000001").mkdir()
    (tmp_path / "state-000000001" / "thesis.txt").write_text("mine")
    with closing(RunFolder(tmp_path).open_log(0)) as run:
        for step in (2, 3, 4, 5):
            run.save(step, lambda path: save(path, tensors, state), suffix="")
            if step == 2:
                (tmp_path / "state-000000002" / "notes.txt").write_text("mine")
    assert {p.name for p in tmp_path.glob("state-*")} == {
        "state-000000001", "state-000000002", "state-000000004", "state-000000005"}
    assert (tmp_path / "state-000000001" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "state-000000002" / "notes.txt").read_text() == "mine"


def test_what_a_killed_run_leaves_is_removed(tmp_path):
    for name in (".state-000000009.0a1b2c3d.tmp", ".state-000000007.0a1b2c3d.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    others = {".state-000000009.tmp", ".state-of-mind.0a1b2c3d.tmp"}
    for name in others:
        (tmp_path / name).mkdir()
    RunFolder(tmp_path).open_log(0).close()
    assert {p.name for p in tmp_path.glob(".*")} == others

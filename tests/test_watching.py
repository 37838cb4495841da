# SPDX-License-Identifier: MIT
"""Watching: what writers are told, with stand-ins for the packages, and that none ends a run."""

import json
import sys
from types import SimpleNamespace

import pytest
from refusals import refused

from dsv2_ref.__main__ import main
from dsv2_ref.training.watching import Watch, fair_shares, scalars

ENTRY = {"step": 7, "tokens": 700, "seconds": 3.5, "language": 2.0, "expert": 0.1, "device": 0.2,
         "communication": 0.3, "gradient_norm": 1.5, "lr": 1e-3, "batch": 4}
LOADED = ENTRY | {"expert_load": [[4, 1, 1, 2], [1, 1, 1, 1]], "gate_entropy": [1.0, 0.5],
                  "dropped": [0.1, 0.3], "bits_per_byte": 1.25, "skipped": True}


class TensorBoard:
    """Stands for torch.utils.tensorboard."""

    def __init__(self):
        self.written, self.opened, self.closed = [], None, 0

    def SummaryWriter(self, folder, purge_step):
        self.opened = folder, purge_step
        return self

    def add_scalar(self, name, value, step):
        assert isinstance(value, float | int)
        self.written.append((name, value, step))

    def close(self):
        self.closed += 1


class Trackio:
    """Stands for trackio, which prints what it does."""

    def __init__(self):
        self.written, self.opened, self.finished = [], None, 0

    def init(self, **options):
        print("* Created new run")
        self.opened = options
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        print("* logged")
        self.written.append((values, step))

    def finish(self):
        print("* Run finished")
        self.finished += 1


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", TensorBoard())
    return sys.modules["torch.utils.tensorboard"]


@pytest.fixture
def trackio(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", Trackio())
    return sys.modules["trackio"]


def test_scalars_of_an_entry():
    assert scalars(ENTRY) == {
        "loss/language": 2.0, "loss/expert": 0.1, "loss/device": 0.2, "loss/communication": 0.3,
        "gradient_norm": 1.5, "lr": 1e-3, "batch": 4, "skipped": 0.0, "tokens_per_second": 200.0}
    more = scalars(LOADED, {"tokens": 600, "seconds": 3.25})
    assert more["tokens_per_second"] == 400.0 and more["skipped"] == 1.0
    assert more["bits_per_byte"] == 1.25
    assert {k: v for k, v in more.items() if k.startswith("load/")} == pytest.approx(
        {"load/fullest": 2.0, "load/emptiest": 0.5, "load/gate_entropy": 0.75,
         "load/dropped": 0.2})
    assert "tokens_per_second" not in scalars(ENTRY, ENTRY)          # no time went by
    pretraining = ("language", "expert", "device", "communication")
    needles = {k: v for k, v in ENTRY.items() if k not in pretraining}
    found = scalars(needles | {"answer": 0.5, "text": 0.25, "balance": 0.1})
    assert {k: v for k, v in found.items() if k.startswith("loss/")} == {
        "loss/answer": 0.5, "loss/text": 0.25, "loss/balance": 0.1}


def test_fair_shares_are_of_a_layer():
    assert fair_shares([[0, 4, 4, 8], [10, 10, 10, 10]]).tolist() == [[0, 1, 1, 2], [1, 1, 1, 1]]
    assert fair_shares([3, 1]).tolist() == [1.5, 0.5]
    assert fair_shares([[0, 0], [1, 3]]).tolist() == [[0, 0], [0.5, 1.5]]   # nothing was sent


def test_tensorboard_gets_every_scalar_at_its_step(tensorboard, tmp_path):
    watch = Watch("tensorboard", tmp_path, 6, print)
    assert tensorboard.opened == (str(tmp_path / "tensorboard"), 7)
    watch(ENTRY)
    watch(LOADED | {"step": 8, "tokens": 900, "seconds": 4.0})
    watch(ENTRY | {"step": 9, "tokens": 950, "seconds": 4.5})
    watch.close()
    assert {(name, step) for name, _, step in tensorboard.written} == {
        *((name, step) for name in scalars(ENTRY) for step in (7, 9)),
        *((name, 8) for name in scalars(LOADED))}
    speeds = [v for name, v, _ in tensorboard.written if name == "tokens_per_second"]
    assert speeds == [200.0, 400.0, 100.0]           # since the entry before, not since the start
    assert tensorboard.closed == 1


def test_trackio_goes_on_with_its_run_and_keeps_stdout_clean(trackio, tmp_path, capsys):
    for steps, resume in ((0, "never"), (5, "allow")):
        watch = Watch("trackio", tmp_path / "mine", steps, print)
        assert trackio.opened == {"project": "dsv2_ref", "name": "mine", "resume": resume,
                                  "embed": False}
        watch(ENTRY)
        watch.close()
    assert trackio.written == [(scalars(ENTRY), 7)] * 2 and trackio.finished == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("* logged") == 2


def test_a_writer_that_fails_is_told_once_and_left(tensorboard, tmp_path):
    def fail(*_):
        raise OSError("disk\nfull")

    told = []
    watch = Watch("tensorboard", tmp_path, 0, told.append)
    tensorboard.add_scalar = fail
    for _ in range(3):
        watch(ENTRY)
    watch.close()
    assert told == ["watching with tensorboard ends (disk full); the run goes on"]


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"),
                                              ("trackio", "trackio")])
def test_a_missing_package_is_one_line_before_anything_is_read(kind, module, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    code = main(["train", "--watch", kind, "--corpus", "/no/such/place", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"needs {kind}: pip install 'dsv2-ref[watch]'" in err


def test_unknown_writers_are_refused(tmp_path):
    refused(lambda: Watch("wandb", tmp_path, 0, print), "watch: 'wandb'", "tensorboard, trackio")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"def f{i}_{j}(x):\n    return x + {j}\n\n\n" for j in range(40)]
        (folder / f"m{i}.py").write_text("".join(lines))
    return str(folder)


def test_the_command_writes_every_step_and_a_resumed_run_goes_on(texts, tensorboard, trackio,
                                                                 tmp_path, capsys):
    def train(*more, kind="tensorboard"):
        return main(["train", "--preset", "tiny", "--corpus", texts, "--sequence", "32", "--batch",
                     "2", "--save-every", "2", "--quiet", "--out", str(tmp_path / kind), "--watch",
                     kind, *more])

    assert train("--steps", "3") == 0
    assert tensorboard.opened == (str(tmp_path / "tensorboard" / "tensorboard"), 1)
    assert train("--steps", "5", "--resume") == 0
    assert tensorboard.opened[1] == 4 and tensorboard.closed == 2
    losses = [(v, step) for name, v, step in tensorboard.written if name == "loss/language"]
    log = (tmp_path / "tensorboard" / "log.jsonl").read_text().splitlines()
    assert losses == [(e["language"], e["step"]) for e in map(json.loads, log)]
    assert [step for name, _, step in tensorboard.written if name == "load/fullest"] == [1]
    capsys.readouterr()
    assert train("--steps", "2", kind="trackio") == 0
    assert [step for _, step in trackio.written] == [1, 2] and trackio.finished == 1
    json.loads(capsys.readouterr().out)                              # nothing but the result


def test_an_interrupted_run_closes_its_writer(texts, tensorboard, tmp_path):
    tensorboard.add_scalar = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    assert main(["train", "--preset", "tiny", "--corpus", texts, "--sequence", "32", "--steps", "2",
                 "--quiet", "--out", str(tmp_path), "--watch", "tensorboard"]) == 130
    assert tensorboard.closed == 1

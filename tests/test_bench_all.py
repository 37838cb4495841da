# SPDX-License-Identifier: MIT
"""`bench all` loses no row: to an exception, to a process that dies, to a kill, to the time."""

import functools
import json
import os
import signal
import types

import pytest
import torch

from dsv2_ref.bench import all as everything
from dsv2_ref.bench.harness import cases
from dsv2_ref.commands import bench as command

CPU = torch.device("cpu")
FAKE = '''
import os, pathlib, signal, time
from typing import NamedTuple

class Case(NamedTuple):
    name: str
    needs: int = 0

CASES = QUICK = [Case("first"), Case("dies"), Case("kills"), Case("large", 2**60), Case("last")]

def rows(case, device):
    yield {"case": case.name, "pid": os.getpid()}
    sick = not pathlib.Path("well").exists()
    if case.name == "dies" and sick:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.name == "kills" and sick:
        while '"kills",' not in next(pathlib.Path("results").glob("*.json")).read_text():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    yield {"case": case.name, "pid": os.getpid(), "ms": {}}
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """One bench of five cases, and a file as on a GPU."""
    (tmp_path / "fake_bench.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(everything, "MODULES", "")
    monkeypatch.setattr(everything, "ORDER", ("fake_bench l", "not_there", "fake_bench"))
    monkeypatch.setattr(everything, "device_for", lambda name, quick: CPU)
    real = everything.in_a_process
    monkeypatch.setattr(everything, "in_a_process",
                        lambda module, names, quick, *rest: real(module, names, True, *rest))
    return tmp_path / "results"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_keeps_its_rows_and_is_gone_on_with(fake, tmp_path, capfd):
    child = os.fork()
    if child == 0:
        try:
            everything.run(folder=fake)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (file,) = fake.iterdir()
    found = json.loads(file.read_text())["benches"]["fake_bench"]
    assert [row["case"] for row in found["rows"]] == ["last", "first", "dies", "kills"]
    assert found["cases"] == {
        "large": found["cases"]["large"], "last": "measured", "first": "measured",
        "dies": "failed: its process ended (SIGSEGV)", "kills": "left out: not begun"}
    assert found["cases"]["large"].startswith("too large: needs 1152921504.6 GB, ")
    before = {row["case"]: row["pid"] for row in found["rows"]}
    assert before["first"] == before["dies"] != before["kills"]

    (tmp_path / "well").touch()
    result = everything.run(folder=fake)
    assert json.loads(file.read_text()) == result and list(fake.iterdir()) == [file]
    found = result["benches"]["fake_bench"]
    after = {row["case"]: row["pid"] for row in found["rows"]}
    assert after["first"] == before["first"] and after["dies"] == after["kills"]
    assert after["dies"] not in before.values() and len(after) == len(found["rows"]) == 4
    assert all("ms" in row for row in found["rows"])
    assert list(result["without_numbers"]) == ["fake_bench: large"] and result["device"] == "cpu"
    out, err = capfd.readouterr()
    assert out == "" and f"going on with {file}" in err


def scripted(monkeypatch, given, seconds=1.0):
    """`in_a_process` where the other one says `given` in turn, a second each; and what it is sent.

    None stands for nothing within the wait, an exception for the end of the process.
    """
    now, sent, said = [0.0], [], iter(given)

    class Pipe:
        def poll(self, wait):
            self.next = next(said)
            now[0] += wait if self.next is None else seconds
            return self.next is not None

        def recv(self):
            if isinstance(self.next, Exception):
                raise self.next
            return self.next

        send = sent.append

        def close(self):
            pass

    def nothing(*args):
        pass

    process = types.SimpleNamespace(start=nothing, join=nothing, kill=nothing, exitcode=-9)
    monkeypatch.setattr(cases, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(everything, "time", cases.time)
    monkeypatch.setattr(cases, "SPAWN", types.SimpleNamespace(
        Pipe=lambda: (Pipe(), Pipe()), Process=lambda **how: process))
    return sent, now


@pytest.mark.parametrize(("given", "left", "last"), [
    ([{}, {"case": "a"}, "measured", "measured", "measured"], [], "measured"),
    ([{}, "too large: x", "measured", "measured"], [], "measured"),
    ([{}, {"case": "a"}, "failed: x"], ["b", "c"], "failed: x"),
    ([EOFError()], ["b", "c"], "failed: its process ended (SIGKILL)"),
    ([{}, ConnectionResetError()], ["b", "c"], "failed: its process ended (SIGKILL)"),
    ([{}, "measured", None], ["c"], "failed: stopped, no row in 240 s"),
])
def test_a_process_ends_with_the_first_case_that_fails(given, left, last, monkeypatch):
    scripted(monkeypatch, given)
    heard = []
    rest = cases.in_a_process("m", ["a", "b", "c"], False, lambda *x: heard.append(x), 1000.0)
    assert list(rest) == left and heard[-1][1] == last


def test_no_case_begins_after_the_minutes_and_none_goes_on_for_long(monkeypatch):
    """A case a second: three begin in 2.5 s. One that hangs has a minute more."""
    sent, now = scripted(monkeypatch, ["measured"] * 9)
    told = []
    rest = cases.in_a_process("m", list("abcde"), False, lambda *x: told.append(x), 2.5)
    assert sent == list("abc") and list(rest) == list("de")
    sent, now = scripted(monkeypatch, [None])
    rest = cases.in_a_process("m", list("ab"), False, lambda *x: told.append(x), 2.5)
    assert told[-1] == ("a", "left out: stopped, the time was spent") and list(rest) == ["b"]
    assert now[0] == pytest.approx(62.5)


def test_the_budget_is_spent_in_order_of_worth(fake, monkeypatch, capsys):
    monkeypatch.setattr(everything, "in_a_process", cases.in_a_process)
    sent, _ = scripted(monkeypatch, [{"device": "x", "copy_tb_per_s": 1.0, "matmul_tflops": 2.0},
                                     {"case": "large"}, "measured", "measured", "measured"], 15.0)
    result = everything.run(minutes=1.0, folder=fake)
    assert sent == ["large", "last"]                  # at 60 s no other bench begins either
    why = "left out: not begun"
    assert result["without_numbers"] == dict.fromkeys(
        [f"fake_bench: {name}" for name in ("first", "dies", "kills")], why)
    assert result["benches"]["fake_bench"]["rates"] == {"copy_tb_per_s": 1.0, "matmul_tflops": 2.0}
    assert f"without numbers: fake_bench: dies: {why}" in capsys.readouterr().err


def test_a_record_is_never_overwritten(fake, monkeypatch):
    monkeypatch.setattr(everything, "in_a_process", cases.in_a_process)
    first = [{"device": "x", "copy_tb_per_s": 1.0, "matmul_tflops": 2.0}, *["measured"] * 5]
    for source, n in (("one", 1), ("one", 2), ("two", 3)):     # whole; whole again; other source
        monkeypatch.setattr(everything, "_source", lambda source=source: source)
        scripted(monkeypatch, [*first[:3], first[0], *first[3:]])
        everything.run(folder=fake)
        names = sorted(path.name for path in fake.iterdir())
        assert len(names) == n and names[-1].endswith(("b.json", "c.json") if n > 1 else ".json")
    (fake / names[-1]).write_text("[]")                        # someone else's
    for source, n in (("two", 4), ("three", 5), ("three", 5)):
        monkeypatch.setattr(everything, "_source", lambda source=source: source)
        scripted(monkeypatch, [*first[:2], "failed: x", first[0], *first[3:]])
        everything.run(folder=fake)
        assert len(list(fake.iterdir())) == n            # what is not whole is gone on with
    assert (fake / names[-1]).read_text() == "[]"


def test_a_folder_that_cannot_be_written_is_told_before_the_work(fake):
    fake.write_text("a file")
    with pytest.raises(ValueError, match="results.*cannot be written"):
        everything.run(folder=fake)


def test_order_names_every_case_of_every_bench():
    pytest.importorskip("triton")
    benches: dict = {}
    plan = list(everything._plan(False, benches))
    assert [bench for bench, _ in plan] == [part.partition(" ")[0] for part in everything.ORDER]
    assert [bench for bench, _ in plan][:7] == ["correct", "mla_decode", "attention", "experts",
                                                "six_bit_decode", "optimizer", "train"]
    assert plan[1][1][0] == "16 heads, 128x4096" and plan[2][1][0] == "16 heads, 2x8192"
    for bench in benches:
        module = everything.importlib.import_module(everything.MODULES + bench)
        names = [case.name for case in cases.cases_of(module, False)]
        planned = [name for other, some in plan for name in some if other == bench]
        assert sorted(planned) == sorted(names) and len(set(names)) == len(names)
        for case in cases.cases_of(module, False):
            assert case.needs < 79e9, f"{bench}, {case.name}: not on a card of 80 GB"


# ---- one bench, in this process

def bench_of(rows, names="abc"):
    some = [cases.Whole(name, 2**60 if name == "L" else 0) for name in names]
    some = [types.SimpleNamespace(**case._asdict()) for case in some]
    return types.SimpleNamespace(CASES=some, QUICK=some, rows=rows)


def test_a_case_that_raises_costs_no_other(monkeypatch, capsys):
    def rows(case, device):
        yield {"case": f"{case.name} 1"}
        if case.name == "b":
            raise ZeroDivisionError("on\npurpose")
        if case.name == "c":
            yield {"case": object()}
        yield {"case": f"{case.name} 2"}
        yield {"case": f"{case.name} 1", "again": True}

    monkeypatch.setitem(cases.sys.modules, "dsv2_ref.bench.fake", bench_of(rows, "abLcd"))
    monkeypatch.setattr(cases, "memory", lambda device: (10**9, 10**9))
    record = cases.measured("fake", quick=True)
    assert record["rows"] == [
        {"case": "a 1", "again": True}, {"case": "a 2"}, {"case": "b 1"}, {"case": "c 1"},
        {"case": "d 1", "again": True}, {"case": "d 2"}]
    why = record["cases"]
    assert why["a"] == why["d"] == "measured" and why["b"].endswith("ZeroDivisionError: on purpose")
    assert why["c"].startswith("failed: TypeError") and why["L"].startswith("too large")
    monkeypatch.setattr(cases.sys.modules["dsv2_ref.bench.fake"], "run",
                        functools.partial(cases.measured, "fake"), raising=False)
    text = command.bench_command("fake", True, None, None, True)
    assert type(text).__name__ == "Failed" and json.loads(text)["cases"] == why
    assert capsys.readouterr().out == ""


def test_a_bench_that_has_run_alone_is_one_case(monkeypatch):
    bench = types.SimpleNamespace(run=lambda quick: {"rows": [{"case": f"{quick}"}]})
    (case,) = cases.cases_of(bench, True)
    assert [*cases.attempt(bench, case, CPU, True)] == [{"case": "True"}, "measured"]

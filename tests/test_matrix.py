# SPDX-License-Identifier: MIT
"""`make matrix`: which settings a processor gets, and that one failure among them is told."""

from types import SimpleNamespace

import matrix
import pytest


@pytest.mark.parametrize(("flags", "kinds"), [
    (set(), ["default"]),
    ({"avx2"}, ["default", "SSE"]),
    ({"avx2", "avx512f"}, ["default", "AVX2", "SSE"]),
    ({"avx2", "avx512f", "amx_tile"}, ["default", "AVX-512 without AMX", "AVX2", "SSE"]),
])
def test_every_kind_below_the_processors_own_on_1_and_2_threads(flags, kinds):
    found = matrix.settings(flags)
    assert list(found) == [f"{kind}, {n}" for kind in kinds for n in ("1 thread", "2 threads")]
    assert [e["DSV2_THREADS"] for e in found.values()] == ["1", "2"] * len(kinds)
    assert len({tuple(e.items()) for e in found.values()}) == len(found)


def test_one_failure_is_named_and_fails_the_whole(monkeypatch, capfd):
    codes = iter([0, 0, 0, 1, 0, 0, 0, 0])
    seen = []

    def run(command, env, **_):
        seen.append((env["OMP_NUM_THREADS"], env.get("ATEN_CPU_CAPABILITY")))
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(matrix, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(matrix, "processor_flags", lambda: {"avx2"})
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)       # these tests run under it too
    assert matrix.main([]) == 1
    said = capfd.readouterr().out
    assert seen == [(n, kind) for kind in (None, "default") for n in "1122"]
    assert said.count("FAILED") == 1 and "FAILED  default, 2 threads: notebooks" in said
    assert said.endswith("7 of 8 passed\n") and "==== SSE, 1 thread: unit tests\n" in said
    codes = iter([0] * 4)
    assert matrix.main(["-k", "x"]) == 0 and "4 of 4 passed" in capfd.readouterr().out

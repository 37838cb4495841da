# SPDX-License-Identifier: MIT
"""The benchmarks of decoding run, check what they time, and count right. Never how fast."""

import json
import os
import re

import pytest
import torch
from refusals import refused

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.bench import mla_decode, six_bit_decode
from dsv2_ref.bench.harness.gpu import check
from dsv2_ref.kernels import latent_decode
from dsv2_ref.kernels import six_bit_decode as six_bit_kernel

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
BENCHES = {"mla_decode": mla_decode, "six_bit_decode": six_bit_decode}
both = pytest.mark.parametrize("name", BENCHES)


@pytest.fixture(scope="module")
def records() -> dict:
    return {name: bench.run(quick=True) for name, bench in BENCHES.items()}


@both
def test_every_form_ran_and_every_tile_was_tried(name, records):
    record, bench = records[name], BENCHES[name]
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == name and record["quick"] is True
    assert [row["case"] for row in record["rows"]] == [case.name for case in bench.QUICK]
    for row in record["rows"]:
        forms = {"ours", "copy", "bf16"} if name == "six_bit_decode" else {"ours", "copy", "bmm"}
        assert row["ms"].keys() - {"flashinfer"} == forms
        assert all(isinstance(row["ms"][form], float) for form in forms)
        tiles = bench.TILES[16 if row["heads"] <= 16 else 128]
        expected = {f"{kind}{mla_decode.label(tile)}" for tile in tiles for kind in ("", "paged ")}
        assert row["candidates"].keys() == expected
        assert all(isinstance(ms, float) for ms in row["candidates"].values()), row["candidates"]
        assert row["candidates"][row["best_tile"]["paged"]] == min(
            ms for tile, ms in row["candidates"].items() if tile.startswith("paged"))
        assert row["speed_of"]["copy"] == row["ms"]["copy"] / row["ms"]["ours"]
        assert 0 < row["error"] < 1e-6


def test_work_is_counted_right(records):
    plain, packed = records["mla_decode"]["rows"][0], records["six_bit_decode"]["rows"][0]
    assert plain["flops"] == 2 * (2 * 128) * 3 * (64 + 64 + 16)
    own = 2 * 3 * (64 + 64 + 16) * 4                         # q_c, o, q_r
    assert plain["bytes"] == 2 * 128 * (64 + 16) * 4 + own
    assert packed["bytes"] == 2 * 64 * (6 * (64 + 16) // 8 + 4) + own
    x = mla_decode.inputs(mla_decode.QUICK[0], torch.device("cpu"), 0)
    assert 2 * mla_decode.copy_of(x.rows)(x).nbytes == x.rows.nbytes     # read and written


def test_the_full_run_has_the_sizes_it_documents():
    cases = {(c.n_h, c.B, c.S) for c in mla_decode.CASES}
    assert cases == {(n_h, B, S) for n_h in (16, 128)
                     for B, S in ((128, 4096), (128, 8192), (1, 131072), (1, 8192))}
    for bench in BENCHES.values():
        assert all((c.d_c, c.d_r, c.dtype) == (512, 64, torch.bfloat16) for c in bench.CASES)
        assert len({(c.n_h, c.B, c.S) for c in bench.CASES}) == len(bench.CASES)
    tiles = latent_decode.tile_for, six_bit_kernel.tile_for
    for bench, tile_for in zip(BENCHES.values(), tiles, strict=True):
        for n_h in (16, 128):
            assert tile_for(n_h, torch.bfloat16, "sm_90") == bench.TILES[n_h][0]


def test_the_comparator_computes_the_same():
    x = mla_decode.inputs(mla_decode.QUICK[1], torch.device("cpu"), 3)
    expected = latent_decode.decode_latent(x.q_c, x.q_r, x.rows[..., :64], x.rows[..., 64:],
                                           x.positions, mla_decode.SCALE)
    check(mla_decode.bmm(x), expected, "bmm", 1e-6)


@both
def test_a_wrong_kernel_is_not_timed(name, monkeypatch):
    function = {"mla_decode": "decode_latent", "six_bit_decode": "decode_six_bit"}[name]
    real = getattr(BENCHES[name], function)
    monkeypatch.setattr(BENCHES[name], function, lambda *a, **k: 1.02 * real(*a, **k))
    record = BENCHES[name].run(quick=True)
    assert record["rows"] == [] and record["cases"].keys() == {c.name for c in BENCHES[name].QUICK}
    for why in record["cases"].values():
        assert re.match(f"failed: RuntimeError: {function}, .*: relative RMS error 2.0e-02", why)


def test_a_wrong_tile_is_recorded_and_not_timed(monkeypatch):
    real = mla_decode.decode_latent

    def wrong(*args, tile=None, **kwargs):
        o = real(*args, tile=tile, **kwargs)
        return 2 * o if tile == mla_decode.TILES[16][1] else o

    monkeypatch.setattr(mla_decode, "decode_latent", wrong)
    monkeypatch.setattr(mla_decode, "QUICK", mla_decode.QUICK[:1])
    (row,) = mla_decode.run(quick=True)["rows"]
    reasons = {tile: ms for tile, ms in row["candidates"].items() if isinstance(ms, str)}
    assert reasons.keys() == {"16x32 w4 s5", "paged 16x32 w4 s5"}
    assert all("relative RMS error 1.0e+00" in reason for reason in reasons.values())


def test_others_may_round_their_scores_and_are_told_apart_from_a_bound(monkeypatch, records):
    """1 % is too much for ours, and usual for bf16 scores; a copy is never what is best."""
    (row, *_) = records["mla_decode"]["rows"]
    assert row["peers"] == ["bmm", "flashinfer"] and row["bounds"] == ["copy"]
    assert row["ms"]["copy"] < row["ms"]["bmm"] and row["best"] == "bmm"
    monkeypatch.setattr(mla_decode, "TILES", {16: []})
    real = mla_decode.bmm
    case = mla_decode.QUICK[0]
    for factor, right in ((1.01, True), (1.03, False)):
        x = mla_decode.inputs(case, torch.device("cpu"), 0)
        exact = mla_decode.exact(x)
        monkeypatch.setattr(mla_decode, "bmm", lambda x, factor=factor: factor * real(x))
        monkeypatch.setattr(mla_decode, "exact", lambda *_, exact=exact: exact)
        *_, row = mla_decode.rows(case, torch.device("cpu"))
        assert isinstance(row["ms"]["bmm"], float) is right


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
@both
def test_without_a_gpu_it_says_so(name):
    refused(BENCHES[name].run, f"bench {name}", "CUDA device")

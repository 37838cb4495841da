# SPDX-License-Identifier: MIT
"""The scoreboard: every claim holds, and stops holding when the model is another one."""

import json
from pathlib import Path

import pytest

from dsv2_ref import paper
from dsv2_ref.config import LITE, V2

# 29 that are computed, and one that is measured where there is a record
CLAIMS = 29 + any((Path(__file__).parents[1] / "data" / "results").glob("needle-2*.json"))


@pytest.fixture(scope="module")
def rows():
    return {row.claim: row for row in paper.rows()}


def test_every_claim_holds(rows):
    assert len(rows) == len(paper.rows()) == CLAIMS      # claims are names: no two alike
    assert [claim for claim, row in rows.items() if not row.holds] == []


@pytest.mark.parametrize("claim, printed, ours, value", [
    ("parameters, V2", "236B", "235.74B", 235_741_434_880),
    ("activated, V2", "21B", "20.85B", 20_851_512_320),
    ("parameters, V2-Lite", "15.7B", "15.71B", 15_706_484_224),
    ("activated, V2-Lite", "2.4B", "2.45B", 2_451_435_008),
    ("MLA's cache in GQA groups", "2.25", "2.25", 2.25),
    ("MLA's cache in head sizes", "9/2", "4.50", 4.5),
    ("cache, small MHA model", "110.6K", "110.6K", 110_592),
    ("cache, small MLA model", "15.6K", "15.6K", 15_552),
    ("cache, large MHA model", "860.2K", "860.2K", 860_160),
    ("cache, large MLA model", "34.6K", "34.6K", 34_560),
    ("cache saved, both at 16 bits", "(82.2%)", "82.2%", 100 - 100 * 34_560 / 194_560),
    ("cache saved, V2 at 6 bits", "93.3%", "93.3%", 100 - 100 * 207_360 / 3_112_960),
    ("bits per cached number", "6", "6.00", 6.0),
    ("bytes per token, latent", "(69,120)", "69,120", 69_120),
    ("bytes, all keys and values", "(4,915,200)", "4,915,200", 4_915_200),
    ("bits per packed number", "6", "6.06", 8 * 436 / 576),
    ("cache saved, packed", "93.3%", "93.3%", 100 - 100 * 60 * 436 / 389_120),
    ("sequences in 80 GB", "(14.9x)", "14.9x", 389_120 / (60 * 436)),
    ("training GPU-hours saved", "42.5%", "42.5%", 42.5150),
    ("TFLOP/s per GPU, V2", "(200)", "201", 201.1141),
    ("share of the peak, V2", "(20%)", "20.3%", 100 * 6 * 20_851_512_320 / (172_800 * 3.6e3 * 989)),
    ("TFLOP/s per GPU, 67B", "(370)", "371", 371.4793),
    ("share of the peak, 67B", "(38%)", "37.6%", 100 * 371.4793 / 989),
    ("fullest card, planned", "(fits)", "54.9 GB", 54_888_833_536),
    ("with nothing recomputed", "(too much)", "131.5 GB", 131_518_767_616),
    ("GPU-hours planned", "172.8K", "148K", 147_743.3484),
    ("tokens read after YaRN", "160K", "160K", 163_840),
    ("YaRN factor on q and on k", "(1.2608)", "1.2608", 1.260804),
    ("YaRN factor on q·k", "(1.5896)", "1.5896", 1.589627),
])
def test_numbers(rows, claim, printed, ours, value):
    row = rows[claim]
    assert (row.paper, row.ours) == (printed, ours)
    assert row.value == pytest.approx(value, abs=0 if isinstance(value, int) else 1e-4)


@pytest.mark.parametrize("changes, broken", [
    ({"n_routed": 128}, {"parameters, V2"}),
    ({"top_k": 8}, {"activated, V2", "TFLOP/s per GPU, V2"}),
    ({"expert_width": 3072}, {"fullest card, planned"}),
    ({"n_layers": 24, "d": 2560}, {"with nothing recomputed", "GPU-hours planned"}),
    ({"n_h": 64}, {"bytes, all keys and values"}),
    ({"d_c": 448}, {"MLA's cache in GQA groups", "MLA's cache in head sizes",
                    "bits per cached number", "cache, large MLA model",
                    "cache saved, both at 16 bits", "cache saved, V2 at 6 bits",
                    "bytes per token, latent", "cache saved, packed", "sequences in 80 GB"}),
    ({"yarn_factor": 32.0}, {"tokens read after YaRN", "YaRN factor on q and on k",
                             "YaRN factor on q·k"}),
    ({"yarn_mscale_all_dim": None}, {"YaRN factor on q and on k", "YaRN factor on q·k"}),
    ({"yarn_mscale_all_dim": 1.0}, {"YaRN factor on q and on k", "YaRN factor on q·k"}),
    # off by more than half and less than one of the last digit that the paper gives
    ({"vocab": 102_400 + 83_000}, {"parameters, V2", "TFLOP/s per GPU, V2"}),   # 236.6, 205
    ({"vocab": 102_400 + 40_000}, {"share of the peak, V2"}),                         # 20.5
    ({"d_c": 514}, {"cache, large MLA model"}),                                    # 34.68
    ({"d_c": 516}, {"cache saved, both at 16 bits"}),                                    # 82.11
    ({"yarn_factor": 40.035}, {"YaRN factor on q and on k"}),                        # 1.26087
])
def test_another_v2_breaks_the_claims_about_it(changes, broken):
    fail = {row.claim for row in paper.rows(v2=V2.with_(**changes)) if not row.holds}
    assert broken <= fail


def test_another_lite_breaks_the_claims_about_it():
    fail = {row.claim for row in paper.rows(lite=LITE.with_(n_layers=26)) if not row.holds}
    assert fail == {"parameters, V2-Lite", "activated, V2-Lite", "cache, small MHA model",
                    "cache, small MLA model"}


def test_ours_is_computed_not_written_down():
    other = V2.with_(n_layers=59, n_h=120, d_c=500, d_h=100, top_k=5, yarn_factor=39.0)
    theirs = {row.claim: row.ours for row in paper.rows(v2=other, lite=LITE.with_(d=2000, n_h=8,
                                                                                  d_c=500))}
    constant = {row.claim for row in paper.rows() if row.ours == theirs[row.claim]}
    measured = {row.claim for row in paper.rows() if row.claim == "cells with needle found"}
    assert constant - measured == {"training GPU-hours saved", "TFLOP/s per GPU, 67B",
                                   "share of the peak, 67B"}                       # 67B's own


def test_table_is_aligned_and_fits_100_columns():
    table = paper.as_table(paper.rows())
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 + CLAIMS + 2 and f"{CLAIMS} of {CLAIMS} hold" in lines[-1]
    how = lines[0].index("how")
    assert all(line[how - 2: how] == "  " and line[how] != " " for line in lines[2:-2])
    assert all(line.startswith("ok  ") for line in lines[2:-2])


# what to look for where a notebook writes a claim's number in another way
SPELT = {"activated, V2": "20,851,512,320", "activated, V2-Lite": "2,451,435,008",
         "parameters, V2": "235,741,434,880", "parameters, V2-Lite": "15,706,484,224",
         "MLA's cache in head sizes": "4.5 * V2.d_h", "cells with needle found": "140 of 144",
         "training GPU-hours saved": "42.5", "with nothing recomputed": "nothing computed again",
         "fullest card, planned": "stage_memory", "bits per cached number": "6 bits on average",
         "bits per packed number": "6.06", "sequences in 80 GB": "746",
         "share of the peak, V2": "20.3 %", "share of the peak, 67B": "37.6 %"}


def test_the_notebook_of_a_claim_has_its_number(rows):
    assert {row.subject for row in rows.values()} == {"sizes", "cache", "bits", "training",
                                                      "length"}
    for claim, row in rows.items():
        (file,) = (Path(__file__).parents[1] / "notebooks").glob(f"{row.notebook}_*.ipynb")
        number = SPELT.get(claim, row.ours.replace("%", ""))
        assert number in file.read_text(encoding="utf-8"), (claim, number, file.name)


def test_a_claim_that_does_not_hold_shows():
    table = paper.as_table(paper.rows(v2=V2.with_(n_routed=128)))
    assert "\nNO  parameters, V2 " in table and f"{CLAIMS - 1} of {CLAIMS} hold" in table


def test_long_explanations_wrap_within_100_columns():
    row = paper.Row("c" * 30, "1", "2", "3", 3.0, True, "many words " * 20, "sizes", "10")
    assert max(map(len, paper.as_table([row]).splitlines())) <= 100


def test_json_is_a_list_of_objects():
    content = json.loads(paper.as_json(paper.rows()))
    assert isinstance(content, list) and len(content) == CLAIMS
    for item, row in zip(content, paper.rows(), strict=True):
        assert item == vars(row)
        assert set(item) == {"claim", "section", "paper", "ours", "value", "holds", "how",
                             "subject", "notebook"}


def test_the_needle_row_counts_the_cells_of_the_newest_record(tmp_path, monkeypatch):
    def grid(*rows):
        return {"grids": {"yarn": {"lengths": [128, 1024, 2048], "grid": rows}}}

    def row():
        return [row for row in paper.rows() if row.claim == "cells with needle found"]

    monkeypatch.setattr(paper, "in_checkout", lambda name: tmp_path)
    assert row() == []                                       # no record, no claim
    for day, low in (("01", 0.0), ("02", 0.9), ("03", 0.95)):
        runs = [grid([1.0, 0.95], [1.0, low], [0.0, 0.0]), grid([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])]
        (tmp_path / f"needle-2026-01-{day}.json").write_text(
            json.dumps({"trained_at": 128, "parameters": 901_000, "runs": runs}))
        (found,) = row()
        green = 7 + (low == 0.95)
        assert (found.ours, found.value) == (f"{green}/8", green / 8)
        assert found.holds == (green == 8)                   # 7/8 < 140/144
        assert found.how == "0.9M model, to 1,024 tokens"

    def none(name):
        raise ValueError("no checkout")

    monkeypatch.setattr(paper, "in_checkout", none)
    assert row() == []

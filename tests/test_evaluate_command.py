# SPDX-License-Identifier: MIT
"""`evaluate` as it is typed: what it refuses, and what it says where lm-eval is missing.

With lm-eval it is tried in parity_lm_eval.py.
"""

import sys

import pytest
from calling import call

from dsv2_ref.alignment.sandbox import Uncontained
from dsv2_ref.alignment.tasks import LOCAL
from dsv2_ref.commands import evaluate
from dsv2_ref.commands.evaluate import named, told
from dsv2_ref.inference.benchmarks import BENCHMARKS, benchmark


def test_a_missing_lm_eval_is_one_line_with_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = call(capsys, "evaluate", "data/model", "--tasks", "stories_bits,mmlu")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "evaluate needs lm_eval: .venv/bin/pip install -e '.[eval]'" in err


@pytest.mark.parametrize("args, told", [
    (["nowhere", "--tasks", "mmlu"], "'nowhere' is no folder"),
    (["data/model"], "--tasks"),
    (["data/model", "--tasks", "mmlu", "--shots", "-1"], "shots: -1, expected at least 0"),
    (["data/model", "--tasks", "mmlu", "--limit", "0"], "limit: 0, expected at least 1"),
    (["data/model", "--tasks", "mmlu", "--batch", "0"], "batch: 0, expected at least 1"),
    (["data/model", "--tasks", "mmlu", "--memory", "many"], "memory: 'many'"),
    (["data/model", "--tasks", "mmlu", "--out", "data"], "out: 'data' cannot be written"),
    (["data/model", "--tasks", "mmlu", "--out", "README.md"], "is no result of this command"),
    (["data/model", "--tasks", "mmlu,CHID"], "CHID is not available: lm-eval has no such task"),
    (["data/model", "--tasks", "cmath"], "CMath is not available"),
    (["data/model", "--tasks", ","], "tasks: ',', expected at least one name"),
])
def test_what_is_refused_before_anything_is_loaded(args, told, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = call(capsys, "evaluate", *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and told in err


def test_programs_that_cannot_be_contained_are_refused_at_once(capsys, monkeypatch):
    def none(code):
        raise Uncontained("no namespaces, no Landlock")

    monkeypatch.setattr(evaluate, "run_program", none)
    for task in ("code_questions", "HumanEval", "mbpp"):
        code, out, err = call(capsys, "evaluate", "data/model", "--tasks", task)
        assert (code, out) == (2, "") and "programs cannot be run here: no namespaces" in err


def test_help_names_our_tasks_and_the_paper_s(capsys):
    code, out, _ = call(capsys, "evaluate", "--help")
    words = " ".join(out.split())
    assert code == 0 and all(name in words for name in LOCAL)
    for b in BENCHMARKS:
        assert (f" {b.name}," in words or f" {b.name}." in words) == (b.task is not None), b.name


def test_names_lead_to_tasks():
    spec, paper = named("HumanEval")
    assert spec["task"] == "humaneval_sandboxed" and paper.paper == 48.8
    assert named("gsm8k") == ("gsm8k_cot", benchmark("GSM8K")) and named("lambada") == (
        "lambada", None)
    spec, paper = named("questions")
    assert spec == LOCAL["questions"] and spec is not LOCAL["questions"] and paper is None


def test_a_group_is_told_with_its_parts_beside_the_paper():
    found = {"results": {"mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "mmlu"},
                         "mmlu_law": {"acc,none": 0.5, "alias": "law", "sample_len": 4}},
             "n-samples": {"mmlu_law": {"original": 9, "effective": 4}}, "n-shot": {"mmlu_law": 5}}
    got = told(found, "mmlu", benchmark("MMLU"))
    assert got == {"task": "mmlu", "samples": 4, "shots": 5, "metrics": {"acc": 0.25},
                   "parts": {"mmlu_law": {"acc": 0.5}},
                   "paper": {"benchmark": "MMLU", "metric": "Acc.", "V2": 78.5, "ours": 25.0,
                             "differs": ""}}
    alone = told(found, "mmlu_law", None)
    assert alone == {"task": "mmlu_law", "samples": 4, "shots": 5, "metrics": {"acc": 0.5}}

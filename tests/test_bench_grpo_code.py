# SPDX-License-Identifier: MIT
"""The record of GRPO with a compiler's word: it is complete, and counts rightly."""

import json
import math
import statistics

import pytest
import torch
from refusals import refused
from test_bodies import FILES, FOLDER, TOKENIZER

from dsv2_ref.alignment.bodies import Bodies, heads
from dsv2_ref.bench import grpo_code as bench
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, local_corpus

CORPUS = Corpus("own", FILES[:1], FILES[1:2], FILES[1:], "three files of this package")
SIZES = bench.QUICK._replace(questions=3, new_tokens=6, held_out=5, answers=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepSeekV2(TINY.with_(vocab=TOKENIZER.vocab, n_layers=2)).eval()


def test_the_record_is_complete(monkeypatch):
    monkeypatch.setattr(bench, "open_corpus", lambda name: local_corpus(FOLDER))
    monkeypatch.setattr(bench, "QUICK", bench.QUICK._replace(new_tokens=3))
    record = bench.run(quick=True)
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "grpo_code" and record["quick"] is True and record["torch"]
    assert [(run["seed"], run["reward"]) for run in record["runs"]] == [
        (0, "finished"), (0, "parses")]
    for run in record["runs"]:
        assert [entry["step"] for entry in run["curve"]] == [1, 2]
        for entry in run["curve"]:
            assert set(entry) == set(bench.KEPT) and entry["reward"] == entry[run["reward"]]
            assert entry["finished"] <= entry["does_something"] <= entry["parses"]
        for judged in (run["before"], run["after"]):
            assert set(bench.MEASURES) < set(judged) and judged["bits_per_byte"] > 1
            assert len(judged["samples"]) == run["held_out_functions"] == 3
            assert all("def " in sample for sample in judged["samples"])
            assert 1 <= judged["length"] <= judged["whole"] <= 3
    assert record["start"] == {"steps": 2, "corpus": str(FOLDER)}
    assert record["runs"][0]["before"] == record["runs"][1]["before"]
    assert set(record["summary"]) == set(bench.REWARDS)


def test_the_model_stays_and_both_rewards_meet_the_same_first_answers(model, monkeypatch):
    monkeypatch.setattr(Bodies, "parses", lambda self, which, answers: [
        float(i % 2) for i in range(len(answers))])           # one of each two is right
    before = {name: w.clone() for name, w in model.state_dict().items()}
    runs = {reward: bench.one_seed(model, TOKENIZER, 3, reward, 2, CORPUS, SIZES)
            for reward in bench.REWARDS}
    one, two = runs.values()
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    for name in ("length", "entropy", "ended", *bench.SHARES):
        assert one["curve"][0][name] == two["curve"][0][name]
    assert one["before"] == two["before"] and one["curve"][0]["kl_to_reference"] == 0
    assert two["curve"][0]["gradient_norm"] > 0 == two["curve"][0]["no_spread"]
    refused(lambda: bench.learned(model, None, 0, "passes"), "reward: 'passes'", "parses")


def test_training_ends_at_the_goal_and_knows_both_rewards(model, monkeypatch):
    seen = bench.tasks(CORPUS, TOKENIZER, SIZES)[0]
    paid = iter([0.0, 0.2, 0.09, 0.11, 0.08, 0.2])            # a mean of 0.1, then 0.145
    monkeypatch.setitem(bench.GOALS, "finished", 0.145)
    monkeypatch.setattr(Bodies, "parses", lambda self, which, answers: [1.0] * len(answers))

    def finished(self, which, answers):
        share = next(paid)
        return [share] * len(answers)

    monkeypatch.setattr(Bodies, "finished", finished)
    policy, log = bench.learned(model, seen, 0, steps=9, sizes=SIZES)
    assert [entry["reward"] for entry in log] == pytest.approx([0.0, 0.2, 0.09])
    assert all(entry["parses"] == 1 for entry in log)
    assert [entry["finished"] for entry in log] == pytest.approx([0.0, 0.2, 0.09])
    assert all(torch.equal(w, v) for w, v in zip(policy.parameters(), model.parameters(),
                                                  strict=True))        # no spread, no penalty yet
    _, log = bench.learned(model, seen, 0, steps=2, sizes=SIZES)
    assert len(log) == 2


def test_questions_are_of_their_own_files():
    seen, held = bench.tasks(CORPUS, TOKENIZER, bench.FULL)
    for bodies, files in ((seen, CORPUS.train), (held, CORPUS.test)):
        asked = [TOKENIZER.decode(head.prompt) for head in bodies.heads]
        assert asked and all(any(a in file.text for file in files) for a in asked)
    assert len(bench.tasks(CORPUS, TOKENIZER, SIZES)[1].heads) == 5
    again = bench.tasks(CORPUS, TOKENIZER, bench.FULL)
    assert [bodies.heads for bodies in again] == [seen.heads, held.heads]


def test_measures_are_those_of_the_answers(model, monkeypatch):
    """By a loop over what was sampled, in batches of another size."""
    bodies = Bodies(heads(FILES, TOKENIZER, 5), TOKENIZER)
    said = []

    def noted(*args):
        said.append(sample(*args))
        return said[-1]

    sample = bench.sample_answers
    monkeypatch.setattr(bench, "sample_answers", noted)
    monkeypatch.setattr(Bodies, "parses", lambda self, which, answers: [
        float(n + len(answer) > 5) for n, answer in zip(which, answers, strict=True)])
    monkeypatch.setattr(Bodies, "cut", lambda self, n, answer: min(1 + n, len(answer)))
    found = bench.measured(model, bodies, 1, SIZES, at_once=2)
    answers = [answer for part in said for answer in part.answers]
    assert [len(part.answers) for part in said] == [4, 4, 2]
    lengths = [statistics.fmean(map(len, answers[i : i + 2])) for i in range(0, 10, 2)]
    assert found["length"] == pytest.approx(statistics.fmean(lengths))
    assert len(set(lengths)) > 3
    assert found["length_interval"] == pytest.approx(
        1.96 * statistics.stdev(lengths) / math.sqrt(5))
    assert found["parses"] == sum(i // 2 + len(answers[i]) > 5 for i in range(10)) / 10
    assert found["ended"] == sum(e for part in said for e in part.ended) / 10
    assert found["whole"] == pytest.approx(6, abs=1)
    assert found["samples"] == [bodies.program(n, answers[2 * n]) for n in range(5)]
    assert found["distinct_answers"] == len({tuple(a) for a in answers}) / 10


@pytest.mark.parametrize("things, share", [([(1,), (2,), (1,), (1,)], 0.5), ([(1,), (2,)], 1.0),
                                           ([], 1.0)])
def test_distinct_is_a_share(things, share):
    assert bench.distinct(iter(things)) == share


def test_the_summary_goes_seed_by_seed():
    def one(seed, reward, before, after):
        return {"seed": seed, "reward": reward, "before": dict.fromkeys(bench.MEASURES, before),
                "after": dict.fromkeys(bench.MEASURES, after)}

    found = bench.summary([one(0, "finished", 0.1, 0.5), one(0, "parses", 0.0, 0.5),
                           one(1, "finished", 0.2, 0.6), one(1, "parses", 0.1, 0.5)])
    assert found["finished"]["length"] == pytest.approx(
        {"before": 0.15, "after": 0.55, "times": 4, "least": 3, "most": 5})
    assert found["parses"]["parses"] == pytest.approx({"before": 0.05, "after": 0.5})

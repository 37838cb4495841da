# SPDX-License-Identifier: MIT
"""The adapter beside lm-eval's own `hf` adapter on the same folder: `make parity_lm_eval`.

data/model, read at all its positions and as it is. Tasks of all four kinds in fp32, with
transformers' eager experts: each request, and each metric to its last digit. Odd requests in fp64
too, where less hides behind rounding.

In fp32 a logit of 20 is known to 2e-6, however small the log p that is made of it. So what is near
0 is compared to 2e-5, all else to a relative 1e-6. Of data/model transformers' own log p are up to
2e-5 from fp64's; where that puts the two further apart, ours has to be within 1e-5 of our fp64, and
nearer to it than theirs. In fp64 everything is compared to a relative 1e-6: transformers' norms and
router stay in fp32 there.
"""

import copy
import json
import math
import pathlib

import pytest
import torch
import yaml
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.alignment.tasks import COLOURS, LOCAL, SANDBOXED, colour_rows
from dsv2_ref.commands.common import files_for_others
from dsv2_ref.inference.benchmarks import BENCHMARKS
from dsv2_ref.inference.evaluate import score_continuations
from dsv2_ref.inference.scoring import choose
from dsv2_ref.stretch import with_config
from dsv2_ref.text.tokenizer import BEGIN, END, load_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytest.importorskip("lm_eval.tasks", reason="needs the extra `eval`")
pytest.importorskip("accelerate", reason="needs the extra `eval`")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("offline")]
SHOTS = {"questions": 2, "stories_colour": 1}
LIMIT = 12


@pytest.fixture(scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/model as if it had been trained at all positions that it can read: room for tasks."""
    model = checkpoint.load("data/model", torch.float32)
    model = with_config(model, model.config.with_(trained_positions=None))
    path = tmp_path_factory.mktemp("parity") / "model"
    checkpoint.save(model, path, files_for_others(load_tokenizer("data/model/tokenizer.json"),
                                                  model.config))
    return path


def adapters(folder, dtype):
    """Ours, and transformers'."""
    from lm_eval.models.huggingface import HFLM

    from dsv2_ref.inference.lm_eval import Adapter

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype=str(dtype)[6:], batch_size=4)
    theirs.model.set_experts_implementation("eager")
    assert theirs.model.dtype == dtype
    model = checkpoint.load(folder, dtype)
    return Adapter(model, load_tokenizer(folder / "tokenizer.json"), batch=5), theirs


@pytest.fixture(scope="module")
def both(folder):
    return adapters(folder, torch.float32)


@pytest.fixture(scope="module")
def exact(folder):
    return adapters(folder, torch.float64)


def test_a_folder_that_says_its_trained_length_is_read_to_it():
    """data/model as it is: 256 tokens."""
    ours, theirs = adapters(pathlib.Path("data/model"), torch.float32)
    assert theirs.max_length == 256 == ours.model.config.max_positions
    text = "Once upon a time there was a little girl named Lily. " * 40
    for kind, *arguments in (("loglikelihood", text, " She was happy."),
                             ("loglikelihood_rolling", text)):
        mine, its = (getattr(adapter, kind)(asked(kind, tuple(arguments)))[0]
                     for adapter in (ours, theirs))
        equal(mine, its)


@pytest.fixture(scope="module")
def manager():
    """One that knows our dicts alone: to look through all of lm-eval's files takes long."""
    return lm_eval.tasks.TaskManager(include_defaults=False)


def evaluated(adapter, name, manager):
    return lm_eval.simple_evaluate(
        model=adapter, tasks=[copy.deepcopy(LOCAL[name])], limit=LIMIT,
        num_fewshot=SHOTS.get(name), bootstrap_iters=0, task_manager=manager)


@pytest.mark.parametrize("name", LOCAL)
def test_a_task_has_the_same_requests_and_metrics(both, exact, manager, name):
    ours, theirs, true = (evaluated(adapter, name, manager) for adapter in (*both, exact[0]))
    assert len(ours["samples"][name]) == LIMIT
    for one, other, right in zip(*(found["samples"][name] for found in (ours, theirs, true)),
                                 strict=True):
        assert one["arguments"] == other["arguments"] and one["doc_hash"] == other["doc_hash"]
        for mine, its, fp64 in zip(one["resps"], other["resps"], right["resps"], strict=True):
            equal(mine[0], its[0], true=fp64[0])
    mine, its = ours["results"][name], theirs["results"][name]
    assert mine.keys() == its.keys()
    for metric, value in its.items():
        if "perplexity," in metric or "bits_per_byte," in metric:
            assert mine[metric] == pytest.approx(value, rel=1e-6), metric
        else:
            assert mine[metric] == value, metric


def equal(mine, its, rel_tol=1e-6, abs_tol=2e-5, true=None):
    """Texts and truths exactly, log-likelihoods as the head of this file says."""
    if isinstance(its, tuple):
        assert mine[1] is its[1]
        mine, its, true = mine[0], its[0], true and true[0]
    if isinstance(its, str):
        assert mine == its
    elif true is not None and abs(mine - true) < min(1e-5, abs(its - true)):
        assert math.isclose(its, true, rel_tol=rel_tol, abs_tol=5e-5), (its, true)
    else:
        assert math.isclose(mine, its, rel_tol=rel_tol, abs_tol=abs_tol), (mine, its, true)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i)
            for i, a in enumerate(arguments)]


STORY = "Once upon a time there was a little girl named Lily. She was very kind and liked honey."


@pytest.mark.parametrize("pair", [
    ("Once upon a", " time"), ("Once upon a ", "time"), ("Once upon a  ", " time"), ("", STORY),
    (STORY, " One day, her uncle gave her a red kite."), ("Lily ", "likes"), ("从前，", "有"),
    (f"{BEGIN}Once upon", " a time"), (BEGIN, "Once"), ("", f"{BEGIN}Once upon a time"),
    (f"User: hello\n\nAssistant: yes{END}User: a", " b"), (STORY * 60, STORY), (STORY * 60, " a"),
    ("x", "y" * 900), ("a\n", "\nb"), (" ", "a"),
], ids=range(16))
def test_log_likelihoods_of_odd_pairs(both, exact, pair):
    for adapters_of, tolerance in ((both, (1e-6, 2e-5)), (exact, (1e-6, 0.0))):
        ours, theirs = (adapter.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)[0]
                        for adapter in adapters_of)
        equal(ours, theirs, *tolerance)
        assert ours[0] < 0


@pytest.mark.parametrize("text", ["a", STORY, STORY * 40, STORY * 100, f"{BEGIN}{STORY}", "知" * 50,
                                  f"{STORY}{END}{STORY}"], ids=range(7))
def test_whole_texts_in_as_many_windows_as_it_takes(both, exact, text):
    for adapters_of, tolerance in ((both, (1e-6, 0.0)), (exact, (1e-6, 0.0))):
        ours, theirs = (adapter.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))[0]
                        for adapter in adapters_of)
        equal(ours, theirs, *tolerance)


@pytest.mark.parametrize("settings", [
    {"until": ["."]}, {"until": "\n"}, {"until": ["\n", " she", "zzz"], "max_gen_toks": 60}, {},
    {"until": [], "max_gen_toks": 7}, {"until": ["e"], "max_new_tokens": 30},
    {"until": ["”", "。"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 90},
    {"until": ["\nOne "], "max_gen_toks": 200},
], ids=range(8))
def test_texts_until_a_stop(both, settings):
    for context in (STORY, "Once upon a time", STORY * 60, "从前", f"{BEGIN}Long ago", "", "x"):
        ours, theirs = (adapter.generate_until(asked("generate_until", (context, dict(settings))))
                        for adapter in both)
        assert ours == theirs, context


def test_the_comparison_would_see_a_difference(exact):
    """A tenth of a per cent in one weight; a begin mark that is missing."""
    ours, theirs = exact
    request = asked("loglikelihood", (STORY, " One day"))
    expected = theirs.loglikelihood(request, disable_tqdm=True)[0]
    weight = ours.model.blocks[1].attention.W_O.weight
    with torch.no_grad():
        weight *= 1.001
        changed = ours.loglikelihood(request)[0]
        weight /= 1.001
    assert not math.isclose(changed[0], expected[0], rel_tol=1e-6)
    ids = ours.tok_encode(STORY, add_special_tokens=False)
    bare = ours._loglikelihood_tokens([(None, ids, ours.tok_encode(" One day", False))])[0]
    assert not math.isclose(bare[0], expected[0], rel_tol=1e-4)


def test_a_continuation_without_a_token_of_its_own_is_refused_by_both(both):
    """A Chinese text is one piece: both together may be one token."""
    ours, theirs = both
    whole, part = ours.tok_encode("从前有一个"), ours.tok_encode("从前有")
    assert len(whole) <= len(part)
    request = asked("loglikelihood", ("从前有", "一个"))
    with pytest.raises(ValueError, match="3 and 0 tokens, expected at least one of both"):
        ours.loglikelihood(request)
    with pytest.raises(AssertionError):
        theirs.loglikelihood(request, disable_tqdm=True)


def test_settings_that_the_engine_has_not_are_refused(both):
    for settings, told in (
        ({"until": [], "top_k": 3}, "generation_kwargs: 'top_k', expected only until"),
        ({"until": [], "do_sample": True}, "temperature: 0 with do_sample"),
        ({"until": [], "max_gen_toks": 1024}, "max_gen_toks: 1024, expected fewer than"),
    ):
        with pytest.raises(ValueError, match=told):
            both[0].generate_until(asked("generate_until", ("a", settings)))


def test_the_command(tmp_path, capsys):
    """One object on stdout, all else on stderr; the same again in a file."""
    out = tmp_path / "scores.json"
    code, printed, err = call(
        capsys, "evaluate", "data/model", "--tasks", "stories_colour,stories_bits,code_questions",
        "--limit", 3, "--out", out)
    assert code == 0 and "stories_bits:" in err
    told = json.loads(printed)
    assert told == json.loads(out.read_text()) and told["model"] == "data/model"
    colour, bits, code = (told["tasks"][name] for name in
                          ("stories_colour", "stories_bits", "code_questions"))
    model, tokenizer = (checkpoint.load("data/model", torch.float32),
                        load_tokenizer("data/model/tokenizer.json"))
    right = []
    for row in colour_rows("test")[:3]:
        ids = [tokenizer.bos, *tokenizer.encode(row["text"])]
        scores = score_continuations(model, [(ids, tokenizer.encode(f" {c}")) for c in COLOURS])
        right.append(COLOURS[choose([log_p for log_p, _ in scores])] == row["answer"])
    assert colour["metrics"]["acc"] == pytest.approx(sum(right) / 3) and colour["shots"] == 0
    assert bits["samples"] == 3 and 0.1 < bits["metrics"]["bits_per_byte"] < 0.5
    assert code["metrics"] == {"pass@1": 0.0}


def test_names_that_nobody_has_are_refused(capsys):
    code, out, err = call(capsys, "evaluate", "data/model", "--tasks", "stories_bits,nothing")
    assert code == 2 and out == "" and "tasks: 'nothing' is unknown" in err


def test_every_task_of_the_paper_s_list_is_in_lm_eval_and_has_its_metric():
    """In its files: no data is loaded."""
    index = lm_eval.tasks.TaskManager().task_index
    for b in BENCHMARKS:
        if b.task is not None and b.task not in SANDBOXED:
            assert b.task in index, b.name


def test_sandboxed_tasks_ask_as_lm_evals_own_do():
    """Prompt, stops and limits, read from its files without running the code they name."""
    folder = pathlib.Path(lm_eval.__file__).parent / "tasks"
    for name, file in (("humaneval_sandboxed", "humaneval/humaneval.yaml"),
                       ("mbpp_sandboxed", "mbpp/mbpp.yaml")):
        text = (folder / file).read_text("utf-8").replace("!function ", "")
        its, ours = yaml.safe_load(text), SANDBOXED[name]
        for key in ("dataset_path", "dataset_name", "test_split", "doc_to_text", "output_type",
                    "generation_kwargs", "num_fewshot", "target_delimiter"):
            assert ours.get(key) == its.get(key), (name, key)

# SPDX-License-Identifier: MIT
"""The needle grid: what each cell reads, its score, shared prefixes, pieces, kills.

What a trained model finds is in test_needle_model.py; here weights are random.
"""

import json
import random

import pytest
import torch
from test_needles import TEXTS, TOKENIZER

from dsv2_ref.config import TINY
from dsv2_ref.inference import needle
from dsv2_ref.inference.generate import generate
from dsv2_ref.inference.needle import Grid, cells, plans, read_pieces, run, score
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Document
from dsv2_ref.text.needles import haystack

TEXT = haystack([Document(str(i), text) for i, text in enumerate(TEXTS)], TOKENIZER, 512)
GRID = Grid((96, 200), (0, 37.5, 100), samples=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DeepSeekV2(TINY.with_(vocab=TOKENIZER.vocab, n_layers=2)).double().eval()
    for W in model.parameters():
        W.data *= 5 if W.ndim > 1 else 1
    return model


def whole(plan, sample):
    """All tokens that one sample of a cell reads."""
    return [*TEXT[: plan.at], *plan.rest(TEXT)[sample]]


@pytest.mark.parametrize("kind", ("one", "several", "chain"))
def test_each_sample_reads_exactly_length_tokens_needle_at_depth_question_last(kind):
    grid = Grid((120, 200), (0, 25, 50, 100), samples=4, kind=kind)
    for plan in plans(grid, TOKENIZER, len(TEXT)):
        for sample, task in enumerate(plan.tasks):
            ids, first = whole(plan, sample), list(task.needles[0])
            assert len(ids) == plan.length
            assert ids[plan.at : plan.at + len(first)] == first
            tail = [*task.question, *task.answer[:-1]]
            assert ids[-len(tail) :] == tail
            left = ids[: -len(tail)]
            for hidden in task.needles:                  # without them it is the text, whole
                at = next(i for i in range(len(left)) if left[i : i + len(hidden)] == list(hidden))
                del left[at : at + len(hidden)]
            assert left == TEXT[: plan.length - task.n_tokens]
            room = plan.length - 1 - max(t.n_tokens for t in plan.tasks)
            assert plan.at == 1 + round(plan.depth / 100 * room)


def test_depth_100_leaves_nothing_between_the_last_needle_and_the_question():
    plan = plans(Grid((150,), (100,), samples=1), TOKENIZER, len(TEXT))[0]
    task = plan.tasks[0]
    assert plan.rest(TEXT)[0] == [*task.needles[0], *task.question, *task.answer[:-1]]


def test_others_of_several_stand_evenly_behind_the_one_that_is_asked_for():
    plan = plans(Grid((200,), (0,), samples=1, kind="several"), TOKENIZER, len(TEXT))[0]
    ids, task = whole(plan, 0), plan.tasks[0]
    assert task.answer == task.needles[0][-5:-1]
    places = [next(i for i in range(len(ids)) if ids[i : i + len(n)] == list(n))
              for n in task.needles]
    gaps = [b - a - len(n) for a, b, n in zip(places, places[1:], task.needles)]
    assert places[0] == 1 and max(gaps) - min(gaps) <= 1 and min(gaps) > 20


def test_a_score_is_the_argmax_and_the_rank_of_one_pass_without_a_cache(model):
    (plan,) = plans(Grid((96,), (37.5,), samples=3), TOKENIZER, len(TEXT))
    exact, ranks = [], []
    for sample, task in enumerate(plan.tasks):
        logits = model(torch.tensor([whole(plan, sample)]))[0, -len(task.answer) :]
        order = logits.argsort(-1, descending=True).tolist()
        rank = [1 + row.index(right) for row, right in zip(order, task.answer)]
        exact.append(max(rank) == 1)
        ranks.append(sum(rank) / len(rank))
    shared = model.new_cache(1, 96)
    read_pieces(model, torch.tensor([TEXT[: plan.at]]), shared)
    got = score(model, plan, TEXT, shared)
    assert got["exact"] == sum(exact) / 3
    assert got["rank"] == pytest.approx(sum(ranks) / 3, abs=1e-12)
    assert got["rank"] > 1 and shared.lengths == [plan.at]


def test_exact_is_what_greedy_generation_would_write(model):
    """A head that knows the answer of one sample: found in that one, in no other."""
    (plan,) = plans(Grid((96,), (50,), samples=2), TOKENIZER, len(TEXT))
    task = plan.tasks[1]
    prompt = whole(plan, 1)[: -len(task.answer) + 1]
    own = generate(model, [prompt], len(task.answer), stop=())[0]
    right = plan.tasks[0], needle.Task(task.needles, task.question, tuple(own))
    told = needle.Plan(plan.length, plan.depth, plan.at, right)
    shared = model.new_cache(1, 96)
    read_pieces(model, torch.tensor([TEXT[: plan.at]]), shared)
    assert score(model, told, TEXT, shared)["exact"] == 0.5
    almost = needle.Task(task.needles, task.question, (*own[:-1], (own[-1] + 1) % 1000))
    told = needle.Plan(plan.length, plan.depth, plan.at, (plan.tasks[0], almost))
    assert score(model, told, TEXT, shared)["exact"] == 0


def test_a_tie_is_not_the_answer(model):
    (plan,) = plans(Grid((96,), (50,), samples=1), TOKENIZER, len(TEXT))
    flat = DeepSeekV2(model.config).double().eval()
    flat.embedding.weight.data.zero_()                    # every logit is 0
    shared = flat.new_cache(1, 96)
    read_pieces(flat, torch.tensor([TEXT[: plan.at]]), shared)
    got = score(flat, plan, TEXT, shared)
    assert (got["exact"], got["rank"]) == (0, 2)


def test_a_broken_model_is_told_and_not_scored(model):
    broken = DeepSeekV2(model.config).double().eval()
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits: NaN or infinite in the cell of length 96"):
        run(broken, TOKENIZER, TEXT, Grid((96,), (0,), samples=1))


@pytest.mark.parametrize("kind", ("latent", "six_bit"))
def test_a_grid_is_its_cells_read_alone_in_any_order(model, kind):
    """Shared prefixes and the order of the cells change nothing."""
    todo = plans(GRID, TOKENIZER, len(TEXT))
    together = list(cells(model, TEXT, todo, kind))
    for plan, cell in zip(todo, together, strict=True):
        (alone,) = cells(model, TEXT, [plan], kind)
        assert alone == cell
    assert [plan.at for plan in todo] == sorted(plan.at for plan in todo)


def test_a_prefix_is_read_once(model, monkeypatch):
    read = []
    hidden = DeepSeekV2.hidden
    monkeypatch.setattr(DeepSeekV2, "hidden", lambda self, tokens, *rest: (
        read.append(tokens.numel()), hidden(self, tokens, *rest))[1])
    todo = plans(GRID, TOKENIZER, len(TEXT))
    list(cells(model, TEXT, todo))
    rests = sum(len(row) for plan in todo for row in plan.rest(TEXT))
    assert sum(read) == max(plan.at for plan in todo) + rests


@pytest.mark.parametrize("piece", (1, 7, 64, 4096))
def test_pieces_change_nothing(model, piece, monkeypatch):
    rows = torch.tensor([TEXT[:100], TEXT[100:200]])
    expected = model.hidden(rows)[:, -5:]
    monkeypatch.setattr(needle, "PIECE", piece)
    cache = model.new_cache(2, 100)
    assert (read_pieces(model, rows, cache, 5) - expected).abs().max() < 1e-10
    assert cache.lengths == [100, 100]


def test_last_is_refused_where_there_is_less(model):
    with pytest.raises(ValueError, match="last: 6, expected 1 to 5"):
        read_pieces(model, torch.tensor([TEXT[:5]]), model.new_cache(1, 9), 6)


@pytest.mark.parametrize("torn", ("", '{"length": 96, "dep', "\x00\x00"))
@pytest.mark.parametrize("n", (0, 1, 4))
def test_a_run_that_was_killed_goes_on_with_the_same_result(model, tmp_path, n, torn, monkeypatch):
    expected = run(model, TOKENIZER, TEXT, GRID)
    assert run(model, TOKENIZER, TEXT, GRID, tmp_path) == expected
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    path.write_text("".join(lines[: 1 + n]) + torn)
    made = []
    assert run(model, TOKENIZER, TEXT, GRID, tmp_path, watch=made.append) == expected
    assert len(made) == 6 - n
    assert sorted(path.read_text().splitlines()) == sorted(line.strip() for line in lines)


def test_other_settings_weights_or_text_are_other_files(model, tmp_path):
    small = Grid((96,), (0,), samples=1)
    run(model, TOKENIZER, TEXT, small, tmp_path)
    run(model, TOKENIZER, TEXT, Grid((96,), (0,), samples=1, seed=1), tmp_path)
    run(model, TOKENIZER, TEXT[:1] + TEXT[2:], small, tmp_path)
    other = DeepSeekV2(model.config).double().eval()
    run(other, TOKENIZER, TEXT, small, tmp_path)
    other.load_state_dict(model.state_dict())
    other.blocks[0].attention.W_QR.weight.data = model.blocks[0].attention.W_QR.weight.flip(0)
    run(other, TOKENIZER, TEXT, small, tmp_path)             # the same numbers in other places
    assert len(list(tmp_path.iterdir())) == 5
    made = []
    run(model, TOKENIZER, TEXT, small, tmp_path, watch=made.append)
    assert made == []


def test_tasks_follow_from_seed_length_depth_and_kind_alone():
    few, many = (plans(Grid(lengths, (0, 50), samples=2), TOKENIZER, 512)
                 for lengths in ((200,), (96, 200, 300)))
    mine = {(p.length, p.depth): p for p in many}
    assert all(mine[p.length, p.depth] == p for p in few)
    assert len({p.tasks for p in many}) == 6
    again = plans(Grid((200,), (0, 50), samples=2, seed=1), TOKENIZER, 512)
    assert all(a.tasks != b.tasks for a, b in zip(again, few))


def test_the_summary_counts_green_cells_and_the_mean():
    grid = Grid((96, 200), (0, 100))
    done = {(length, depth): {"exact": exact, "rank": 1.5} for (length, depth), exact in zip(
        ((96, 0), (96, 100), (200, 0), (200, 100)), (1.0, 0.95, 0.9, 0.0))}
    result = needle._summary(grid, done)
    assert result["grid"] == [[1.0, 0.95], [0.9, 0.0]]
    assert (result["green"], result["cells"], result["mean"]) == (2, 4, pytest.approx(0.7125))


@pytest.mark.parametrize("wrong, said", [
    ({"lengths": ()}, "lengths: [], expected different numbers, at least one"),
    ({"lengths": (96, 96)}, "lengths: [96, 96], expected different numbers, at least one"),
    ({"lengths": (0,)}, "lengths: 0, expected at least 1"),
    ({"depths": ()}, "depths: [], expected different numbers, at least one"),
    ({"depths": (0, 101)}, "depths: 101, expected per cents from 0 to 100"),
    ({"depths": (-1,)}, "depths: -1, expected per cents from 0 to 100"),
    ({"depths": (float("nan"),)}, "depths: nan, expected per cents from 0 to 100"),
    ({"samples": 0}, "samples: 0, expected at least 1"),
    ({"kind": "two"}, "kind: 'two', expected one of one, several, chain"),
    ({"cache": "per_head"}, "cache: 'per_head', expected one of latent, six_bit"),
])
def test_a_wrong_grid_is_refused_in_one_line(wrong, said):
    with pytest.raises(ValueError) as error:
        Grid(**{"lengths": (96,), "depths": (0,)} | wrong)
    assert str(error.value) == said


def test_lengths_without_room_or_positions_or_text_are_refused(model):
    for lengths, text, said in (
        ((12,), TEXT, "lengths: 12, expected above"),
        ((513,), TEXT, "lengths: 513, expected at most max_positions = 512"),
        ((400,), TEXT[:300], "text: 300 tokens, expected at least 400"),
    ):
        with pytest.raises(ValueError, match=said):
            run(model, TOKENIZER, text, Grid(lengths, (50,)))


def test_the_shortest_length_that_has_room_is_read(model):
    with pytest.raises(ValueError) as error:
        run(model, TOKENIZER, TEXT, Grid((12,), (0, 100), samples=2))
    least = 1 + int(str(error.value).split("above ")[1].split()[0])
    assert run(model, TOKENIZER, TEXT, Grid((least,), (0, 100), samples=2))["cells"] == 2
    with pytest.raises(ValueError, match="expected above"):
        run(model, TOKENIZER, TEXT, Grid((least - 1,), (0, 100), samples=2))


def test_a_folder_that_cannot_be_read_is_told(model, tmp_path):
    grid = Grid((96,), (0,), samples=1)
    run(model, TOKENIZER, TEXT, grid, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        run(model, TOKENIZER, TEXT, grid, tmp_path)


def test_a_result_is_json_and_draws_do_not_touch_the_callers_random_numbers(model):
    random.seed(5)
    torch.manual_seed(5)
    before = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    json.dumps(run(model, TOKENIZER, TEXT, Grid((96,), (0,), samples=1)))
    assert (random.random(), torch.rand(1).item()) == before

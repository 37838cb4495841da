# SPDX-License-Identifier: MIT
"""Fine-tuning: the loss of answers against a loop over tokens, padding that changes nothing, runs
that go on bit for bit, and what a short one learns."""

from pathlib import Path

import pytest
import torch
from refusals import refused
from small_run import CONFIG

from dsv2_ref import checkpoint
from dsv2_ref.alignment.exam import answers, exact_match
from dsv2_ref.alignment.sft import (
    EPOCHS,
    PAPER,
    ConversationBatches,
    answering,
    recipe_for,
    sft,
    sft_trainer,
)
from dsv2_ref.cross_entropy import IGNORED
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.instructions import examples
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.objective import Batch
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer

MODEL = Path(__file__).parent.parent / "data" / "model"
TOKENIZER = load_tokenizer(MODEL / "tokenizer.json")
N = 11
RECIPE = Recipe(steps=7, batch=5, micro_batch=2, sequence=40, precision="fp32", lr=2e-3)


def conversations(n=N, seed=0):
    """Ids between a begin mark, 0, and an end mark, 1; of some there are two answers."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids, learned = [0], [False]
        for _ in range(1 + i % 2):
            asked, answer = torch.randint(1, 9, (2,), generator=draw).tolist()
            ids += torch.randint(2, 61, (asked + answer,), generator=draw).tolist() + [1]
            learned += [False] * asked + [True] * (answer + 1)
        found.append((ids, learned))
    return found


def model_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV2(config)


def trainer(recipe=RECIPE, model=None, seed=0, batches=None):
    return Trainer(model or model_of(seed=seed), recipe,
                   batches or ConversationBatches(conversations(), 40, 3), answering)


def exact(log):
    """Entries without what the clock says."""
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


def of(tensors, with_load=False):
    return Batch(tensors, torch.zeros(len(tensors[0]), dtype=torch.bool), with_load)


# ---- the loss


def read_alone(model, rows, variant=""):
    """Nats per answer token and the balance losses, a conversation at a time, token by token."""
    nats, n, balance, means = [], 0, [], []
    for ids, learned in rows:
        x = torch.tensor([ids[:-1]])
        run = model.losses(x, torch.tensor([ids[1:]]), torch.tensor([True]))
        balance.append(torch.stack([run.expert, run.device, run.communication]))
        logits = model.head(model.hidden(x))[0]                      # (T, V)
        mine = []
        for t in range(len(ids) - 1):
            log_p = logits[t] - logits[t].exp().sum().log()
            counts = learned[t + 1]
            if variant == "prompt tokens in the loss":
                counts = True
            if variant == "the end mark left out":
                counts = counts and ids[t + 1] != 1
            if variant == "marked one token late":
                counts = learned[t]
            if variant == "predicts the token it reads":
                mine += [-log_p[ids[t]]] * counts
            else:
                mine += [-log_p[ids[t + 1]]] * counts
        nats += mine
        n += len(mine)
        means.append(sum(mine) / len(mine))
    if variant == "padding in the mean":
        n = len(rows) * max(len(ids) - 1 for ids, _ in rows)
    if variant == "a mean for each conversation":
        return sum(means) / len(means), sum(balance) / len(rows)
    if variant == "a mean of the micro-batches' means":
        nats, n = [sum(m * 1.0 for m in part) / len(part) for part in _parts(rows, nats)], 3
    return sum(nats) / n, sum(balance) / len(rows)


def _parts(rows, nats):
    """Nats of the answer tokens in micro-batches of 2 rows."""
    counts = [sum(learned) for _, learned in rows]
    for start in range(0, len(rows), 2):
        begin = sum(counts[:start])
        yield nats[begin : begin + sum(counts[start : start + 2])]


WRONG = ["prompt tokens in the loss", "the end mark left out", "marked one token late",
         "predicts the token it reads", "padding in the mean", "a mean for each conversation",
         "a mean of the micro-batches' means"]


def exact_trainer(micro_batch):
    """In fp64, all of whose batch is known: the loss is comparable to 1e-10."""
    batches = ConversationBatches(conversations(), 40, 3)
    recipe = RECIPE.with_(micro_batch=micro_batch, clip=1e9)
    return trainer(recipe, model_of().double(), batches=batches)


def first_rows():
    """The conversations of the first batch, in its order."""
    order = ConversationBatches(conversations(), 40, 3)._order[:5]
    return [conversations()[i] for i in order]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_the_loss_and_its_gradient_are_a_loops_over_all_answer_tokens(micro_batch):
    mine = exact_trainer(micro_batch)
    losses, *_ = mine._gradients(mine._read(False))
    model = model_of().double().train()
    answer, balance = read_alone(model, first_rows())
    assert losses["answer"] == pytest.approx(answer.item(), abs=1e-10)
    for name, value in zip(("expert", "device", "communication"), balance, strict=True):
        assert losses[name] == pytest.approx(value.item(), abs=1e-10) and value > 0
    (answer + balance.sum()).backward()
    for (name, W), V in zip(mine.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(W.grad, V.grad, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("variant", WRONG)
def test_rejects(variant):
    mine = exact_trainer(2)
    losses, *_ = mine._gradients(mine._read(False))
    wrong, _ = read_alone(model_of().double(), first_rows(), variant)
    assert abs(losses["answer"] - wrong.item()) > 1e-4, variant


def longer(tensors, more=6, filled=3):
    """The same batch with more padding, of another token."""
    tokens, targets, lengths, mean = tensors
    rest = torch.full((len(tokens), more), filled)
    tokens = torch.cat([tokens, rest], 1)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    targets = torch.cat([targets, torch.full_like(rest, IGNORED)], 1)
    return tokens.masked_fill(padding, filled), targets, lengths, mean


def test_padding_changes_neither_losses_nor_gradients_nor_the_load():
    """Whatever token it is, and however much: experts are told what is real."""
    tensors = ConversationBatches(conversations(), 40, 3).next_batch(5)
    found = []
    for batch in (tensors, longer(tensors), longer(tensors, 20, 60)):
        model = model_of(CONFIG.with_(drop_capacity=0.5)).double().train()
        named = answering(model, of(batch, with_load=True))
        named.total.backward()
        found.append((named, [W.grad for W in model.parameters()]))
    (first, gradients), *others = found
    real = int(tensors[2].sum())
    assert [int(layer.experts.sum()) for layer in first.load] == [real * CONFIG.top_k]
    assert first.load[0].routing.scores.shape == (real, CONFIG.n_routed)
    assert first.load[0].dropped == 0                        # though the budget is half of all
    for named, other in others:
        for name, loss in first.losses.items():
            assert named.losses[name].item() == pytest.approx(loss.item(), abs=1e-12)
        for a, b in zip(named.load, first.load, strict=True):
            assert torch.equal(a.experts, b.experts) and torch.equal(a.devices, b.devices)
        for a, b in zip(other, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_padding_would_count_if_nobody_told_the_experts():
    """What `lengths` is for: the same pass without it has other balance losses and traffic."""
    tensors = longer(ConversationBatches(conversations(), 40, 3).next_batch(5))
    model = model_of().double().train()
    told = answering(model, of(tensors, with_load=True))
    untold = model.losses(tensors[0], tensors[1], torch.ones(5, dtype=torch.bool), True)
    assert abs(told.losses["expert"] - untold.expert) > 1e-6
    assert untold.load[0].experts.sum() > told.load[0].experts.sum()


def test_in_evaluation_there_is_no_balance_loss():
    model = model_of().eval()
    named = answering(model, of(ConversationBatches(conversations(), 40, 3).next_batch(4)))
    assert named.losses["answer"] > 0
    assert all(named.losses[name] == 0 for name in ("expert", "device", "communication"))


# ---- batches


def test_a_batch_is_conversations_padded_on_the_right():
    mine, known = conversations(), ConversationBatches(conversations(), 40, 3)
    order = known._order
    tokens, targets, lengths, mean = known.next_batch(6)
    assert tokens.shape == targets.shape == (6, max(len(mine[i][0]) - 1 for i in order[:6]))
    for b, i in enumerate(order[:6]):
        ids, learned = mine[i]
        n = len(ids) - 1
        assert lengths[b] == n and tokens[b, :n].tolist() == ids[:-1]
        assert targets[b, :n].tolist() == [
            i if is_learned else IGNORED for i, is_learned in zip(ids[1:], learned[1:])]
        assert (targets[b, n:] == IGNORED).all()
    assert mean.tolist() == [sum(sum(mine[i][1]) for i in order[:6]) / 6] * 6


def seen(batches, n):
    tokens, _, lengths, _ = batches.next_batch(n)
    return [tuple(row[:k].tolist()) for row, k in zip(tokens, lengths)]


def test_each_epoch_reads_each_conversation_once_in_an_order_of_its_own():
    batches = ConversationBatches(conversations(), 40, 3)
    everything = sorted(tuple(ids[:-1]) for ids, _ in conversations())
    read = [row for _ in range(4) for row in seen(batches, 4)] + seen(batches, 6)    # two epochs
    assert sorted(read[:N]) == sorted(read[N:]) == everything and read[:N] != read[N:]
    assert seen(ConversationBatches(conversations(), 40, 3), N) == read[:N]
    assert seen(ConversationBatches(conversations(), 40, 4), N) != read[:N]


def test_a_position_is_gone_on_from_and_belongs_to_its_conversations():
    batches = ConversationBatches(conversations(), 40, 3)
    batches.next_batch(N + 3)
    state = batches.state()
    again = ConversationBatches(conversations(), 40, 3)
    again.load(state)
    assert seen(again, 7) == seen(batches, 7)
    assert all(isinstance(value, int) for value in state.values())
    flipped = [(ids, [not x for x in learned]) for ids, learned in conversations()]
    joined = [(a + b, c + d) for (a, c), (b, d) in zip(conversations()[::2], conversations()[1::2])]
    for other, said in (
        (ConversationBatches(flipped, 40, 3), "changed"),
        (ConversationBatches(joined, 60, 3), "changed"),
        (ConversationBatches(conversations(), 41, 3), "sequence 40, now 41"),
        (ConversationBatches(conversations(), 40, 4), "seed 3, now 4"),
    ):
        refused(lambda other=other: other.load(state), "cannot resume", said)
        assert other.place == 0
    for bad in ({"place": N + 1}, {"place": -1}, {"epoch": -1}):
        refused(lambda bad=bad: again.load(state | bad), "place: ", f"expected 0 to {N}")


@pytest.mark.parametrize("rows, said", [
    ([], "conversations: none, expected some"),
    ([([0, 2, 3], [False, False, True]), ([0] * 42, [True] * 42)],
     "conversations[1]: 42 tokens, expected at most sequence + 1 = 41"),
    ([([0, 2, 3], [False] * 3)], "conversations[0]: 0 of 3 tokens to learn"),
    ([([0, 2, 3], [True, False, False])], "tokens to learn, expected some behind the first one"),
    ([([0, 2, 3], [True, True])], "conversations[0]: 2 of 3 tokens"),
])
def test_conversations_that_cannot_be_learned_are_refused(rows, said):
    refused(lambda: ConversationBatches(rows, 40, 0), said)


# ---- a run


@pytest.mark.parametrize("at", (1, 4))
def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(tmp_path, at):
    one = trainer()
    whole = train(one, progress=False)
    first = trainer()
    for _ in range(at):
        first.step()
    first.save(tmp_path / "state")
    second = trainer(seed=7)                                # from other weights
    second.load(tmp_path / "state")
    assert exact(train(second, progress=False)) == exact(whole[at:])
    for a, b in zip(one.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_epochs_by_default_and_the_papers_numbers():
    recipe = recipe_for(100)
    assert (recipe.steps, recipe.batch) == (7, 32)           # 224 of 200 conversations: whole steps
    assert recipe_for(64).steps == 4 and recipe_for(64, 1).steps == 2
    assert recipe_for(64, batch=8, lr=3e-4, seed=5) == Recipe(
        steps=16, batch=8, lr=3e-4, sequence=1024, seed=5)
    assert recipe_for(64, steps=9).steps == 9
    refused(lambda: recipe_for(64, 0), "epochs: 0 of 64 conversations")
    refused(lambda: recipe_for(0), "of 0 conversations, expected more than 0")
    assert (EPOCHS, PAPER.lr, PAPER.optimizer) == (2, 5e-6, "adamw")
    assert 0 <= EPOCHS * 1_500_000 - PAPER.steps * PAPER.batch < PAPER.batch
    assert PAPER.rate(0.5) == PAPER.rate(0.99) == 1.0


TALK = [list(e.messages) for e in examples(12, kinds=("count", "refusal"))]


def chat_model(**changes):
    return model_of(CONFIG.with_(vocab=TOKENIZER.vocab, bos=TOKENIZER.bos, eos=TOKENIZER.eos,
                                 **changes))


def test_a_tuned_model_is_a_copy():
    model = chat_model()
    before = {name: W.clone() for name, W in model.state_dict().items()}
    log = []
    tuned = sft(model, TOKENIZER, TALK, recipe_for(12, batch=4, precision="fp32"),
                watch=log.append)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6] and not tuned.training
    assert all(torch.equal(W, before[name]) for name, W in model.state_dict().items())
    changed = [name for name, W in tuned.state_dict().items() if not torch.equal(W, before[name])]
    assert len(changed) > 0.8 * len(before)


def test_what_cannot_be_tuned_is_refused():
    refused(lambda: sft_trainer(chat_model().bfloat16(), TOKENIZER, TALK),
            "model: weights in bfloat16", "expected float32")
    refused(lambda: sft_trainer(model_of(), TOKENIZER, TALK),
            f"tokenizer: {TOKENIZER.vocab} tokens, expected at most the model's 61")
    refused(lambda: sft_trainer(chat_model(max_positions=20), TOKENIZER, TALK),
            "conversations[0]: ", "expected at most sequence + 1 = 21")
    refused(lambda: sft_trainer(chat_model(), TOKENIZER, [TALK[0][:-1]]),
            "messages: ends with 'user', expected 'assistant'")


def test_answers_are_those_of_each_prompt_alone():
    model = chat_model().eval()
    prompts = [talk[:-1] for talk in TALK[:5]]
    together = answers(model, TOKENIZER, prompts, 7, batch=3)
    assert together == [answers(model, TOKENIZER, [prompt], 7)[0] for prompt in prompts]
    assert len(together) == 5


def test_the_share_that_is_right_is_told_by_kind(monkeypatch):
    found = examples(9, kinds=("count", "refusal", "upper"))
    given = [e.answer if i % 2 else "no" for i, e in enumerate(found)]
    from dsv2_ref.alignment import exam
    monkeypatch.setattr(exam, "answers", lambda *_: given)
    shares = exact_match(None, TOKENIZER, found)
    assert shares == {"count": pytest.approx(1 / 3), "refusal": pytest.approx(2 / 3),
                      "upper": pytest.approx(1 / 3)}
    assert list(shares) == sorted(shares)


def test_a_short_run_on_the_committed_model_learns():
    """The loss on answers falls, and held-out questions of the trained kinds are answered."""
    kinds = ("count", "unknown", "refusal")
    model = checkpoint.load(MODEL, torch.float32)
    log = []
    tuned = sft(model, TOKENIZER, [list(e.messages) for e in examples(360, 0, kinds)],
                recipe_for(360, batch=12, precision="fp32"), watch=log.append)
    judged = examples(36, 1, kinds, held_out=True)
    before, after = (exact_match(m, TOKENIZER, judged, 20) for m in (model, tuned))
    assert sum(before.values()) == 0
    assert log[-1]["answer"] < 0.2 * log[0]["answer"]
    assert after["unknown"] > 0.8 and after["refusal"] > 0.8 and after["count"] > 0.25

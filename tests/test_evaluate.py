# SPDX-License-Identifier: MIT
"""Log-probabilities of next tokens against all logits, bits per byte against a slow count."""

import math

import pytest
import torch
from refusals import refused

from dsv2_ref import cross_entropy
from dsv2_ref.config import TINY
from dsv2_ref.inference.evaluate import bits_per_byte, score_continuations, token_log_probs
from dsv2_ref.model import DeepSeekV2

DOCUMENTS = [[0, 5, 6, 7, 1], [0, *range(2, 40), 1], [0, 9, 1]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepSeekV2(TINY.with_(vocab=41, init_std=0.2, max_positions=64)).double()


@torch.no_grad()
def slow(model, sequence, stride):
    """Each target by itself, with the context its window gives it."""
    nats = 0.0
    for ids in DOCUMENTS:
        for i in range(1, len(ids)):
            end = i if i <= sequence else sequence + math.ceil((i - sequence) / stride) * stride
            first = max(0, min(end, len(ids) - 1) - sequence)
            logits = model.eval()(torch.tensor([ids[first:i]]))[0, -1]
            nats -= logits.log_softmax(-1)[ids[i]].item()
    return nats / math.log(2)


@pytest.mark.parametrize(("sequence", "overlap", "stride"),
                         [(64, 0.5, 32), (8, 0.5, 4), (8, 0.0, 8), (7, 0.5, 4), (5, 0.8, 1)])
def test_equals_one_target_at_a_time(model, sequence, overlap, stride):
    ours = bits_per_byte(model, DOCUMENTS, 100, sequence, batch=3, overlap=overlap)
    assert ours == pytest.approx(slow(model, sequence, stride) / 100, abs=1e-9)


def test_uniform_model_needs_log2_vocab_a_token():
    model = DeepSeekV2(TINY.with_(vocab=64))
    with torch.no_grad():
        model.head.weight.zero_()
    n = sum(len(d) - 1 for d in DOCUMENTS)
    assert bits_per_byte(model, DOCUMENTS, 50, 16) == pytest.approx(6 * n / 50)


def test_mode_is_restored_and_nothing_is_dropped(model):
    model.train()
    training = bits_per_byte(model, DOCUMENTS, 100, 16)
    assert model.training
    model.eval()
    assert training == bits_per_byte(model, DOCUMENTS, 100, 16)


def test_nothing_is_kept_for_gradients(model):
    """The graph of a forward pass doubles its memory."""
    seen = []
    hook = model.norm.register_forward_hook(lambda module, given, made: seen.append(made))
    bits_per_byte(model, DOCUMENTS, 100, 16)
    hook.remove()
    assert seen and not any(made.requires_grad for made in seen)


def test_no_text(model):
    with pytest.raises(ValueError, match="documents: 0 with 0 bytes, expected some text"):
        bits_per_byte(model, [], 0, 16)


# ---- log-probabilities of the next tokens

def tiny() -> DeepSeekV2:
    torch.manual_seed(3)
    return DeepSeekV2(TINY.with_(vocab=53, init_std=0.2, max_positions=64)).double()


def by_hand(model: DeepSeekV2, ids: torch.Tensor) -> torch.Tensor:
    """(B, T-1), from all logits, token by token."""
    logits = model(ids[:, :-1]).double()
    rows = [[logits[b, t, ids[b, t + 1]] - logits[b, t].exp().sum().log()
             for t in range(ids.shape[1] - 1)] for b in range(len(ids))]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_log_probabilities_are_those_of_the_logits(chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk * 53)
    m, ids = tiny(), torch.randint(53, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = by_hand(m, ids)
    torch.testing.assert_close(token_log_probs(m, ids), expected, atol=1e-10, rtol=0)
    m.train()                                     # nothing is dropped, in training mode either
    got = token_log_probs(m, ids, [9, 1, 5])
    real = torch.arange(1, 9) < torch.tensor([9, 1, 5])[:, None]
    torch.testing.assert_close(got, expected * real, atol=1e-10, rtol=0)
    assert (got[1] == 0).all() and (got[2, 4:] == 0).all() and (got[2, :4] != 0).all()
    padded = ids.clone()
    padded[2, 5:] = 0                             # padding that must not matter
    torch.testing.assert_close(token_log_probs(m, padded, [9, 9, 5])[2], got[2])


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_log_probabilities_carry_their_gradient(chunk, monkeypatch):
    """Weighted as GRPO weights them, against autograd through all logits."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk * 53)
    ids = torch.randint(53, (3, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).double()
    gradients = []
    for log_probs in (by_hand, token_log_probs):
        m = tiny()
        (log_probs(m, ids) * weights).sum().backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-10, rtol=0)


def test_log_probabilities_refuse_what_they_cannot_read():
    m = tiny()
    refused(lambda: token_log_probs(m, torch.zeros(3, dtype=torch.int64)), "ids: shape (3,)")
    refused(lambda: token_log_probs(m, torch.zeros(3, 1, dtype=torch.int64)), "at least two")
    refused(lambda: token_log_probs(m, torch.tensor([[1, 53]])), "ids: 53, expected 0 to 52")
    refused(lambda: token_log_probs(m, torch.tensor([[1, 2]]), [3]), "lengths: [3]", "1 to 2")


# ---- continuations

PAIRS = [([0, 5, 6], [7]), ([0, 5, 6], [8]), ([0, 5], [6, 7]), ([3], [4, 4, 4, 4, 9]),
         ([0, 5, 6], [7, 8, 9]), (list(range(50)), list(range(30))),
         ([*range(50), *range(14)], [3]),
         ([2], list(range(40)) + [1] * 24), ([0, 5, 6], [7])]


@torch.no_grad()
def one_token_at_a_time(model, context, following):
    """Each target of its own pass; what came before it loses its first tokens beyond 64."""
    ids, total, first = [*context, *following][-65:], 0.0, True
    for place in range(len(ids) - len(following), len(ids)):
        log_p = model(torch.tensor([ids[:place]]))[0, -1].log_softmax(-1)
        total += log_p[ids[place]].item()
        first &= log_p.argmax().item() == ids[place]
    return total, first


def test_continuations_are_scored_as_one_token_at_a_time(monkeypatch):
    m = tiny().eval()
    ids, h = [0, 5, 6], None
    while len(ids) < 7:                                   # what the model itself would write
        h = m(torch.tensor([ids]))[0, -1]
        ids.append(h.argmax().item())
    pairs = [*PAIRS, (ids[:3], ids[3:]), (ids[:3], [*ids[3:6], (ids[6] + 1) % 53])]
    expected = [one_token_at_a_time(m, *pair) for pair in pairs]
    for batch, chunk in ((1, 2**20), (3, 7), (100, 7)):
        monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk * 53)
        got = score_continuations(m, pairs, batch)
        for (log_p, first), (log_p_slow, first_slow) in zip(got, expected, strict=True):
            assert log_p == pytest.approx(log_p_slow, abs=1e-10) and first is first_slow
    assert got[-2][1] and not got[-1][1]
    assert got[0][0] == pytest.approx(got[8][0], abs=1e-10)          # the same pair, asked twice
    assert got[0][0] != pytest.approx(got[1][0], abs=1e-6)
    whole = token_log_probs(m, torch.tensor([[*PAIRS[4][0], *PAIRS[4][1]]]))
    assert got[4][0] == pytest.approx(whole[0, 2:].sum().item(), abs=1e-10)


def test_continuations_that_read_the_same_are_read_once(monkeypatch):
    m, read = tiny().eval(), []
    hidden = m.hidden
    monkeypatch.setattr(m, "hidden", lambda tokens: read.append(tokens.shape) or hidden(tokens))
    score_continuations(m, [([0, 5, 6], [letter]) for letter in range(10, 14)])
    assert read == [(1, 3)]
    score_continuations(m, [([0, 5], [6, 9]), ([0, 5, 6], [9])])
    assert read == [(1, 3), (1, 3)] and score_continuations(m, []) == []


def test_of_equal_logits_the_first_is_the_most_likely():
    m = tiny()
    with torch.no_grad():
        m.head.weight.zero_()
    assert [first for _, first in score_continuations(m, [([3], [0]), ([3], [1]), ([3], [0, 0])])
            ] == [True, False, True]


def test_continuations_are_refused():
    m = tiny()
    refused(lambda: score_continuations(m, [([1], [2]), ([], [2])]), "pairs[1]: 0 and 1 tokens")
    refused(lambda: score_continuations(m, [([1], [])]), "pairs[0]: 1 and 0 tokens")
    refused(lambda: score_continuations(m, [([1], [2] * 65)]), "65 tokens", "max_positions = 64")
    refused(lambda: score_continuations(m, [([53], [2])]), "53", "expected 0 to 52")
    refused(lambda: score_continuations(m, [([3], [2, 53])]), "pairs[0]: id 53, expected 0 to 52")


def test_evaluation_keeps_no_graph():
    """762 MB where 355 were needed, once: no tensor that is left asks for a gradient."""
    m, asked = tiny(), []
    hook = m.norm.register_forward_hook(lambda _, __, h: asked.append(h.requires_grad))
    bits_per_byte(m, [list(range(30))], 60, sequence=8)
    hook.remove()
    assert asked and not any(asked)

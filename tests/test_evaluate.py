# SPDX-License-Identifier: MIT
import math

import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.inference.evaluate import bits_per_byte
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

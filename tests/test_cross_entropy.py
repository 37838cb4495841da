# SPDX-License-Identifier: MIT
import pytest
import torch
import torch.nn.functional as F
from alive import Alive

from dsv2_ref import cross_entropy
from dsv2_ref.cross_entropy import linear_cross_entropy


@pytest.fixture(params=[7, 10**6], ids=["many chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param * 29)


def problem(ignored):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(23, 5, dtype=torch.float64, generator=g).requires_grad_()
    W = torch.randn(29, 5, dtype=torch.float64, generator=g).requires_grad_()
    t = torch.randint(0, 29, (23,), generator=g)
    t[ignored] = -100
    return h, W, t


@pytest.mark.parametrize("ignored", [[], [0, 7, 22], list(range(7))], ids=str)
def test_equals_plain_loss_and_gradients(chunk, ignored):
    h, W, t = problem(ignored)
    ours, plain = linear_cross_entropy(h, W, t), F.cross_entropy(F.linear(h, W), t)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * ours, (h, W)), torch.autograd.grad(3 * plain, (h, W)),
                    strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_without_gradient(chunk):
    h, W, t = problem([3])
    with torch.no_grad():
        ours = linear_cross_entropy(h, W, t)
    assert not ours.requires_grad
    assert torch.allclose(ours, F.cross_entropy(F.linear(h, W), t), atol=1e-12)


def test_all_ignored_is_zero_with_zero_gradient(chunk):
    h, W, t = problem(list(range(23)))
    loss = linear_cross_entropy(h, W, t)
    loss.backward()
    assert loss.item() == 0 and not h.grad.any() and not W.grad.any()


def test_softmax_is_fp32_under_autocast():
    h, W, t = problem([])
    h, W = h.float().detach().requires_grad_(), W.float().detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, W, t)
    loss.backward()
    assert loss.dtype == h.grad.dtype == W.grad.dtype == torch.float32
    plain = F.cross_entropy(F.linear(h.bfloat16(), W.bfloat16()).float(), t)
    assert torch.allclose(loss, plain, rtol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_many_chunks_are_summed_in_fp32(monkeypatch, autocast):
    """1024 times the same token, a chunk each: the gradient of their mean is that of one of them.

    To the last bit: a 1024th of a bf16 number is one too, and fp32 holds k of them for all k.
    """
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 29)
    h, W, t = (x[:n].detach() for x, n in zip(problem([]), (1, 29, 1)))
    dtype = torch.float32 if autocast else torch.bfloat16
    gradients = []
    for n in (1, 1024):
        many = h.to(dtype).expand(n, -1).clone().requires_grad_()
        head = W.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            linear_cross_entropy(many, head, t.expand(n)).backward()
        gradients.append((many.grad.sum(0), head.grad))
    (one_h, one_W), (all_h, all_W) = gradients
    assert one_W.abs().max() > 0.1 and torch.equal(all_W, one_W)
    assert torch.equal(all_h.float(), one_h.float())


def test_a_chunk_is_forgotten_before_the_next_one():
    """Logits of one chunk at a time: once a chunk's log-probabilities outlived it."""

    def most(chunks: int) -> int:
        V, d = 4096, 8
        N = chunks * cross_entropy.CHUNK_LOGITS // V
        h, W = torch.ones(N, d, requires_grad=True), torch.ones(V, d, requires_grad=True)
        targets = torch.zeros(N, dtype=torch.int64)
        with Alive() as alive:
            linear_cross_entropy(h, W, targets)
        return alive.peak

    chunk = 4 * cross_entropy.CHUNK_LOGITS
    assert most(1) > 2 * chunk and most(4) < most(1) + 0.1 * chunk

# SPDX-License-Identifier: MIT
import pytest
import torch
import torch.nn.functional as F

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

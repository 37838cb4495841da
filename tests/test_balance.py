# SPDX-License-Identifier: MIT
"""The three balance losses against equations (23)-(31) taken with counters."""

import pytest
import torch
from oracles import loops

from dsv2_ref.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    device_reach,
    expert_balance_loss,
    expert_frequency,
)

B, T, E, K, D, M = 2, 7, 12, 3, 4, 2
ALPHA = 0.05
Loss = pytest.mark.parametrize("name", ["expert", "device", "communication"])


def loss(name: str, s: torch.Tensor, indices: torch.Tensor, alpha: float = ALPHA,
         n_devices: int = D, max_devices: int = M) -> torch.Tensor:
    if name == "expert":
        return expert_balance_loss(s, indices, alpha)
    if name == "device":
        return device_balance_loss(s, indices, alpha, n_devices)
    return communication_balance_loss(s, indices, alpha, n_devices, max_devices)


def routed(seed: int, batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """Affinities that lean to some experts, and the three largest of each token."""
    lean = loops.normal(seed + 100, E)
    s = (loops.normal(seed, batch, T, E) + lean).softmax(-1)
    return s, s.topk(K, -1).indices


def oracle(name: str, s: list, chosen: list, alpha: float = ALPHA) -> float:
    if name == "expert":
        return loops.expert_loss(s, chosen, alpha)
    if name == "device":
        return loops.device_loss(s, chosen, alpha, D)
    return loops.communication_loss(s, chosen, alpha, D, M)


@Loss
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_equations(name, seed):
    s, indices = routed(seed)
    each = [oracle(name, *pair) for pair in zip(s.tolist(), indices.tolist(), strict=True)]
    assert loss(name, s, indices).item() == pytest.approx(sum(each) / B, abs=1e-10)
    assert loss(name, s, indices).shape == ()


def test_counts():
    _, indices = routed(3)
    f = expert_frequency(indices, E)
    for b in range(B):
        assert f[b].tolist() == pytest.approx(loops.expert_f(indices[b].tolist(), E), abs=1e-12)
    assert f.mean(-1).tolist() == pytest.approx([1.0] * B)
    reach = device_reach(indices, E, D)
    for b in range(B):
        for t in range(T):
            devices = {i // 3 for i in indices[b, t].tolist()}
            assert {d for d in range(D) if reach[b, t, d]} == devices


@Loss
def test_uniform_routing_costs_alpha(name):
    """Every expert equally often, affinities flat, each token on exactly M devices."""
    t, k = torch.arange(12)[:, None], torch.arange(2)[None]
    indices = ((t + 3 * k) % E)[None]                     # two experts on two neighbouring devices
    s = torch.full((1, 12, E), 1 / E, dtype=torch.float64)
    assert loss(name, s, indices, alpha=0.02).item() == pytest.approx(0.02, abs=1e-12)


def test_communication_loss_falls_with_the_messages_below_m():
    """Twelve tokens that reach one device each send half of the messages M = 2 allows."""
    indices = torch.arange(12)[None, :, None]
    s = torch.full((1, 12, E), 1 / E, dtype=torch.float64)
    assert loss("communication", s, indices, alpha=0.02).item() == pytest.approx(0.01, abs=1e-12)


@Loss
def test_each_loss_alone_trains_the_router(name):
    """Its gradient reaches the affinities, and pushes down what is overused."""
    logits = loops.normal(4, B, T, E).requires_grad_()
    s = logits.softmax(-1)
    indices = s.topk(K, -1).indices
    (grad,) = torch.autograd.grad(loss(name, s, indices), logits)
    assert grad.isfinite().all() and grad.abs().max() > 1e-5
    with torch.no_grad():
        after = loss(name, (logits - 0.1 * grad).softmax(-1), indices)
    assert after < loss(name, s, indices)


@Loss
def test_gradient_is_that_of_p_with_f_held_fixed(name):
    s, indices = routed(5)
    s = s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(name, s, indices), s)
    (grad,) = torch.autograd.grad(loss(name, s, indices), s)
    # d loss / d s_{t,i} is alpha · f_i / (T·B): the same for every token of a sequence
    assert torch.equal(grad[:, :1].expand_as(grad), grad)
    if name == "expert":
        expected = ALPHA * expert_frequency(indices, E) / (T * B)
        torch.testing.assert_close(grad[:, 0], expected, atol=1e-14, rtol=0)


@Loss
def test_sequences_are_judged_one_by_one(name):
    """Two sequences that lean opposite ways do not cancel."""
    lean = torch.full((E,), 0.01, dtype=torch.float64)
    lean[: E // 2] = (1 - 0.06) / 6
    s = torch.stack((lean, lean.flip(0)))[:, None].expand(2, T, E)
    indices = s.topk(K, -1).indices
    apart = loss(name, s, indices).item()
    assert apart == pytest.approx(sum(loss(name, s[b:b + 1], indices[b:b + 1]).item()
                                      for b in range(2)) / 2, abs=1e-12)
    as_one = loss(name, s.reshape(1, 2 * T, E), indices.reshape(1, 2 * T, K)).item()
    assert apart > 1.5 * as_one


def test_equal_computation_is_not_equal_communication():
    """Experts 0-2 on device 0, 3-5 on device 1, six slots each; but device 0 hears from 4 tokens
    and device 1 from 3. Only the communication loss sees it."""
    chosen = torch.tensor([[[0, 1, 2], [0, 3, 4], [1, 4, 5], [2, 3, 5]]])
    assert torch.bincount(chosen.flatten()).tolist() == [2] * 6
    assert device_reach(chosen, 6, 2).sum((0, 1)).tolist() == [4, 3]
    lean = torch.tensor([0.25] * 3 + [1 / 12] * 3, dtype=torch.float64)      # 3/4 to device 0
    for s, communication in ((lean, 0.75 * 1.0 + 0.25 * 0.75), (lean.flip(0), 0.25 + 0.75 * 0.75)):
        s = s.expand(1, 4, 6)
        assert loss("expert", s, chosen, 1.0).item() == pytest.approx(1.0, abs=1e-12)
        assert loss("device", s, chosen, 1.0, 2, 2).item() == pytest.approx(1.0, abs=1e-12)
        assert loss("communication", s, chosen, 1.0, 2, 2).item() == \
            pytest.approx(communication, abs=1e-12)


def test_equal_communication_is_not_equal_computation():
    """Every token reaches both devices, with two slots on one and one on the other."""
    chosen = torch.tensor([[[0, 1, 3], [1, 2, 4], [0, 2, 5]]])
    assert device_reach(chosen, 6, 2).all()
    lean = torch.tensor([0.25] * 3 + [1 / 12] * 3, dtype=torch.float64)
    for s, device in ((lean, 0.75 * 4 / 3 + 0.25 * 2 / 3), (lean.flip(0), 0.25 * 4 / 3 + 0.5)):
        s = s.expand(1, 3, 6)
        assert loss("communication", s, chosen, 1.0, 2, 2).item() == pytest.approx(1.0, abs=1e-12)
        assert loss("device", s, chosen, 1.0, 2, 2).item() == pytest.approx(device, abs=1e-12)


def test_devices_must_divide_the_experts():
    s, indices = routed(6)
    with pytest.raises(RuntimeError):
        loss("device", s, indices, n_devices=5)

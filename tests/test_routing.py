# SPDX-License-Identifier: MIT
"""The router against equations (21), (22) and device-limited selection taken token by token."""

import pytest
import torch
from oracles import loops

from dsv2_ref.moe.routing import Router, affinities, select_device_limited, select_greedy

N, D, E, K = 9, 5, 12, 3


def router(seed: int = 1, **options) -> Router:
    return loops.randomize(Router(D, E, K, **options), seed)


def test_affinities_equal_the_equation():
    u, centroids = loops.normal(2, N, D), loops.normal(3, E, D)
    s = affinities(u, centroids)
    expected = [loops.affinities(x, centroids.tolist()) for x in u.tolist()]
    torch.testing.assert_close(s, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(s.sum(-1), torch.ones(N).double(), atol=1e-12, rtol=0)


def test_greedy_takes_the_largest():
    s = loops.normal(4, 50, E).softmax(-1)
    expected = [loops.top(row, K) for row in s.tolist()]
    assert torch.equal(select_greedy(s, K), torch.tensor(expected))


@pytest.mark.parametrize("n_devices,max_devices", [(4, 2), (6, 3), (3, 1), (2, 2), (1, 1)])
def test_device_limited_takes_the_largest_on_the_best_devices(n_devices, max_devices):
    s = loops.normal(5, 60, E).softmax(-1)
    chosen = select_device_limited(s, K, n_devices, max_devices)
    expected = [loops.select_device_limited(row, K, n_devices, max_devices) for row in s.tolist()]
    assert torch.equal(chosen, torch.tensor(expected))
    reached = [len(set(row)) for row in (chosen // (E // n_devices)).tolist()]
    assert max(reached) <= max_devices


def test_a_limit_that_binds_nothing_is_greedy():
    s = loops.normal(6, 60, E).softmax(-1)
    assert torch.equal(select_device_limited(s, K, 4, 4), select_greedy(s, K))
    limited = select_device_limited(s, K, 4, 2)
    assert not torch.equal(limited, select_greedy(s, K))
    assert (limited[:, 0] == select_greedy(s, K)[:, 0]).all()        # the best is always in reach


def test_a_device_is_worth_its_best_expert_and_not_its_two_best():
    """Six experts on three devices of which one is allowed; V3's score would take the second."""
    s = torch.tensor([[0.40, 0.02, 0.25, 0.24, 0.05, 0.04]])
    groups = s.view(3, 2)
    assert groups.amax(-1).argmax() == 0 and groups.sum(-1).argmax() == 1
    assert select_device_limited(s, 2, 3, 1).tolist() == [[0, 1]]


def test_an_underflowed_affinity_does_not_escape_its_device():
    """Masked with 0 instead of -inf, a tie at 0 lets an expert in from outside."""
    s = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
                      [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    chosen = select_device_limited(s, 2, 3, 1)
    assert chosen.sort(-1).values.tolist() == [[4, 5], [2, 3], [0, 1]]
    # the same through the router: logits far apart underflow in fp32
    r = Router(2, 6, 2, n_devices=3, max_devices=1)
    with torch.no_grad():
        r.weight.zero_()
        r.weight[4, 0] = 200.0
    routing = r(torch.tensor([[1.0, 0.0]]))
    assert routing.scores[0].tolist() == [0, 0, 0, 0, 1, 0]
    assert sorted(routing.indices[0].tolist()) == [4, 5]


@pytest.mark.parametrize("factor", [1.0, 16.0, 2.5])
@pytest.mark.parametrize("limit", [{}, dict(n_devices=4, max_devices=2)], ids=["greedy", "limited"])
def test_gates_are_the_chosen_affinities_times_the_factor_once(limit, factor):
    r, u = router(scaling_factor=factor, **limit), loops.normal(7, N, D)
    routing = r(u)
    for n in range(N):
        s = loops.affinities(u[n].tolist(), r.weight.tolist())
        chosen = loops.select_device_limited(s, K, 4, 2) if limit else loops.top(s, K)
        assert routing.indices[n].tolist() == chosen
        assert routing.gates[n].tolist() == pytest.approx([s[i] * factor for i in chosen],
                                                          abs=1e-10)
        assert routing.scores[n].tolist() == pytest.approx(s, abs=1e-10)
    assert (routing.gates.sum(-1) < factor * 0.999).all()            # not renormalised


def test_gates_and_affinities_carry_gradient():
    r, u = router(n_devices=4, max_devices=2), loops.normal(8, N, D).requires_grad_()
    routing = r(u)
    assert not routing.indices.requires_grad
    for out in (routing.gates, routing.scores):
        weight = loops.normal(9, *out.shape)
        grads = torch.autograd.grad((out * weight).sum(), (u, r.weight), retain_graph=True)
        assert all(g.abs().max() > 1e-3 for g in grads)
    assert torch.autograd.gradcheck(lambda u, w: affinities(u, w), (u, r.weight))

    # a gate's gradient reaches all experts, through the softmax's denominator
    (grad,) = torch.autograd.grad(routing.gates[0, 0], r.weight)
    assert (grad != 0).any(-1).all()


def test_dtypes():
    """At least fp32 under any model dtype and under autocast; fp64 stays fp64."""
    u = loops.normal(10, N, D)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):
        r = router().to(dtype)
        routing = r(u.to(dtype))
        assert routing.scores.dtype == routing.gates.dtype == expected
        exact = affinities(u.to(dtype).double(), r.weight.double())
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(routing.scores.double(), exact, atol=tolerance, rtol=0)


def test_autocast_does_not_reach_the_router():
    r, u = router().float(), loops.normal(11, N, D).float()
    plain = r(u)
    with torch.autocast("cpu", torch.bfloat16):
        cast = r(u)
    assert cast.scores.dtype == cast.gates.dtype == torch.float32
    assert torch.equal(cast.scores, plain.scores) and torch.equal(cast.indices, plain.indices)


def test_one_token():
    r, u = router(n_devices=3, max_devices=1), loops.normal(12, 1, D)
    routing = r(u)
    assert routing.indices.shape == routing.gates.shape == (1, K) and routing.scores.shape == (1, E)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="n_devices"):
        Router(D, E, K, n_devices=5)
    with pytest.raises(ValueError, match="top_k"):
        Router(D, E, 4, n_devices=4, max_devices=1)
    with pytest.raises(ValueError, match="top_k"):
        Router(D, E, 0)
    with pytest.raises(ValueError, match="top_k"):
        Router(D, E, E + 1)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(max_devices=0), "max_devices: 0, expected 1 to n_devices = 4"),
    (dict(max_devices=5), "max_devices: 5, expected 1 to n_devices = 4"),
    (dict(n_devices=0, max_devices=None), "n_devices: 0, expected a divisor of n_routed = 8"),
    (dict(n_devices=3, max_devices=None), "n_devices: 3, expected a divisor of n_routed = 8"),
    (dict(top_k=5), "top_k: 5, expected 1 to 4"),
])
def test_impossible_limits_are_refused(changes, message):
    sizes = dict(d=5, n_routed=8, top_k=2, n_devices=4, max_devices=2) | changes
    with pytest.raises(ValueError, match=message):
        Router(**sizes)

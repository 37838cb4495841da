# SPDX-License-Identifier: MIT
"""The experts against equation (20) taken token by token; the three forms against each other."""

import pytest
import torch
import torch.nn.functional as F
from oracles import loops

from dsv2_ref.moe.experts import (
    FeedForward,
    MixtureOfExperts,
    experts_grouped,
    experts_loop,
    experts_padded,
    sort_slots,
)

N, D, W, E, K, N_SHARED = 7, 5, 4, 6, 3, 2
Slots = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BOTH = pytest.mark.parametrize("run", [experts_loop, experts_padded])


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def slots(seed: int, n: int = N, n_routed: int = E, avoid: int | None = None) -> Slots:
    """Distinct experts a token (never `avoid`), gates, and a mask that drops about a third."""
    s = loops.normal(seed, n, n_routed)
    if avoid is not None:
        s[:, avoid] = -100.0
    gates, indices = s.softmax(-1).topk(K, -1)
    return indices, gates, loops.normal(seed + 1, n, K) > -0.4


def stacks(seed: int, n_routed: int = E, w: int = W, d: int = D) -> list[torch.Tensor]:
    shapes = [(n_routed, w, d), (n_routed, w, d), (n_routed, d, w)]
    return [loops.normal(seed + i, *shape).requires_grad_() for i, shape in enumerate(shapes)]


def module(seed: int = 1) -> MixtureOfExperts:
    return loops.randomize(MixtureOfExperts(D, W, N_SHARED, E), seed)


def oracle(m: MixtureOfExperts, u: torch.Tensor, x: torch.Tensor, indices: torch.Tensor,
           gates: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The shared network is cut into its N_s experts of width W."""
    shared = list(zip(m.shared.W_gate.weight.unflatten(0, (N_SHARED, W)).tolist(),
                      m.shared.W_up.weight.unflatten(0, (N_SHARED, W)).tolist(),
                      m.shared.W_down.weight.unflatten(1, (N_SHARED, W)).movedim(1, 0).tolist(),
                      strict=True))
    routed = list(zip(m.W_gate.tolist(), m.W_up.tolist(), m.W_down.tolist(), strict=True))
    out = [loops.mixture(u[n].tolist(), x[n].tolist(), indices[n].tolist(), gates[n].tolist(),
                         shared, routed, None if keep is None else keep[n].tolist())
           for n in range(len(u))]
    return torch.tensor(out, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("n", [N, 3, 1])
def test_equals_the_equation(n, dropping, run):
    m, u, x = module(), loops.normal(2, n, D), loops.normal(3, n, D)
    indices, gates, keep = slots(4, n)
    keep[0, 1] = True
    keep = keep if dropping else None
    close(m(u, x, indices, gates, run, keep), oracle(m, u, x, indices, gates, keep))


def test_feed_forward_is_swiglu():
    ffn = loops.randomize(FeedForward(D, W), 5)
    x = loops.normal(6, 2, 3, D)
    weights = tuple(w.weight.tolist() for w in (ffn.W_gate, ffn.W_up, ffn.W_down))
    expected = [[loops.expert(v, weights) for v in row] for row in x.tolist()]
    close(ffn(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dropping", [False, True])
def test_loop_and_padded_have_equal_values_and_gradients(dropping):
    results = []
    for run in (experts_loop, experts_padded):
        x, weights = loops.normal(7, N, D).requires_grad_(), stacks(8)
        indices, gates, keep = slots(9)
        gates = gates.requires_grad_()
        y = run(x, indices, gates, *weights, keep if dropping else None)
        grads = torch.autograd.grad((y * loops.normal(10, N, D)).sum(), [x, gates, *weights])
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 1e-3
        close(a, b)


@BOTH
def test_gradients(run):
    x, gates = loops.normal(11, 3, 2).requires_grad_(), loops.normal(12, 3, 2).requires_grad_()
    indices, keep = torch.tensor([[0, 3], [1, 0], [3, 1]]), torch.tensor([[1, 1], [0, 1], [1, 1]])
    weights = stacks(13, 4, 3, 2)
    assert torch.autograd.gradcheck(
        lambda x, g, *W: run(x, indices, g, *W, keep.bool()), (x, gates, *weights))


@BOTH
def test_an_expert_without_tokens_has_a_gradient_of_zeros(run):
    x, weights = loops.normal(14, N, D), stacks(15)
    indices, gates, _ = slots(16, avoid=2)
    run(x, indices, gates, *weights).sum().backward()
    for weight in weights:
        assert weight.grad is not None
        assert (weight.grad[2] == 0).all() and (weight.grad != 0).flatten(1).any(1).sum() == E - 1


@BOTH
def test_an_expert_whose_slots_were_all_dropped_has_a_gradient_of_zeros(run):
    x, weights = loops.normal(17, N, D), stacks(18)
    indices, gates, _ = slots(19)
    busiest = int(torch.bincount(indices.flatten()).argmax())
    keep = indices != busiest
    y = run(x, indices, gates, *weights, keep)
    y.sum().backward()
    for weight in weights:
        assert (weight.grad[busiest] == 0).all() and (weight.grad != 0).any()
    close(y, run(x, indices, gates * keep, *weights))


@pytest.mark.parametrize("n", [0, N])
@BOTH
def test_without_any_slot_the_sum_and_the_gradients_are_zero(run, n):
    """All dropped, or no token at all: what a device sees that receives nothing."""
    x, weights = loops.normal(36, n, D), stacks(37)
    indices, gates, _ = slots(38, n)
    y = run(x, indices, gates, *weights, torch.zeros(n, K, dtype=torch.bool))
    assert y.shape == (n, D) and (y == 0).all()
    y.sum().backward()
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in weights)


@BOTH
def test_a_token_whose_slots_were_all_dropped_keeps_residual_and_shared_experts(run):
    m, u, x = module(), loops.normal(20, N, D), loops.normal(21, N, D)
    indices, gates, keep = slots(22)
    keep[4] = False
    close(m(u, x, indices, gates, run, keep)[4], (u + m.shared(x))[4])


def test_shared_experts_are_summed_not_averaged():
    """Two equal shared experts give twice what one gives."""
    m = module()
    with torch.no_grad():
        for weight in (m.shared.W_gate.weight, m.shared.W_up.weight):
            weight[W:] = weight[:W]
        m.shared.W_down.weight[:, W:] = m.shared.W_down.weight[:, :W]
    one = FeedForward(D, W).double()
    with torch.no_grad():
        one.W_gate.weight.copy_(m.shared.W_gate.weight[:W])
        one.W_up.weight.copy_(m.shared.W_up.weight[:W])
        one.W_down.weight.copy_(m.shared.W_down.weight[:, :W])
    x = loops.normal(23, N, D)
    close(m.shared(x), 2 * one(x))


def test_sort_slots():
    indices, _, keep = slots(24)
    order, counts = sort_slots(indices, E)
    assert order.tolist() == sorted(range(N * K), key=lambda i: indices.flatten()[i].item())
    assert counts.tolist() == [(indices == e).sum().item() for e in range(E)]
    order, counts = sort_slots(indices, E, keep)
    kept = [i for i in range(N * K) if keep.flatten()[i]]
    assert order.tolist() == sorted(kept, key=lambda i: indices.flatten()[i].item())
    assert counts.tolist() == [((indices == e) & keep).sum().item() for e in range(E)]


@BOTH
def test_half_precision(run):
    """x and weights in bf16, gates in fp32 as the router makes them."""
    x, weights = loops.normal(25, N, D).bfloat16(), [w.detach().bfloat16() for w in stacks(26)]
    indices, gates, _ = slots(27)
    y = run(x, indices, gates.float(), *weights)
    assert y.dtype == torch.bfloat16
    loops.rounded_well([y], lambda x, g, *W: [experts_loop(x, indices, g, *W)],
                       [x, gates.float(), *weights], torch.bfloat16, 1.0)


@pytest.mark.parametrize("run", [experts_loop, experts_padded, experts_grouped])
def test_the_gated_sum_is_taken_in_fp32(run):
    """Experts that give a known row, without any rounding: silu(64)·2⁻⁶ is 1, and W_down the row.

    So y in bf16 is off by one rounding (2⁻⁸ of it) of the sum in fp32, and by nothing else.
    """
    if run is experts_grouped and not grouped_mm_works(torch.bfloat16):
        pytest.skip("this torch has no grouped_mm for torch.bfloat16 on the CPU")
    n, d, w = 200, 16, 8
    x = torch.eye(1, d).expand(n, d).bfloat16()
    W_gate, W_up, W_down = (torch.zeros(E, *size).bfloat16() for size in ((w, d), (w, d), (d, w)))
    W_gate[:, 0, 0], W_up[:, 0, 0] = 64.0, 2.0**-6
    W_down[:, :, 0] = loops.normal(33, E, d)
    indices, gates, _ = slots(34, n)
    terms = gates.float().double()[:, :, None] * W_down[:, :, 0].double()[indices]    # (n, K, d)
    exact, size = terms.sum(1), terms.abs().sum(1)
    error = (run(x, indices, gates.float(), W_gate, W_up, W_down).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + K * 2.0**-24 * size).all()


def grouped_mm_works(dtype: torch.dtype) -> bool:
    rows, ends = torch.ones(2, 8, dtype=dtype), torch.tensor([2], dtype=torch.int32)
    try:
        F.grouped_mm(rows, torch.ones(1, 8, 8, dtype=dtype), offs=ends)
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("dtype,times", [(torch.float32, 8.0), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("dropping", [False, True])
def test_grouped_equals_loop(dropping, dtype, times):
    if not grouped_mm_works(dtype):
        pytest.skip(f"this torch has no grouped_mm for {dtype} on the CPU")
    d, w = 16, 24                                    # strides must be multiples of 16 bytes
    indices, gates, keep = slots(30, avoid=1)

    def results(run, x, gates, *weights_and_dy):
        *weights, dy = weights_and_dy
        tensors = [t.detach().requires_grad_() for t in (x, gates, *weights)]
        y = run(tensors[0], indices, *tensors[1:], keep if dropping else None)
        return [y.detach(), *torch.autograd.grad(y, tensors, dy)]

    given = [loops.normal(28, N, d).to(dtype), gates.float(),
             *(t.to(dtype) for t in stacks(29, E, w, d)), loops.normal(31, N, d).to(dtype)]
    got = results(experts_grouped, *given)
    assert got[0].dtype == dtype and all((grad[1] == 0).all() for grad in got[3:])
    loops.rounded_well(got, lambda *moved: results(experts_loop, *moved), given, dtype, times)


@pytest.mark.parametrize("form", [experts_loop, experts_padded, experts_grouped])
@pytest.mark.parametrize("bad", [5, -1, 400])
def test_experts_that_do_not_exist_are_refused(form, bad):
    """Once their slots were left out without a word."""
    x, gates = torch.ones(3, 8), torch.ones(3, 2)
    indices = torch.tensor([[0, 1], [4, bad], [2, 3]])
    W = torch.ones(5, 4, 8)
    with pytest.raises(ValueError, match=f"indices: expert {bad}, expected 0 to 4"):
        form(x, indices, gates, W, W, W.mT.contiguous())


@pytest.mark.parametrize("form", [experts_loop, experts_padded, experts_grouped])
def test_gradients_have_the_same_bits_on_several_threads(form):
    """A token's gradient is a sum over its slots; threads must not choose the order."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 64, generator=g, requires_grad=True)
    indices = torch.rand(1024, 8, generator=g).topk(6).indices
    gates = torch.rand(1024, 6, generator=g)
    W = [torch.randn(8, *size, generator=g) for size in ((16, 64), (16, 64), (64, 16))]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = [torch.autograd.grad(form(x, indices, gates, *W).sum(), x)[0] for _ in range(12)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)

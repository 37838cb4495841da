# SPDX-License-Identifier: MIT
"""MLA against equations (37)-(47) taken token by token; its two algorithms; its cache."""

import math

import pytest
import torch
from oracles import loops
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import (
    MultiHeadLatentAttention,
    absorbed_is_cheaper,
    attend_absorbed,
    attend_expanded,
    visible_keys,
)
from dsv2_ref.attention.rope import rope_frequencies, rope_tables

B, T, D = 2, 7, 13
SIZES = dict(n_h=3, d_h=5, d_r=4, d_v=6, d_c=8)
D_CQ, THETA = 9, 30.0
BOTH = pytest.mark.parametrize("attend", [attend_expanded, attend_absorbed])


def module(
    d_cq: int | None = D_CQ, scale: float | None = None, seed: int = 1
) -> MultiHeadLatentAttention:
    return loops.randomize(MultiHeadLatentAttention(D, **SIZES, d_cq=d_cq, scale=scale), seed)


def tables(start: int, stop: int, magnitude: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(torch.arange(start, stop), rope_frequencies(4, THETA), magnitude)


def weights(m: MultiHeadLatentAttention) -> dict:
    return {name.removesuffix(".weight"): p.tolist() for name, p in m.named_parameters()}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@BOTH
@pytest.mark.parametrize("scale", [None, 0.31])
@pytest.mark.parametrize("d_cq", [D_CQ, None], ids=["compressed", "plain_q"])
def test_equals_the_equations(d_cq, scale, attend):
    m, h, magnitude = module(d_cq, scale), loops.normal(2, B, T, D), 1.2
    used = 1 / math.sqrt(5 + 4) if scale is None else scale
    expected = [loops.mla(sequence, weights(m), 3, loops.frequencies(4, THETA), used, magnitude)[0]
                for sequence in h.tolist()]
    u = m(h, *tables(0, T, magnitude), attend)
    close(u, torch.tensor(expected, dtype=torch.float64))


@BOTH
def test_one_token(attend):
    m, h = module(), loops.normal(3, B, 1, D)
    expected = [loops.mla(sequence, weights(m), 3, loops.frequencies(4, THETA), 1 / 3)[0]
                for sequence in h.tolist()]
    close(m(h, *tables(0, 1), attend), torch.tensor(expected, dtype=torch.float64))


@BOTH
def test_values_may_be_wider_than_keys(attend):
    m = loops.randomize(MultiHeadLatentAttention(D, n_h=2, d_h=3, d_r=4, d_v=11, d_c=8), 3)
    h = loops.normal(16, B, T, D)
    expected = [loops.mla(sequence, weights(m), 2, loops.frequencies(4, THETA), 7**-0.5)[0]
                for sequence in h.tolist()]
    close(m(h, *tables(0, T), attend), torch.tensor(expected, dtype=torch.float64))


@BOTH
def test_the_cached_row_is_the_normed_latent_and_the_turned_key(attend):
    m, h = module(), loops.normal(4, B, T, D)
    cache = LatentCache(2, B, T, 8, 4, torch.float64)
    cache.positions(T)
    m(h, *tables(0, T), attend, cache, layer=1)
    for b in range(B):
        _, rows = loops.mla(h[b].tolist(), weights(m), 3, loops.frequencies(4, THETA), 1 / 3)
        close(cache.store[1, b], torch.tensor(rows, dtype=torch.float64))
    assert (cache.store[0] == 0).all()
    assert cache.nbytes_per_token == (8 + 4) * 2 * 8                     # d_c + d_r, 2 layers, fp64


def test_small_latents_show_the_epsilon():
    """1e-6 is added under the root of both latent norms."""
    m, h = module(), loops.normal(5, B, T, D)
    with torch.no_grad():
        m.W_DKV.weight *= 1e-3
        m.W_DQ.weight *= 1e-3
    expected = [loops.mla(sequence, weights(m), 3, loops.frequencies(4, THETA), 1 / 3)[0]
                for sequence in h.tolist()]
    close(m(h, *tables(0, T)), torch.tensor(expected, dtype=torch.float64))
    assert m.norm_kv.eps == m.norm_q.eps == 1e-6


@pytest.mark.parametrize("d_cq", [D_CQ, None], ids=["compressed", "plain_q"])
def test_expanded_and_absorbed_have_equal_gradients(d_cq):
    grads = []
    for attend in (attend_expanded, attend_absorbed):
        m, h = module(d_cq), loops.normal(6, B, T, D).requires_grad_()
        (m(h, *tables(0, T), attend) * loops.normal(7, B, T, D)).sum().backward()
        grads.append({"h": h.grad} | {name: p.grad for name, p in m.named_parameters()})
    assert len(grads[0]) == (11 if d_cq else 9)
    for name, grad in grads[0].items():
        assert grad.abs().max() > 1e-3, name
        close(grads[1][name], grad)


@BOTH
def test_gradients(attend):
    shapes = [(1, 3, 2, 3), (1, 3, 2, 4), (1, 5, 6), (1, 5, 4), (2, 3, 6), (2, 5, 6)]
    inputs = tuple(loops.normal(8 + i, *shape).requires_grad_() for i, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 0.6), inputs)
    positions = torch.tensor([[0, 3, 4]])
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 0.6, positions), inputs)


@BOTH
def test_no_token_sees_the_future(attend):
    m, h = module(), loops.normal(9, 1, T, D).requires_grad_()
    (grad,) = torch.autograd.grad(m(h, *tables(0, T), attend)[:, 3].sum(), h)
    assert (grad[:, 4:] == 0).all() and (grad[:, :4] != 0).any(-1).all()


@BOTH
@pytest.mark.parametrize("chunks", [[7], [1, 3, 2, 1], [1] * 7, [5, 2]])
def test_cached_in_chunks_equals_full(chunks, attend):
    m, h = module(), loops.normal(10, B, T, D)
    cache = LatentCache(3, B, T + 2, 8, 4, torch.float64)
    out, start = [], 0
    for n in chunks:
        turn = tables(start, start + n)
        out += [[m(h[:, start : start + n], *turn, attend, cache, layer) for layer in range(3)][2]]
        cache.advance()
        start += n
    close(torch.cat(out, 1), m(h, *tables(0, T)))


@BOTH
def test_sequences_of_different_lengths(attend):
    """Prompts of 5 and 3 tokens padded to one batch, then two chunks of new tokens each."""
    m, h = module(), loops.normal(11, B, 9, D)
    full = m(h, *tables(0, 9))
    cache = LatentCache(1, B, 9, 8, 4, torch.float64)
    cache.positions(5, [5, 3])
    m(h[:, :5], *tables(0, 5), attend, cache)
    cache.advance()
    for n in (2, 1, 1):
        first = list(cache.lengths)
        new = torch.stack([h[b, s : s + n] for b, s in enumerate(first)])
        positions = cache.positions(n)
        turn = rope_tables(positions, rope_frequencies(4, THETA))
        u = m(new, *turn, attend, cache, positions=positions)
        close(u, torch.stack([full[b, s : s + n] for b, s in enumerate(first)]))
        cache.advance(n)


def test_visible_keys():
    assert visible_keys(1, 5, None, torch.device("cpu")) is None
    seen = visible_keys(2, 4, None, torch.device("cpu"))
    assert seen.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    seen = visible_keys(1, 4, torch.tensor([[0], [2]]), torch.device("cpu"))
    assert seen.int().tolist() == [[[[1, 0, 0, 0]]], [[[1, 1, 1, 0]]]]


def test_position_enters_beside_the_latent_because_it_cannot_enter_through_it():
    """R·W_UK·c is not W_UK·R·c for any R in the latent: turned keys do not fold into the query."""
    W_UK, c = loops.normal(12, 4, 8), loops.normal(13, 8)

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        return torch.tensor(loops.rope(x.tolist(), position, loops.frequencies(len(x), THETA)),
                            dtype=torch.float64)

    close(turn(W_UK @ c, 0), W_UK @ turn(c, 0))
    assert (turn(W_UK @ c, 1) - W_UK @ turn(c, 1)).abs().max() > 0.1


@BOTH
def test_attention_computes_what_its_formula_says(attend):
    """Counted multiplications: no merged weight, no expanded key where none is promised."""
    n_h, d_h, d_r, d_v, d_c, t, s = 3, 5, 4, 6, 8, 2, 9
    shapes = [(1, t, n_h, d_h), (1, t, n_h, d_r), (1, s, d_c), (1, s, d_r), (n_h, d_h, d_c),
              (n_h, d_v, d_c)]
    inputs = [loops.normal(14 + i, *shape) for i, shape in enumerate(shapes)]
    # the unfused form of SDPA, whose two products are counted like any other
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            attend(*inputs, 0.3)
    if attend is attend_expanded:                       # values may be padded to the keys' width
        least = most = s * d_c * (d_h + d_v) + t * s * (d_h + d_r + d_v)
        most += t * s * (d_h + d_r - d_v)
    else:
        least = most = t * d_c * (d_h + d_v) + t * s * (2 * d_c + d_r)
    assert 2 * n_h * least <= counter.get_total_flops() <= 2 * n_h * most


def test_crossover_for_the_published_sizes():
    """Absorbed for decoding, expanded for prompts; 3.4 times the work per query-key pair."""
    v2 = dict(d_h=128, d_r=64, d_v=128, d_c=512)
    assert absorbed_is_cheaper(1, 1000, **v2) and absorbed_is_cheaper(100, 1000, **v2)
    assert not absorbed_is_cheaper(1000, 1000, **v2) and not absorbed_is_cheaper(1, 1, **v2)
    # T·512·256 + T·S·1088 < S·512·256 + T·S·320 at S = 4000: T < 163.7
    assert absorbed_is_cheaper(163, 4000, **v2) and not absorbed_is_cheaper(164, 4000, **v2)
    assert round((2 * 512 + 64) / (128 + 64 + 128), 2) == 3.4


def test_no_weight_is_the_product_of_two():
    """One V2 layer: W_UV and W_O have 92.3M numbers where their product would have 335.5M."""
    with torch.device("meta"):
        m = MultiHeadLatentAttention(5120, n_h=128, d_h=128, d_r=64, d_v=128, d_c=512, d_cq=1536)
    n = {name: p.numel() for name, p in m.named_parameters()}
    assert n["W_UV.weight"] + n["W_O.weight"] == 92_274_688
    assert n["W_UQ.weight"] + n["W_UK.weight"] == 33_554_432
    assert 512 * 5120 * 128 == 335_544_320 and 1536 * 512 * 128 == 100_663_296
    assert sum(n.values()) == 5120 * (1536 + 512 + 64) + 1536 * 128 * 192 + 512 * 128 * 256 \
        + 128 * 128 * 5120 + 1536 + 512


@BOTH
def test_bf16_stays_near_fp64(attend):
    m, h = module(), loops.normal(15, B, T, D)
    exact = m(h, *tables(0, T))
    low = m.bfloat16()(h.bfloat16(), *tables(0, T), attend)
    assert low.dtype == torch.bfloat16
    rms = (low.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert rms < 0.03


@BOTH
def test_a_ragged_cache_needs_no_positions(attend):
    """Sequences of different cached lengths: the cache knows where the new token of each stands."""
    m, h = module(), loops.normal(3, 2, 5, D)
    cos, sin = tables(0, 5)
    cache = LatentCache(1, 2, 8, SIZES["d_c"], SIZES["d_r"], dtype=torch.float64)
    m(h[:, :4], cos[:4], sin[:4], cache=cache)
    cache.advance([2, 4])                        # the first sequence had two tokens of padding
    at = cache.positions(1)
    u = m(torch.stack((h[0, 2:3], h[1, 4:5])), cos[at], sin[at], attend, cache)
    close(u[0, 0], m(h[:1, :3], cos[:3], sin[:3])[0, 2])
    close(u[1, 0], m(h[1:], cos, sin)[0, 4])


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank addition, as adapters wrap one."""

    def __init__(self, base: torch.nn.Linear, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.drop = base, torch.nn.Dropout(dropout)
        self.A = torch.nn.Parameter(loops.normal(seed, 2, base.in_features))
        self.B = torch.nn.Parameter(loops.normal(seed + 1, base.out_features, 2))

    @property
    def weight(self) -> torch.Tensor:                # the base's alone, as PEFT has it
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.drop(x) @ self.A.T @ self.B.T


@BOTH
@pytest.mark.parametrize("cached", [False, True])
def test_adapters_on_every_linear_layer_count(attend, cached):
    m, merged, h = module(), module(), loops.normal(20, B, T, D)
    for i, name in enumerate([n for n, child in m.named_children()
                              if isinstance(child, torch.nn.Linear)]):
        adapter = Adapter(getattr(m, name), 30 + 2 * i)
        setattr(m, name, adapter)
        with torch.no_grad():
            getattr(merged, name).weight += adapter.B @ adapter.A
    cache = LatentCache(1, B, T, 8, 4, torch.float64) if cached else None
    u = m(h, *tables(0, T), attend, cache)
    close(u, merged(h, *tables(0, T)))
    if not cached:
        u.square().sum().backward()
        for name, p in m.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["W_UK", "W_UV"])
def test_what_cannot_be_absorbed_is_refused(name):
    m, h = module(), loops.normal(20, B, T, D)
    setattr(m, name, torch.nn.Linear(8, getattr(m, name).out_features).double())
    with pytest.raises(ValueError, match="W_UK, W_UV: a layer with a bias"):
        m(h, *tables(0, T))
    m = module()
    setattr(m, name, Adapter(getattr(m, name), 40, dropout=0.1))
    with pytest.raises(ValueError, match="dropout"):
        m(h, *tables(0, T))
    m.eval()(h, *tables(0, T))


def test_a_hook_on_a_layer_counts():
    m, h = module(), loops.normal(20, B, T, D)
    expected = m(h, *tables(0, T))
    m.W_UK.register_forward_hook(lambda layer, x, out: out * 2)
    assert (m(h, *tables(0, T)) - expected).abs().max() > 1e-3
    with torch.no_grad():
        m.W_UK._forward_hooks.clear()
        m.W_UK.weight *= 2
    doubled = m(h, *tables(0, T))
    m.W_UK.weight.data /= 2
    m.W_UK.register_forward_hook(lambda layer, x, out: out * 2)
    close(m(h, *tables(0, T)), doubled)


def test_training_through_the_cache_is_refused():
    m, h = module(), loops.normal(21, B, T, D)
    cache = LatentCache(1, B, T, 8, 4, torch.float64)
    u = m(h, *tables(0, T), cache=cache)
    with pytest.raises(ValueError, match="gradient: asked for through a cache"):
        (u + h).sum().backward()


def test_natural_mistakes_with_a_cache_are_refused():
    m, h = module(), loops.normal(22, B, T, D)
    cache = LatentCache(2, B, 2 * T, 8, 4, torch.float64)
    m(h, *tables(0, T), cache=cache)
    with pytest.raises(ValueError, match="layer: 0 is written a second time"):
        m(h, *tables(0, T), cache=cache)             # the layer's number is forgotten
    with pytest.raises(ValueError, match="layer: 1 is not written"):
        cache.advance()
    with pytest.raises(ValueError, match="cos, sin: shape"):
        m(h, *tables(0, T + 1))
    with pytest.raises(ValueError, match="cos, sin: shape"):
        m(h, *rope_tables(torch.arange(T), rope_frequencies(6)))
    with pytest.raises(ValueError, match="frequencies: torch.bfloat16"):
        rope_tables(torch.arange(T), rope_frequencies(4).bfloat16())
    low = LatentCache(1, B, T, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="rows: torch.float64, expected torch.float32"):
        m(h, *tables(0, T), cache=low)

# SPDX-License-Identifier: MIT
"""MHA, GQA and MQA against equations (1)-(8) taken token by token and head by head."""

import pytest
import torch
from oracles import loops

from dsv2_ref.attention.kv_cache import PerHeadCache
from dsv2_ref.attention.mha import MultiHeadAttention, attend
from dsv2_ref.attention.rope import rope_frequencies, rope_tables

B, T, D, N_H, D_H = 2, 7, 11, 6, 4


def module(n_kv: int | None = None, seed: int = 1) -> MultiHeadAttention:
    return loops.randomize(MultiHeadAttention(D, N_H, D_H, n_kv), seed)


def tables(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(torch.arange(start, stop), rope_frequencies(D_H, 20.0))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("with_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("n_kv", [6, 3, 2, 1])
def test_equals_the_equations(n_kv, with_rope):
    m, h = module(n_kv), loops.normal(2, B, T, D)
    W = [w.weight.tolist() for w in (m.W_Q, m.W_K, m.W_V, m.W_O)]
    freqs = loops.frequencies(D_H, 20.0) if with_rope else None
    expected = [loops.mha(sequence, *W, N_H, n_kv, freqs) for sequence in h.tolist()]
    u = m(h, *tables(0, T)) if with_rope else m(h)
    close(u, torch.tensor(expected, dtype=torch.float64))


def test_shared_keys_are_repeated_keys():
    """GQA is the MHA whose heads of a group have the same key and value weights."""
    gqa, mha = module(2), module(6)
    with torch.no_grad():
        mha.W_Q.weight.copy_(gqa.W_Q.weight)
        mha.W_O.weight.copy_(gqa.W_O.weight)
        for one, every in ((gqa.W_K, mha.W_K), (gqa.W_V, mha.W_V)):
            heads = one.weight.unflatten(0, (2, D_H)).repeat_interleave(3, 0)
            every.weight.copy_(heads.flatten(0, 1))
    h = loops.normal(3, B, T, D)
    close(gqa(h), mha(h))


def test_no_token_sees_the_future():
    m, h = module(3), loops.normal(4, 1, T, D).requires_grad_()
    (grad,) = torch.autograd.grad(m(h)[:, 3].sum(), h)
    assert (grad[:, 4:] == 0).all() and (grad[:, :4] != 0).any(-1).all()


def test_gradients():
    q, k, v = (loops.normal(5 + i, 1, n, 2, d).requires_grad_()
               for i, (n, d) in enumerate([(3, 3), (5, 3), (5, 4)]))
    positions = torch.tensor([[1, 3, 4]])
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 0.7), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 0.7, positions), (q, k, v))


@pytest.mark.parametrize("chunks", [[7], [1, 3, 2, 1], [1] * 7, [5, 2]])
@pytest.mark.parametrize("n_kv", [6, 2, 1])
def test_cached_in_chunks_equals_full(n_kv, chunks):
    m, h = module(n_kv), loops.normal(6, B, T, D)
    cache = PerHeadCache(3, B, T + 2, n_kv, D_H, torch.float64)
    out, start = [], 0
    for n in chunks:
        out += [[m(h[:, start : start + n], *tables(start, start + n), cache, layer)
                 for layer in range(3)][1]]
        cache.advance()
        start += n
    close(torch.cat(out, 1), m(h, *tables(0, T)))


def test_sequences_of_different_lengths():
    """Two prompts of 5 and 3 tokens padded to one batch, then two more tokens for each."""
    m, h = module(2), loops.normal(7, B, T, D)
    cache = PerHeadCache(1, B, T, 2, D_H, torch.float64)
    cache.positions(5, [5, 3])
    m(h[:, :5], *tables(0, 5), cache)
    cache.advance()
    rest = torch.stack((h[0, 5:7], h[1, 3:5]))
    positions = cache.positions(2)
    cos, sin = rope_tables(positions, rope_frequencies(D_H, 20.0))
    u = m(rest, cos, sin, cache, positions=positions)
    full = m(h, *tables(0, T))
    close(u, torch.stack((full[0, 5:7], full[1, 3:5])))


@pytest.mark.parametrize("n_kv", [0, -1, 4, 12])
def test_heads_that_do_not_share_evenly_are_refused(n_kv):
    with pytest.raises(ValueError, match="n_kv"):
        MultiHeadAttention(D, N_H, D_H, n_kv)


def test_training_through_the_cache_is_refused():
    """Old keys and values have no graph: the gradient would be wrong without a word."""
    m, h = module(2), loops.normal(8, B, 2, D)
    cache = PerHeadCache(1, B, T, 2, D_H, torch.float64)
    u = m(h, *tables(0, 2), cache)
    with pytest.raises(ValueError, match="gradient: asked for through a cache"):
        (u + h).sum().backward()


def test_rotations_of_another_length_are_refused():
    with pytest.raises(ValueError, match="cos, sin"):
        module()(loops.normal(8, B, 3, D), *tables(0, 4))

# SPDX-License-Identifier: MIT
"""What a concept file computes, it computes under torch.compile too, gradients included."""

import pytest
import torch
from oracles import loops
from torch import Tensor, nn

from dsv2_ref import model
from dsv2_ref.attention.cache_quant import attend_packed, dequantise, pack, quantise, unpack
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.latent_basis import even_pairs, hadamard, rotate_latent
from dsv2_ref.attention.mha import MultiHeadAttention
from dsv2_ref.attention.mla import MultiHeadLatentAttention, attend_absorbed, attend_expanded
from dsv2_ref.attention.rope import rope_frequencies, rope_tables, rotate
from dsv2_ref.config import TINY
from dsv2_ref.kernels.fp8 import quantise as quantise_fp8
from dsv2_ref.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
)
from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import (
    MixtureOfExperts,
    experts_grouped,
    experts_loop,
    experts_padded,
    of_share,
)
from dsv2_ref.moe.routing import Router, select_device_limited, select_greedy

pytestmark = pytest.mark.filterwarnings("ignore")          # of the compiler about itself
COS, SIN = rope_tables(torch.arange(5), rope_frequencies(4))
H = loops.normal(1, 2, 5, 12)
S = loops.normal(2, 10, 8).softmax(-1)
INDICES = select_device_limited(S, 3, 4, 2)


def mla(h: Tensor) -> Tensor:
    m = loops.randomize(MultiHeadLatentAttention(12, 3, 5, 4, 6, 8, 7), 3)
    cache = LatentCache(1, 2, 5, 8, 4, torch.float64)
    with torch.no_grad():
        cached = m(h, COS, SIN, attend_absorbed, cache)
    return m(h, COS, SIN) + m(h, COS, SIN, attend_absorbed) + cached


def moe(form, share=None):
    m = loops.randomize(MixtureOfExperts(16, 8, 2, 8, share), 4).float()

    def run(x: Tensor) -> Tensor:
        gates = S.gather(-1, INDICES).float()
        return m(x, x, INDICES, gates, form if share is None else of_share(form, share))

    return run


def packed(c: Tensor) -> Tensor:
    n_c, n_r, scales = quantise(c, c[..., :4])
    words = pack(n_c, n_r)
    plain = torch.cat(dequantise(*unpack(words, 16, 4), scales, torch.float64), -1)
    W = loops.normal(7, 2, 5, 16)
    q_c, q_r = loops.normal(8, 2, 1, 2, 5), loops.normal(9, 2, 1, 2, 4)
    return attend_packed(q_c, q_r, words, scales, W, W, 0.3, tile=2).sum() + plain


CASES = {
    "rotate": (lambda x: rotate(x, COS, SIN), loops.normal(5, 2, 5, 3, 8)[..., :4]),
    "mha": (loops.randomize(MultiHeadAttention(12, 6, 4, 2), 6), H),
    "mla": (mla, H),
    "router": (lambda u: loops.randomize(Router(12, 8, 3, 4, 2, 2.0), 7)(u).gates, H.flatten(0, 1)),
    "select": (lambda s: s.gather(-1, select_greedy(s, 2)), S),
    "balance": (lambda s: expert_balance_loss(s[None], INDICES[None], 0.1)
                + device_balance_loss(s[None], INDICES[None], 0.2, 4)
                + communication_balance_loss(s[None], INDICES[None], 0.3, 4, 2), S),
    "dropping": (lambda s: s * keep_within_budget(INDICES, s.gather(-1, INDICES), 8, 4).sum(), S),
    "experts_loop": (moe(experts_loop), loops.normal(8, 10, 16).float()),
    "experts_padded": (moe(experts_padded), loops.normal(8, 10, 16).float()),
    "experts_grouped": (moe(experts_grouped), loops.normal(8, 10, 16).float()),
    "a share of the experts": (moe(experts_padded, range(2, 5)), loops.normal(8, 10, 16).float()),
    "cache_quant": (packed, loops.normal(9, 2, 5, 16)),
    "latent_basis": (lambda W: sum(x.sum() for x in rotate_latent(
        hadamard(8), W, torch.ones(8).double(), W.T, W.T)) + even_pairs(
        W[:4], W, torch.ones(12).double())[0].sum(), loops.normal(10, 8, 12)),
    "fp8": (lambda W: quantise_fp8(W)[1].sum() + 0 * W, loops.normal(11, 130, 140).float()),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_is_the_same(name):
    run, x = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager")
    outputs = []
    for f in (run, compiled):
        leaf = x.clone().requires_grad_(name not in ("cache_quant", "latent_basis", "fp8"))
        if isinstance(run, nn.Module):
            run.zero_grad()
        y = f(leaf)
        if leaf.requires_grad:
            y.square().sum().backward()
        outputs.append((y.detach(), leaf.grad))
    torch._dynamo.reset()
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        if expected is not None:
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_both_attentions_compile_without_a_break():
    """No value is asked of a tensor on the way: one graph."""
    shapes = (2, 1, 3, 5), (2, 1, 3, 4), (2, 7, 8), (2, 7, 4), (3, 5, 8), (3, 6, 8)
    inputs = [loops.normal(20 + i, *shape) for i, shape in enumerate(shapes)]
    for attend in (attend_expanded, attend_absorbed):
        torch._dynamo.reset()
        one = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs, 0.3)
        torch.testing.assert_close(one, attend(*inputs, 0.3), atol=1e-10, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [(), {"tokens": {1: torch.export.Dim("T", min=2, max=64)}}])
def test_a_new_model_is_exported_before_it_ever_ran(length):
    """Nothing of the export is left in the model, and one graph serves every length asked for."""
    model._rope.cache_clear()
    m = loops.randomize(model.DeepSeekV2(TINY), 30).float().eval()
    x = torch.randint(2, TINY.vocab, (2, 20), generator=torch.Generator().manual_seed(31))
    exported = torch.export.export(m, (x,), dynamic_shapes=length or None).module()
    for n in (2, 7, 20) if length else (20,):
        expected = m(x[:, :n])
        assert (exported(x[:, :n]) - expected).abs().max() <= 1e-5 * expected.abs().max()

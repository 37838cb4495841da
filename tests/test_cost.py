# SPDX-License-Identifier: MIT
"""The closed forms of `cost` against live models, live caches and counted arithmetic."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import cost
from dsv2_ref.attention.mla import attend_absorbed, attend_expanded
from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.model import DeepSeekV2

# every size different, so that no two can be exchanged unnoticed
ODD = TINY.with_(
    vocab=97, d=40, n_layers=5, n_h=8, d_h=11, d_r=6, d_v=13, d_c=17, d_cq=23, n_dense=2,
    dense_width=31, n_shared=3, n_routed=12, top_k=2, expert_width=7, tie_embeddings=False,
)
# where FLOPs are counted values are as wide as keys, since padding them is work that torch counts
EVEN = ODD.with_(d_v=ODD.d_h + ODD.d_r, d_c=19)
CONFIGS = {
    "V2": V2, "LITE": LITE, "TINY": TINY, "ODD": ODD, "ODD, plain W_Q": ODD.with_(d_cq=None),
    "ODD, tied": ODD.with_(tie_embeddings=True), "ODD, dense": ODD.with_(n_dense=5),
}


def counted(config):
    """Parameters of a model on the meta device, module by module."""
    with torch.device("meta"):
        model = DeepSeekV2(config)

    def size(*things):
        return sum(p.numel() for thing in things for p in
                   (thing.parameters() if isinstance(thing, nn.Module) else (thing,)))

    norms = size(*(m for m in model.modules() if isinstance(m, nn.RMSNorm)))
    moe = [b for b in model.blocks if config.is_moe(b.layer)]
    dense = [b for b in model.blocks if not config.is_moe(b.layer)]
    latent_norms = size(*(m for b in model.blocks for m in b.attention.modules()
                          if isinstance(m, nn.RMSNorm)))
    experts = [b.experts for b in moe]
    parts = cost.Parameters(
        embedding=size(model.embedding),
        head=0 if config.tie_embeddings else size(model.head),
        attention=size(*(b.attention for b in model.blocks)) - latent_norms,
        dense=size(*(b.ffn for b in dense)),
        shared=size(*(e.shared for e in experts)),
        routed=size(*(W for e in experts for W in (e.W_gate, e.W_up, e.W_down))),
        router=size(*(b.router for b in moe)),
        norms=norms,
    )
    return parts, size(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_every_part_are_those_of_the_live_model(name):
    parts, total = counted(CONFIGS[name])
    assert cost.parameters(CONFIGS[name]) == parts
    assert cost.parameters(CONFIGS[name]).total == total


def test_published_sizes_exactly():
    assert cost.parameters(V2).total == 235_741_434_880
    assert cost.parameters(LITE).total == 15_706_484_224
    assert cost.activated_parameters(LITE) == 2_451_435_008
    assert cost.activated_parameters(V2) == 20_851_512_320
    assert cost.activated_parameters(V2, with_embedding=True) == 21_375_800_320
    assert cost.activated_parameters(LITE, with_embedding=True) == 2_661_150_208


def poisoned(model, parameter, index, tokens):
    """Whether the logits are NaN once this parameter (or one expert of it) is."""
    whole = parameter.detach() if index is None else parameter.detach()[index]
    saved = whole.clone()
    whole.fill_(torch.nan)
    with sdpa_kernel(SDPBackend.MATH):      # the fused one skips the softmax of a single key
        nan = bool(model(tokens).isnan().any())
    whole.copy_(saved)
    return nan


@torch.no_grad()
def test_activated_parameters_are_those_that_can_poison_a_token():
    torch.manual_seed(0)
    model = DeepSeekV2(ODD).eval()
    tokens = torch.tensor([[5]])
    touched = 0
    for name, p in model.named_parameters():
        if name == "embedding.weight":
            continue
        stacked = p.ndim == 3          # routed experts, of which a token reads top_k
        for index in range(len(p)) if stacked else (None,):
            if poisoned(model, p, index, tokens):
                touched += p[index].numel() if stacked else p.numel()
    assert touched == cost.activated_parameters(ODD)
    assert not model(tokens).isnan().any()


def test_a_tied_head_is_passed_through_and_counts_once():
    tied = ODD.with_(tie_embeddings=True)
    table = ODD.vocab * ODD.d
    assert cost.activated_parameters(tied) == cost.activated_parameters(ODD)
    assert cost.activated_parameters(tied, True) == cost.activated_parameters(tied)
    assert cost.activated_parameters(ODD, True) == cost.activated_parameters(ODD) + table


def test_cache_elements_of_the_papers_tables():
    element = cost.cache_elements_per_token
    assert element("MHA", LITE) == 110_592
    assert element("MLA", LITE) == 15_552
    assert element("MHA", V2.with_(n_h=56)) == 860_160
    assert element("MLA", V2) == 34_560
    assert element("MLA", V2) == 2.25 * element("MQA", V2) == 9 / 2 * V2.d_h * V2.n_layers
    assert cost.per_head_elements(n_layers=95, n_kv=8, d_h=128) == 194_560
    assert element("GQA", V2, groups=8) == 2 * 8 * 128 * 60


def test_cache_bytes_of_latent_and_of_expanded_keys():
    for config, latent, expanded in ((V2, 69_120, 4_915_200), (LITE, 31_104, 276_480)):
        assert cost.cache_bytes(cost.cache_elements_per_token("MLA", config)) == latent
        assert cost.cache_bytes(cost.expanded_elements(config)) == expanded
    assert cost.cache_bits(34_560, 6.0) == 207_360
    assert cost.cache_bytes(34_560, 6.0) == 25_920


def test_six_bits_are_a_codes_and_scales_layout():
    assert cost.average_bits(512, 64) == 6.0
    assert cost.average_bits(512, 64, latent_bits=4.0) != 6.0      # forgetting scales and zeros
    assert cost.average_bits(512, 64, rope_bits=4.75) == 4.75      # quantising the RoPE key too


def test_groups_and_kinds_are_checked():
    assert [cost.default_groups(n) for n in (1, 3, 4, 14, 16, 128)] == [1, 1, 2, 2, 4, 32]
    with pytest.raises(ValueError, match="kind: 'mla', expected MHA, GQA, MQA or MLA"):
        cost.cache_elements_per_token("mla", V2)
    with pytest.raises(ValueError, match="groups: 3, expected a divisor of n_h = 128"):
        cost.cache_elements_per_token("GQA", V2, groups=3)


def flops_of(attend, S):
    """FLOPs that torch counts in one layer for one query on S keys."""
    c = EVEN
    q_c, q_r = torch.zeros(1, 1, c.n_h, c.d_h), torch.zeros(1, 1, c.n_h, c.d_r)
    c_kv, k_r = torch.zeros(1, S, c.d_c), torch.zeros(1, S, c.d_r)
    W_UK, W_UV = torch.zeros(c.n_h, c.d_h, c.d_c), torch.zeros(c.n_h, c.d_v, c.d_c)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attend(q_c, q_r, c_kv, k_r, W_UK, W_UV, 1.0)
    return counter.get_total_flops()


def test_flops_a_pair_are_those_that_torch_counts():
    absorbed = flops_of(attend_absorbed, 10) - flops_of(attend_absorbed, 9)
    assert absorbed * EVEN.n_layers == cost.pair_flops_absorbed(EVEN)
    expanded = flops_of(attend_expanded, 10) - flops_of(attend_expanded, 9)
    expansion = 2 * EVEN.d_c * EVEN.n_h * (EVEN.d_h + EVEN.d_v)        # of the one key more
    assert (expanded - expansion) * EVEN.n_layers == cost.pair_flops_expanded(EVEN)
    ratio = cost.pair_flops_absorbed(V2) / cost.pair_flops_expanded(V2)
    assert ratio == (512 + 512 + 64) / (192 + 128)


def test_forward_flops_of_one_token_are_those_that_torch_counts():
    model = DeepSeekV2(EVEN).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.tensor([[5]]))
    norms = cost.parameters(EVEN).norms                             # the rule's only simplification
    assert counter.get_total_flops() == cost.forward_flops_per_token(EVEN, context=1) - 2 * norms


def test_forward_flops_grow_with_the_context():
    flops = cost.forward_flops_per_token
    assert flops(V2) == 2 * cost.activated_parameters(V2)
    assert flops(V2, 4096) - flops(V2) == 4096 * 2 * 60 * 128 * 320
    absorbed = flops(V2, 4096, cost.pair_flops_absorbed)
    assert absorbed - flops(V2) == 4096 * 2 * 60 * 128 * 1088


def test_training_flops_count_each_causal_pair_three_times():
    flops = cost.causal_training_flops
    assert flops(V2, 1) == 3 * cost.forward_flops_per_token(V2, 1)
    of_sequence = sum(3 * cost.forward_flops_per_token(EVEN, context) for context in range(1, 8))
    assert 7 * flops(EVEN, 7) == of_sequence
    model = DeepSeekV2(EVEN.with_(drop_capacity=None)).train()
    tokens = torch.tensor([[5]])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.losses(tokens, tokens).total.backward()
    norms = cost.parameters(EVEN).norms
    assert counter.get_total_flops() == flops(EVEN, 1) - 6 * norms


def test_implied_tflops_of_the_published_hours():
    flops = cost.training_flops(cost.activated_parameters(V2), 1e12)
    assert flops == 6 * 20_851_512_320 * 1e12
    rate = cost.implied_tflops(flops, 172.8e3)
    assert rate == pytest.approx(201.114, abs=1e-3)
    assert cost.implied_tflops(cost.training_flops(67e9, 1e12), 300.6e3) == pytest.approx(
        371.479, abs=1e-3)

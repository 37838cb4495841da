# SPDX-License-Identifier: MIT
"""The plan of one device against models that are built, and autograd."""

from dataclasses import replace

import pytest
import torch
from refusals import refused
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv2_ref import cost
from dsv2_ref.attention.mla import attend_expanded
from dsv2_ref.block import Block, Pass
from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.forms import Forms
from dsv2_ref.moe.experts import experts_loop
from dsv2_ref.moe.routing import select_device_limited
from dsv2_ref.parallel import plan
from dsv2_ref.parallel.plan import Bytes
from dsv2_ref.parallel.split import Layout, layout_of, split, work
from dsv2_ref.parallel.stages import Stages

# every size different; values as wide as keys, or they would be padded for the tiles of attention
ODD = TINY.with_(
    vocab=97, d=40, n_layers=7, n_h=4, d_h=11, d_r=6, d_v=17, d_c=19, d_cq=23, n_dense=2,
    dense_width=31, n_shared=3, n_routed=12, top_k=2, expert_width=7, n_devices=4, max_devices=2,
    drop_capacity=None, tie_embeddings=False,
)
TIED = ODD.with_(tie_embeddings=True)
PLAIN = ODD.with_(d_cq=None)
PAPERS = layout_of(2048, 8, 16, "zb-h1", zero1=True)
SPLITS = [[range(0, 7)], [range(0, 1), range(1, 7)], [range(0, 3), range(3, 5), range(5, 7)]]


def built(config, layers, held):
    """Numbers of a rank's experts, and of all else, in the weights that are really made."""
    with torch.device("meta"):
        stage = Stages(config, [layers], held)
    experts = sum(p.numel() for name, p in stage.named_parameters() if ".experts.W_" in name)
    return experts, sum(p.numel() for p in stage.parameters()) - experts


@pytest.mark.parametrize("config", [ODD, TIED, PLAIN], ids=["odd", "tied", "plain"])
@pytest.mark.parametrize("ranges", SPLITS, ids=len)
@pytest.mark.parametrize("ep", [1, 3])
def test_a_rank_holds_what_is_built(config, ranges, ep):
    lay, held = Layout(len(ranges), 5, ep, zero1=True), config.n_routed // ep
    planned = plan.memory(config, lay, 8, ranges=ranges, size=Bytes(2, 4, 12, 2))
    for layers, memory in zip(ranges, planned, strict=True):
        p = plan.part(config, layers)
        for rank in range(ep):
            experts, others = built(config, layers, range(rank * held, (rank + 1) * held))
            assert (p.routed // ep, p.total - p.routed) == (experts, others)
        assert memory.weights == 2 * (experts + others) == memory.gradients // 2
        # numbers dealt out one after another to those that have a copy: experts to dp ranks, all
        # else to dp·ep
        most = len(range(experts)[::5]) + len(range(others)[:: 5 * ep])
        assert memory.optimizer == 12 * most
    whole = sum(plan.part(config, layers).total for layers in ranges)
    twice = config.vocab * config.d if config is TIED and len(ranges) > 1 else 0
    assert whole == cost.parameters(config).total + twice


def test_flops_of_all_stages_are_those_of_the_model():
    for config in (ODD, TIED, V2, LITE):
        ranges = split(config, 3)
        flops = [plan.forward_flops(config, layers, 9) for layers in ranges]
        products = sum(f["linear"] + f["experts"] for f in flops)
        norms = cost.parameters(config).norms          # which cost counts as products
        assert products == cost.forward_flops_per_token(config) - 2 * norms
        assert sum(f["attention"] for f in flops) == cost.pair_flops_expanded(config) * 5
        for layers, f in zip(ranges, flops, strict=True):       # what `split` makes even
            norms = plan.part(config, layers).norms
            assert sum(f.values()) + 2 * norms == work(config, layers, 9).F


@pytest.mark.parametrize("config", [ODD, PLAIN], ids=["odd", "plain"])
def test_what_is_computed_again_is_those_matrices(config):
    layers = range(1, 4)
    attention = [Block(config, i).attention for i in layers]
    up = sum(p.numel() for a in attention for m in (a.W_UQ, a.W_QR, a.W_UK, a.W_UV, a.W_KR)
             for p in m.parameters())
    latents = sum(p.numel() for a in attention for m in (a.W_DQ, a.W_DKV) for p in m.parameters())
    whole = plan.forward_flops(config, layers)
    assert plan.again_flops(config, layers, "nothing") == dict.fromkeys(whole, 0)
    assert plan.again_flops(config, layers, "part") == {"linear": 2 * up, "experts": 0,
                                                        "attention": 0}
    assert plan.again_flops(config, layers, "more") == {
        "linear": 2 * (up + latents), "experts": 0, "attention": whole["attention"]}
    assert plan.again_flops(config, layers, "all") == whole


def kept_by_autograd(config, layer, B, T):
    """fp64 numbers that autograd keeps of a block, each storage once, weights and tables aside."""
    torch.manual_seed(0)
    block = Block(config, layer).double()
    tables = torch.zeros(2, T, config.d_r // 2, dtype=torch.float64)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), tables)}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            seen[storage.data_ptr()] = storage.nbytes() // 8, tensor     # held: no address twice
        return tensor

    forms = Forms(attend_expanded, select_device_limited, experts_loop)
    h = torch.randn(B, T, config.d, dtype=torch.float64, requires_grad=True)
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
          sdpa_kernel(SDPBackend.FLASH_ATTENTION)):
        block(h, Pass(*tables, forms))
    return sum(n for n, _ in seen.values())


@pytest.mark.parametrize("config", [ODD, PLAIN], ids=["odd", "plain"])
@pytest.mark.parametrize("layer", [0, 3], ids=["dense", "experts"])
def test_kept_numbers_are_those_that_autograd_keeps(config, layer):
    T, kept = 64, plan.kept(config, layer)
    grown = kept_by_autograd(config, layer, 2, T) - kept_by_autograd(config, layer, 1, T)
    # what kernels need not keep: the norms on a CPU are made of pieces, and keep what they read
    # over its size, and one over that size; a sum over slots keeps its summands
    pieces = kept["norms"] + (3 if config.d_cq is None else 4)
    assert grown == T * (sum(kept.values()) + pieces + kept["outputs"])
    assert sum(kept.values()) == plan.kept_numbers(config, layer)


def test_less_is_kept_the_more_is_computed_again():
    for config in (ODD, V2):
        kept = [plan.kept_numbers(config, 3, again) for again in plan.AGAIN]
        assert list(plan.AGAIN) == ["nothing", "part", "more", "all"]
        assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
        assert kept[-1] == config.d
    # by hand: stream, both latents, o and its sums, gate and up of 2 shared and 6 routed experts,
    # the rows of three devices, gates and affinities
    assert plan.kept_numbers(V2, 1, "part") == (
        2 * 5120 + 1536 + 512 + 128 * 128 + 128 + 2 * 8 * 1536 + 3 * 5120 + 6 + 160)
    assert plan.kept_numbers(V2, 1, "part", reach=2) == plan.kept_numbers(V2, 1, "part") - 5120


def test_v2_fits_because_a_part_is_computed_again():
    def fullest(lay=PAPERS, **changes):
        return max(m.total for m in plan.memory(V2, lay, 72, **changes)) / 1e9

    assert fullest() == pytest.approx(54.9, abs=0.05)
    assert fullest(again="nothing") == pytest.approx(131.5, abs=0.05)
    # zero bubbles do not fit, nor do two sequences
    assert fullest(replace(PAPERS, schedule="zb-h2")) == pytest.approx(88.8, abs=0.05)
    assert fullest(tokens=2 * 4096) > 80
    assert plan.CARD == 80e9


def test_what_one_changed_assumption_does():
    changes = plan.changes(V2, PAPERS, 72)
    assert {name for name, size in changes.items() if size > plan.CARD} == {
        "nothing computed again", "ZB-H2, without bubbles", "two sequences in a micro-batch",
        "no ZeRO-1"}
    # by hand: experts in 16, the rest in 128; without, the embedding makes the first the fullest
    p, planned = plan.part(V2, range(0, 4)), plan.memory(V2, PAPERS, 72)
    spared = 12 * (p.routed // 8 * 15 // 16 + (p.total - p.routed) * 127 // 128)
    assert changes["no ZeRO-1"] - planned[0].total == pytest.approx(spared, abs=24)
    p = plan.part(V2, range(10, 14))
    experts, others = p.routed // 8, p.total - p.routed
    assert changes["as planned"] == planned[3].total
    assert changes["as planned"] - changes["gradients in bf16"] == 2 * (experts + others)
    assert changes["no replicas"] - changes["as planned"] == pytest.approx(
        12 * (experts * 15 // 16 + others // 8 - others // 128), abs=24)


def test_each_stage_keeps_what_its_schedule_starts():
    numbers = [sum(plan.kept_numbers(V2, i, "part") for i in layers) for layers in split(V2, 16)]
    held = {"1f1b": range(16, 0, -1), "zb-h1": [16] * 16, "zb-h2": [31] * 16}
    for schedule, n in held.items():
        kept = [m.kept for m in plan.memory(V2, replace(PAPERS, schedule=schedule), 72)]
        assert kept == [2 * 4096 * a * b for a, b in zip(n, numbers, strict=True)]
    few = plan.memory(V2, PAPERS, 3)                       # more are not there
    assert [m.kept for m in few] == [2 * 4096 * 3 * n for n in numbers]


def test_a_pipeline_divides_weights_but_no_activations():
    """Half as many stages have twice the layers, for half as many micro-batches."""
    config = ODD.with_(n_layers=8, n_dense=0)
    few, many = (
        plan.memory(config, Layout(pp, 3, 2, "zb-h1"), 99,
                    ranges=[range(i, i + 8 // pp) for i in range(0, 8, 8 // pp)])[1]
        for pp in (4, 8))
    assert few.kept == many.kept and few.weights == 2 * many.weights


def test_replicas_divide_the_optimizer_alone():
    one, many = (plan.memory(V2, replace(PAPERS, dp=dp), 72)[5] for dp in (1, 512))
    assert vars(one) | {"optimizer": 0} == vars(many) | {"optimizer": 0}
    assert one.optimizer / many.optimizer == pytest.approx(512, rel=1e-3)


def test_the_last_stage_has_the_logits():
    *others, last = plan.memory(V2, PAPERS, 72, again="nothing")
    assert last.working == 4096 * 102_400 * 4 and not any(m.working for m in others)


def test_bad_input_is_refused_in_one_line():
    refused(lambda: plan.memory(V2, Layout(pp=16, ep=7), 72), "ep: 7", "the 160 routed experts")
    refused(lambda: plan.memory(V2, Layout(pp=61), 72), "stages: 61 of 60 layers")
    refused(lambda: plan.memory(V2, Layout(schedule="dualpipe"), 72), "schedule: 'dualpipe'")
    refused(lambda: plan.part(V2, range(3, 61)), "layers: range(3, 61)", "range(0, 60)")
    refused(lambda: plan.kept_numbers(V2, 1, "some"), "again: 'some'", "nothing, part, more, all")
    refused(lambda: plan.again_flops(V2, range(0, 1), "some"), "again: 'some'")

# SPDX-License-Identifier: MIT
"""The plan of one device against models that are built, schedules that are run, and autograd."""

from itertools import combinations

import pytest
import torch
from by_hand import most_in_flight
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
from dsv2_ref.parallel.plan import Bytes, Layout
from dsv2_ref.parallel.stages import Stages

# every size different; values as wide as keys, or they would be padded for the tiles of attention
ODD = TINY.with_(
    vocab=97, d=40, n_layers=7, n_h=4, d_h=11, d_r=6, d_v=17, d_c=19, d_cq=23, n_dense=2,
    dense_width=31, n_shared=3, n_routed=12, top_k=2, expert_width=7, n_devices=4, max_devices=2,
    drop_capacity=None, tie_embeddings=False,
)
TIED = ODD.with_(tie_embeddings=True)
PLAIN = ODD.with_(d_cq=None)
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
    lay, held = Layout(len(ranges), ep, 5), config.n_routed // ep
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


def all_splits(n, pp):
    for ends in combinations(range(1, n), pp - 1):
        yield [range(a, b) for a, b in zip((0, *ends), (*ends, n), strict=True)]


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("vocab", [5, 97, 900, 9000])
def test_no_split_has_a_smaller_fullest_stage(pp, vocab):
    config = ODD.with_(vocab=vocab, n_dense=0)         # layers alike, as V2's are

    def slowest(ranges):
        return max(plan.work(config, layers) for layers in ranges)

    ranges = plan.split(config, pp)
    assert [i for layers in ranges for i in layers] == list(range(7))
    assert len(ranges) == pp and all(len(layers) for layers in ranges)
    assert slowest(ranges) == pytest.approx(min(map(slowest, all_splits(7, pp))), rel=1e-12)


def test_v2s_sixty_layers_in_sixteen_stages():
    ranges = plan.split(V2, 16)
    assert [len(layers) for layers in ranges] == [3, 3, *[4] * 13, 2]
    works = [plan.work(V2, layers) for layers in ranges]
    dense, moe = (plan.work(V2, range(i, i + 1)) for i in (0, 1))
    assert dense == pytest.approx(moe, rel=0.002)      # what `split` takes for equal
    head = plan.work(V2, range(59, 60)) - moe
    assert head / moe == pytest.approx(1.24, abs=0.01)
    assert max(works) / (sum(works) / 16) == pytest.approx(1.045, abs=0.001)
    even = [range(i * 60 // 16, (i + 1) * 60 // 16) for i in range(16)]      # the head forgotten
    assert max(plan.work(V2, layers) for layers in even) > 1.2 * max(works)


def test_flops_of_all_stages_are_those_of_the_model():
    for config in (ODD, TIED, V2, LITE):
        flops = [plan.forward_flops(config, layers, 9) for layers in plan.split(config, 3)]
        products = sum(f["linear"] + f["experts"] for f in flops)
        norms = cost.parameters(config).norms          # which cost counts as products
        assert products == cost.forward_flops_per_token(config) - 2 * norms
        assert sum(f["attention"] for f in flops) == cost.pair_flops_expanded(config) * 5
        works = sum(plan.work(config, layers, 9) for layers in plan.split(config, 3))
        assert works == cost.causal_training_flops(config, 9) - 6 * norms


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


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [1, 2, 4, 7, 20])
def test_micro_batches_in_flight_are_those_of_the_schedule(schedule, pp, m):
    for stage in range(pp):
        assert plan.in_flight(schedule, pp, stage, m) == most_in_flight(schedule, pp, stage, m)


def test_v2_fits_because_a_part_is_computed_again():
    lay = plan.layout(2048)
    assert lay == Layout(16, 8, 16) and lay.devices == 2048 and lay.rows == 128

    def fullest(**changes):
        return max(m.total for m in plan.memory(V2, lay, 72, **changes)) / 1e9

    assert fullest() == pytest.approx(54.9, abs=0.05)
    assert fullest(again="nothing") == pytest.approx(131.5, abs=0.05)
    assert fullest(schedule="zb-h2") == pytest.approx(88.8, abs=0.05)      # zero bubbles do not fit
    assert fullest(tokens=2 * 4096) > 80                                   # nor two sequences
    assert plan.CARD == 80e9


def test_what_one_changed_assumption_does():
    lay = plan.layout(2048)
    changes = plan.changes(V2, lay, 72)
    assert {name for name, size in changes.items() if size > plan.CARD} == {
        "nothing computed again", "ZB-H2, without bubbles", "two sequences in a micro-batch",
        "no ZeRO-1"}
    # by hand, of a stage of four layers: 1.89B of experts and 0.79B of the rest, in 16 and 128
    p = plan.part(V2, range(6, 10))
    experts, others = p.routed // 8, p.total - p.routed
    spared = 12 * (experts * 15 // 16 + others * 127 // 128)
    assert changes["no ZeRO-1"] - changes["as planned"] == pytest.approx(spared, abs=24)
    assert changes["as planned"] - changes["gradients in bf16"] == 2 * (experts + others)
    assert changes["no replicas"] - changes["as planned"] == pytest.approx(
        12 * (experts * 15 // 16 + others // 8 - others // 128), abs=24)


def test_a_pipeline_divides_weights_but_no_activations():
    """Half as many stages have twice the layers, for half as many micro-batches."""
    config = ODD.with_(n_layers=8, n_dense=0)
    few, many = (
        plan.memory(config, Layout(pp, 2, 3), 99,
                    ranges=[range(i, i + 8 // pp) for i in range(0, 8, 8 // pp)])[1]
        for pp in (4, 8))
    assert few.kept == many.kept and few.weights == 2 * many.weights


def test_replicas_divide_the_optimizer_alone():
    one, many = (plan.memory(V2, Layout(16, 8, dp), 72)[5] for dp in (1, 512))
    assert vars(one) | {"optimizer": 0} == vars(many) | {"optimizer": 0}
    assert one.optimizer / many.optimizer == pytest.approx(512, rel=1e-3)


def test_the_last_stage_has_the_logits():
    *others, last = plan.memory(V2, plan.layout(2048), 72, again="nothing")
    assert last.working == 4096 * 102_400 * 4 and not any(m.working for m in others)


def test_bad_input_is_refused_in_one_line():
    refused(lambda: plan.layout(2000), "devices: 2000", "multiple of pp · ep = 128")
    refused(lambda: plan.layout(0), "devices: 0")
    refused(lambda: Layout(0, 1, 1), "pp: 0", "1 or more")
    refused(lambda: plan.memory(V2, Layout(16, 7, 1), 72), "ep: 7", "divisor of n_routed = 160")
    refused(lambda: plan.split(V2, 61), "pp: 61", "at most n_layers = 60")
    refused(lambda: plan.part(V2, range(3, 61)), "layers: range(3, 61)", "range(0, 60)")
    refused(lambda: plan.kept_numbers(V2, 1, "some"), "again: 'some'", "nothing, part, more, all")
    refused(lambda: plan.again_flops(V2, range(0, 1), "some"), "again: 'some'")
    refused(lambda: plan.in_flight("dualpipe", 2, 0, 4), "schedule: 'dualpipe'", "zb-h2")

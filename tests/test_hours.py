# SPDX-License-Identifier: MIT
"""Hours on paper: bytes against routed tokens and messages counted one by one, sums by hand."""

from dataclasses import fields, replace

import pytest
import torch
from refusals import refused

from dsv2_ref import cost, paper
from dsv2_ref.config import TINY, V2
from dsv2_ref.moe.balance import device_reach
from dsv2_ref.moe.routing import select_device_limited, select_greedy
from dsv2_ref.parallel import hours, plan
from dsv2_ref.parallel.hours import Assumptions
from dsv2_ref.parallel.split import Layout, split, work

MIDDLE = Assumptions()
# nothing but products, at the peak
PERFECT = Assumptions(linear=1, experts=1, attention=1, other=0, fullest=1, nvlink=1e9, ib=1e9,
                      hidden=1, again="nothing", schedule="zb-h2", zero=1, devices=128, lost=0)
SMALL = TINY.with_(n_layers=5, n_dense=1, n_routed=12, top_k=3, n_devices=4, max_devices=2)


def rows_that_leave(indices, n_routed, ep):
    """Rows that each token sends to other ranks, the mean over all ranks that it may live on."""
    reach = device_reach(indices[None], n_routed, ep)[0]
    sent = 0
    for home in range(ep):
        for devices in reach.tolist():
            sent += sum(used and device != home for device, used in enumerate(devices))
    return sent / (ep * len(indices))


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_rows_sent_are_those_of_routed_tokens(limit):
    s = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    config = SMALL.with_(max_devices=limit, top_k=3)
    if limit is None:
        indices = select_greedy(s, 3)
    else:
        indices = select_device_limited(s, 3, 4, limit)
    counted = rows_that_leave(indices, 12, 4)
    reach = device_reach(indices[None], 12, 4).sum(-1).float().mean().item()
    assert hours.rows_sent(config, 4, reach) == pytest.approx(counted, rel=1e-6)
    assert counted <= hours.rows_sent(config, 4) == min(limit or 4, 3) * 3 / 4
    if limit == 1:
        assert counted == hours.rows_sent(config, 4)
    # once a slot instead of once a device: more, unless each slot has a device of its own
    slots = (indices // 3)[:, :, None] != torch.arange(4)
    assert slots.sum().item() / (4 * 200) == pytest.approx(3 * 3 / 4) and counted <= 9 / 4


def test_bytes_exchanged_are_those_of_the_tensors_sent():
    s = torch.rand(50, 12, generator=torch.Generator().manual_seed(1))
    indices = select_device_limited(s, 3, 4, 2)
    x = torch.zeros(50, SMALL.d, dtype=torch.bfloat16)
    reach = device_reach(indices[None], 12, 4)[0]
    sent = 0
    for home in range(4):                                  # 50 tokens on each of four ranks
        for device in range(4):
            if device != home:
                there = x[reach[:, device]]                # dispatched, and as much comes back
                sent += 2 * there.nbytes
    mean = reach.sum(-1).float().mean().item()
    assert 4 * hours.exchange_bytes(SMALL, 4, 50, mean) == pytest.approx(sent, rel=1e-6)
    assert hours.exchange_bytes(V2, 8, 1) == 2 * 3 * 7 / 8 * 5120 * 2
    assert hours.exchange_bytes(V2, 1, 1) == 0


def ring_bytes(n, numbers, each):
    """Bytes that one of n ranks sends in a ring: n - 1 pieces of a reduce-scatter, or a gather."""
    return sum(numbers / n * each for _ in range(n - 1))


def test_zero_bytes_are_those_of_rings_in_the_node_and_between_nodes():
    lay, size, layers = Layout(pp=2, dp=3, ep=4), plan.Bytes(), range(0, 3)
    p = plan.part(SMALL, layers)
    experts, others = p.routed / 4, p.total - p.routed
    inside = outside = 0.0
    for each in (size.gradient, size.weight):              # reduced and scattered, then gathered
        inside += ring_bytes(4, others, each)
        outside += ring_bytes(3, others / 4, each) + ring_bytes(3, experts, each)
    assert hours.zero_bytes(SMALL, layers, lay, size) == pytest.approx((inside, outside))
    alone = hours.zero_bytes(SMALL, layers, Layout(pp=2), size)
    assert alone == (0, 0)


def test_at_the_peak_hours_are_flops_alone():
    """One stage, no rows sent: 3 forward passes' worth over 989 TFLOP/s."""
    step = hours.step(V2, replace(PERFECT, devices=8), pp=1)
    flops = cost.causal_training_flops(V2, 4096) - 6 * cost.parameters(V2).norms
    assert step.hours == pytest.approx(1e12 * flops / 989e12 / 3600, rel=1e-9)
    assert cost.implied_tflops(1e12 * flops, step.hours) == pytest.approx(989)
    # sixteen: everyone waits for the fullest stage, and once for the pipeline to fill and drain
    sixteen = hours.step(V2, PERFECT)
    works = [sum(work(V2, layers)) for layers in split(V2, 16)]
    busy = sixteen.seconds - sixteen.parts["idle"]
    assert busy / step.seconds * 128 / 8 == pytest.approx(max(works) / (sum(works) / 16), rel=1e-4)
    assert sixteen.parts["uneven"] / busy == pytest.approx(0.043, abs=1e-3)


def test_a_stage_by_hand():
    """Four layers of V2 on 4,096 tokens in the middle of all assumptions."""
    work = hours.stage_time(V2, range(6, 10), 8, MIDDLE)
    matrices = 5120 * 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 * 128 * 256 + 128 * 128 * 5120
    linear = 4096 * 4 * 2 * (matrices + 2 * 3 * 5120 * 1536 + 160 * 5120) / (989e12 * 0.70)
    experts = 4096 * 4 * 2 * 6 * 3 * 5120 * 1536 * 1.05 / (989e12 * 0.40)
    scores = 4096 * 4 * 2 * 128 * 320 * 2048.5 / (989e12 * 0.35)
    up = 4096 * 4 * 2 * (1536 * 128 * 192 + 512 * 128 * 256 + 5120 * 64) / (989e12 * 0.70)
    wait = (4 * 2 * 4096 * 3 * 7 / 8 * 5120 * 2 * 1.05 / 160e9
            - 0.8 * 4 * 4096 * 2 * 2 * 3 * 5120 * 1536 / (989e12 * 0.70))
    assert work.F == pytest.approx(1.2 * (linear + experts + scores) + wait)
    assert work.I == pytest.approx(1.2 * (linear + experts + 2 * scores + up) + wait)
    assert work.W == pytest.approx(1.2 * (linear + experts))
    assert work.products + work.other + work.again + work.exchange == pytest.approx(work.total)
    assert 0 < wait == pytest.approx(work.exchange / 2)
    # all again: the forward pass once more, with its traffic
    whole = hours.stage_time(V2, range(6, 10), 8, replace(MIDDLE, again="all"))
    assert whole.I == pytest.approx(1.2 * (linear + experts + 2 * scores) + wait
                                           + whole.F)
    assert whole.products + whole.other + whole.again + whole.exchange == pytest.approx(whole.total)
    # rows that the shared experts hide altogether; and a group larger than a node
    assert hours.stage_time(V2, range(6, 10), 8, replace(MIDDLE, nvlink=1e6)).exchange == 0
    twice = V2.with_(n_devices=16)
    assert hours.stage_time(twice, range(6, 10), 16, MIDDLE).exchange > 4 * work.exchange


def test_a_step_is_the_sum_of_its_parts():
    step = hours.step(V2)
    assert step.micro_batches == 72 and list(step.parts) == [
        "products", "other", "again", "exchange", "uneven", "idle", "zero", "lost"]
    slowest = max((hours.stage_time(V2, layers, 8, MIDDLE) for layers in split(V2, 16)),
                  key=lambda w: w.total)
    idle = step.parts["idle"]
    assert step.seconds * 0.97 == pytest.approx(72 * slowest.total + idle + step.parts["zero"])
    # ZB-H1's law, were all stages as slow as the slowest; three are faster
    bound = 15 * (slowest.F + slowest.I - slowest.W)
    assert 0.85 * bound < idle < bound
    alike = hours.step(V2.with_(n_layers=64, n_dense=0, vocab=1, bos=None, eos=None),
                       ranges=[range(i, i + 4) for i in range(0, 64, 4)])
    one = hours.stage_time(V2, range(6, 10), 8, MIDDLE)
    assert alike.parts["idle"] == pytest.approx(15 * (one.F + one.I - one.W), rel=1e-4)
    assert alike.parts["uneven"] == pytest.approx(0, abs=1e-3)
    inside, outside = hours.zero_bytes(V2, range(10, 14), step.layout, plan.Bytes())
    assert step.parts["zero"] == pytest.approx(0.5 * (inside / 160e9 + outside / 40e9))
    assert step.hours == pytest.approx(step.seconds / (9216 * 4096) * 1e12 * 2048 / 3600)


def test_what_a_stage_sends_to_the_next_is_a_millisecond():
    """What the file leaves out."""
    sent = 4096 * 5120 * 2
    assert sent == pytest.approx(42e6, rel=0.01) and sent / 40e9 == pytest.approx(1e-3, rel=0.1)
    work = hours.stage_time(V2, range(6, 10), 8, MIDDLE)
    assert work.total == pytest.approx(0.117, abs=0.002)


def test_without_bubbles_stages_end_one_after_the_other():
    """Equal stages, F = I = W: ZB-H2 has nothing to wait for, ZB-H1 a third of 1F1B's."""
    config = V2.with_(n_layers=16, n_dense=0, n_h=1, d_h=1, d_v=1, d_r=2, vocab=1, bos=None,
                      eos=None)
    assumed = replace(PERFECT, attention=1e9, devices=2048)
    idle = {}
    for schedule in ("zb-h2", "zb-h1", "1f1b"):
        step = hours.step(config, replace(assumed, schedule=schedule))
        idle[schedule] = step.parts["idle"] / (step.parts["products"] / step.micro_batches)
    assert idle == pytest.approx({"zb-h2": 0, "zb-h1": 5, "1f1b": 15}, abs=1e-3)


def test_another_split_may_be_given():
    even = [range(i * 60 // 16, (i + 1) * 60 // 16) for i in range(16)]
    assert hours.step(V2, ranges=even).hours > 1.15 * hours.step(V2).hours


def test_each_row_goes_from_better_to_worse():
    rows = hours.sensitivity(V2)
    assert {row.name for row, _, _ in rows} == {f.name for f in fields(Assumptions)}
    middle = hours.step(V2).hours
    assert all(best <= middle <= worst and best < worst for _, best, worst in rows)
    spans = [worst - best for _, best, worst in rows]
    assert spans == sorted(spans, reverse=True)
    best, worst = hours.extremes(V2)
    assert best < min(b for _, b, _ in rows) and worst > max(w for _, _, w in rows)
    assert rows[0][0].name == "experts"


def test_the_papers_hours_lie_between_the_extremes():
    best, worst = hours.extremes(V2)
    values = [best, hours.step(V2).hours, paper.HOURS, worst]
    assert [round(v / 1e3) for v in values] == [92, 148, 173, 390]


def test_what_the_papers_hours_imply():
    """Arithmetic alone: shares of the peak, and the saving if both models reached the same one."""
    peak = paper.HOURS * 3600 * hours.PEAK
    rule = 1e12 * 6 * cost.activated_parameters(V2) / peak
    scores = 1e12 * cost.causal_training_flops(V2, 4096) / peak
    dense = 1e12 * 6 * paper.DENSE_N / (paper.DENSE_HOURS * 3600 * hours.PEAK)
    assert [round(100 * share, 1) for share in (rule, scores, dense)] == [20.3, 25.2, 37.6]
    at_the_same = paper.HOURS * rule / dense
    assert 1 - at_the_same / paper.DENSE_HOURS == pytest.approx(0.69, abs=0.005)


def test_growth_breaks_at_the_batch():
    sizes = [128, 2048, 16384, 65536]
    kept, grown = hours.growth(V2, sizes), hours.growth(V2, sizes, grown=True)
    assert [s.micro_batches for s in kept] == [1152, 72, 9, 3]      # 2.25 sequences each: three
    assert [s.batch for s in grown] == [576, 9216, 73_728, 294_912]
    assert {s.micro_batches for s in grown} == {72}
    idle = [s.parts["idle"] / s.seconds for s in kept]
    assert idle == sorted(idle) and idle[0] < 0.01 and idle[-1] > 2 / 3
    # what a device sends for its experts does not grow with the cluster, nor does ZeRO-1's ring
    exchange = {round(s.parts["exchange"] / s.micro_batches, 12) for s in (*kept, *grown)}
    assert len(exchange) == 1
    ring = [sum(hours.zero_bytes(V2, range(6, 10), s.layout, plan.Bytes())) for s in kept]
    assert ring == sorted(ring) and ring[-1] / ring[1] < 1.07
    assert grown[-1].hours / grown[1].hours == pytest.approx(1, abs=0.01)
    assert kept[-1].hours / kept[1].hours == pytest.approx(5.8, abs=0.1)


def test_bad_input_is_refused_in_one_line():
    refused(lambda: hours.step(V2, replace(MIDDLE, devices=1000)), "ep x pp: 8 x 16", "1000 ranks")
    refused(lambda: hours.step(V2, batch=100), "batch: 100 sequences", "128 ranks")
    refused(lambda: hours.step(V2, replace(MIDDLE, again="some")), "again: 'some'")
    refused(lambda: hours.step(V2, replace(MIDDLE, schedule="zbv")), "schedule: 'zbv'")
    refused(lambda: hours.rows_sent(V2, 7), "ep: 7", "the 160 routed experts")

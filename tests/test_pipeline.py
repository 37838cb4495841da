# SPDX-License-Identifier: MIT
"""Pipelines on gloo ranks against one process: losses, gradients, weights, order of work."""

import functools
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from refusals import refused

from dsv2_ref.block import Block
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.parallel import demo_pipeline, local, pipeline
from dsv2_ref.parallel.pipeline import Pipeline, sum_tied_gradient, torch_order
from dsv2_ref.parallel.schedule import SCHEDULES, n_stages, order
from dsv2_ref.parallel.split import Layout, ranges_of, split
from dsv2_ref.parallel.stages import Stages
from dsv2_ref.training.objective import Batch, pretraining
from dsv2_ref.training.world import World

SMALL = TINY.with_(vocab=37, d=16, n_h=2, d_h=6, d_r=4, d_v=5, d_c=10, d_cq=12, dense_width=20,
                   n_routed=6, top_k=2, expert_width=7, n_devices=3, max_devices=2, init_std=0.3)
CONFIGS = {"tied": SMALL.with_(n_layers=5), "untied": SMALL.with_(n_layers=9, tie_embeddings=False)}
T, ROWS, STEPS = 5, 2, {"tied": 2, "untied": 1}
UNEVEN = {1: [5], 2: [2, 3], 4: [1, 2, 1, 1]}            # layers of each stage, where not `split`


def seeded(config):
    torch.manual_seed(1)
    return DeepSeekV2(config).double().train()


def micro_batches(config, m, step=0, with_load=False):
    """m of them; rows that count as many tokens as they have, and one that counts fewer."""
    g = torch.Generator().manual_seed(step)
    parts = []
    for i in range(m):
        ids = torch.randint(config.vocab, (2, ROWS, T), generator=g)
        ids[1, 0, : i % 3] = -100
        protected = torch.rand(ROWS, generator=g) < 0.3
        parts.append((Batch((ids[0], ids[1]), protected, with_load), (1 + i % 2) / 12))
    return parts


def learn(model, backward, kind, m):
    """Gradients and losses of each of a few steps, and the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = []
    for step in range(STEPS[kind]):
        losses, _ = backward(micro_batches(CONFIGS[kind], m, step))
        grads = {name: W.grad.clone() for name, W in model.named_parameters()}
        told.append((grads, {name: loss.item() for name, loss in losses.items()}))
        optimizer.step()
        optimizer.zero_grad()
    return told, {name: W.detach().clone() for name, W in model.state_dict().items()}


@functools.cache
def alone(kind, m):
    """What one process finds."""
    model = seeded(CONFIGS[kind])

    def backward(parts):
        return World().backward(parts, lambda part: pretraining(model, part))

    return learn(model, backward, kind, m)


@functools.cache
def groups(p):
    """This rank's group of p, of all ranks that there are."""
    found = None
    for start in range(0, dist.get_world_size(), p):
        group = dist.new_group(list(range(start, start + p)))
        if start <= dist.get_rank() < start + p:
            found = group
    return found


def made(config, schedule, p, cut=None, around=nullcontext):
    group = groups(p)
    ranges = split(config, n_stages(schedule, p))
    if cut is not None:
        ends = torch.tensor([0, *cut]).cumsum(0).tolist()
        ranges = [range(a, b) for a, b in zip(ends, ends[1:])]
    stages = Stages(config, ranges_of(schedule, ranges, dist.get_rank(group), p)).double().train()
    stages.take(seeded(config).state_dict())
    return stages, Pipeline(stages, schedule, group, around)


# ---- what a rank does: functions of a module, sent to processes

def one_rank(kind, schedule, p, m, cut=None, wrong=nullcontext):
    config = CONFIGS[kind]
    groups(p)
    if dist.get_rank() >= p:             # one pipeline is enough
        return None
    with wrong():
        stages, pipe = made(config, schedule, p, cut)

        def backward(parts):
            found = pipe.backward(iter(parts))
            if wrong is not tied_gradient_of_one_owner:
                sum_tied_gradient(stages, schedule, pipe.group)
            return found

        told, weights = learn(stages, backward, kind, m)
    return dist.get_rank(pipe.group), told, weights, [slot.action for slot in pipe.timeline]


def balance_lost():
    """Other stages' balance losses do not arrive."""
    right = pipeline._Stage.forward

    def forward(self, *args, **kwargs):
        out = right(self, *args, **kwargs)
        return out if self.part.last else (out[0], out[1] * 0)

    return mock.patch.object(pipeline._Stage, "forward", forward)


def balance_without_gradient():
    """They arrive as numbers."""
    right = pipeline._Stage.forward

    def forward(self, *args, **kwargs):
        out = right(self, *args, **kwargs)
        return out if self.part.last else (out[0], out[1].detach())

    return mock.patch.object(pipeline._Stage, "forward", forward)


def divided_by_micro_batches():
    """Torch's default: gradients of a mean."""
    def engine(*args, scale_grads, **kwargs):
        return torch.distributed.pipelining.Schedule1F1B(*args, scale_grads=True, **kwargs)

    return mock.patch.object(pipeline, "pipelining", SimpleNamespace(Schedule1F1B=engine))


def tied_gradient_of_one_owner():
    return nullcontext()


def without_protection():
    """Stages behind the first do not know who is protected."""
    right = pipeline._Stage.forward

    def forward(self, *args, protected, **kwargs):
        protected = protected if self.part.first else torch.zeros_like(protected)
        return right(self, *args, protected=protected, **kwargs)

    return mock.patch.object(pipeline._Stage, "forward", forward)


class _Around(torch.autograd.Function):
    """All-to-all of equal shares: what is done twice is undone."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, upstream):
        return _Around.apply(upstream, ctx.group), None


def rank_with_all_to_alls(schedule, m):
    """Two pipelines side by side whose layers exchange rows in the middle of a pass."""
    config, p = CONFIGS["tied"], 2
    rank = dist.get_rank()
    peers = [dist.new_group([i, i + p]) for i in range(p)][rank % p]
    stages, pipe = made(config, schedule, p)
    calls = []

    def across(forms):
        def experts(x, indices, gates, *rest):
            calls.append(len(x))
            x, gates = (_Around.apply(_Around.apply(t, peers), peers) for t in (x, gates))
            return forms.experts(x, indices, gates, *rest)

        return replace(forms, experts=experts)

    for part in stages.parts:
        part.across = across
    losses, _ = pipe.backward(micro_batches(config, m))
    sum_tied_gradient(stages, schedule, pipe.group)
    moe = sum(layer >= config.n_dense for part in stages.parts for layer in part.layers)
    assert len(calls) == m * moe
    return ({name: W.grad for name, W in stages.named_parameters()},
            {name: loss.item() for name, loss in losses.items()})


def rank_with_load(schedule, m):
    config = CONFIGS["tied"]
    asked = made(config, schedule, 2)[1].backward(micro_batches(config, m, with_load=True))[1]
    return asked, made(config, schedule, 2)[1].backward(micro_batches(config, m))[1]


def ranks_share(kind, schedule, p):
    stages, _ = made(CONFIGS[kind], schedule, p)
    return {name: W.numel() for name, W in stages.state_dict().items()}


# ---- tests

@pytest.fixture(scope="module")
def four():
    with ranks.world(4) as pool:
        yield pool


def compare(answers, kind, m, p):
    """Every rank's gradients, losses and weights are those of one process, and all are owned."""
    steps, weights = alone(kind, m)
    assert len(answers) == p
    for _, told, mine, _ in answers:
        for (grads, losses), (all_grads, all_losses) in zip(told, steps, strict=True):
            for name, grad in grads.items():
                torch.testing.assert_close(grad, all_grads[name], rtol=0, atol=1e-10, msg=name)
            assert losses.keys() == all_losses.keys()
            for name, loss in losses.items():
                assert abs(loss - all_losses[name]) < 1e-10, name
        for name, W in mine.items():
            torch.testing.assert_close(W, weights[name], rtol=0, atol=1e-10, msg=name)
    assert set().union(*(told[0][0] for _, told, _, _ in answers)) == set(steps[0][0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("kind", "p"), [("tied", 2), ("untied", 4)])
def test_a_pipeline_is_one_process(four, kind, p, schedule):
    """Losses by name, the gradient of each parameter, weights after updates; the order of work."""
    m = 2 * p if schedule == "dualpipev" else p + 2
    cut = UNEVEN[n_stages(schedule, p)] if kind == "tied" else None
    answers = four(one_rank, kind, schedule, p, m, cut)[:p]
    compare(answers, kind, m, p)
    as_torch_says = torch_order(schedule, p, m)
    for rank, _, _, done in answers:
        assert done == [action._replace(joined=False) for action in as_torch_says[rank]]
        if not SCHEDULES[schedule].splits:
            assert done == order(schedule, p, m)[rank]


@pytest.mark.parametrize(("kind", "schedule", "p", "m"), [
    ("tied", "1f1b", 4, 5), ("untied", "zbv", 2, 3), ("tied", "interleaved", 2, 6)])
def test_other_numbers_of_micro_batches(four, kind, schedule, p, m):
    compare(four(one_rank, kind, schedule, p, m)[:p], kind, m, p)


@pytest.mark.parametrize("wrong", [balance_lost, balance_without_gradient, without_protection,
                                   divided_by_micro_batches, tied_gradient_of_one_owner],
                         ids=lambda f: f.__name__)
def test_rejects(four, wrong):
    answers = four(one_rank, "tied", "1f1b", 2, 4, UNEVEN[2], wrong)[:2]
    with pytest.raises(AssertionError):
        compare(answers, "tied", 4, 2)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "dualpipev"])
def test_all_to_alls_inside_stages_do_not_hang(four, schedule):
    m = 4
    (grads, losses), *_ = alone("tied", m)[0]
    for mine, told in four(rank_with_all_to_alls, schedule, m):
        for name, grad in mine.items():
            torch.testing.assert_close(grad, grads[name], rtol=0, atol=1e-10, msg=name)
        assert told == pytest.approx(losses, abs=1e-10)


def test_the_load_is_of_the_last_micro_batch_and_only_if_asked(four):
    config, m = CONFIGS["tied"], 4
    expected = pretraining(seeded(config), micro_batches(config, m, with_load=True)[-1][0]).load
    answers = four(rank_with_load, "zbv", m)[:2]
    assert all(not unasked for _, unasked in answers)
    found = {traffic.layer: traffic for asked, _ in answers for traffic in asked}
    assert sorted(found) == [traffic.layer for traffic in expected]
    for traffic in expected:
        assert torch.equal(found[traffic.layer].experts, traffic.experts)
        assert torch.equal(found[traffic.layer].kept, traffic.kept)


def test_each_rank_owns_its_share_alone(four):
    sizes = {name: W.numel() for name, W in seeded(CONFIGS["untied"]).state_dict().items()}
    shares = four(ranks_share, "untied", "zbv", 4)
    assert sum(sum(share.values()) for share in shares) == sum(sizes.values())
    assert all(sum(share.values()) < sum(sizes.values()) / 2 for share in shares)
    tied = four(ranks_share, "tied", "1f1b", 4)
    assert [("embedding.weight" in share) for share in tied] == [True, False, False, True]


def step_of_four():
    return demo_pipeline.pipeline_step(CONFIGS["untied"], "interleaved", 4, rows=2, T=5, tries=2)


def test_what_a_notebook_is_told(four):
    config = CONFIGS["untied"]
    answers = four(step_of_four)
    model = demo_pipeline.random_model(config)
    losses, _ = World().backward(demo_pipeline.random_parts(config, 4, 2, 5),
                                 lambda part: pretraining(model, part))
    assert sum(found.parameters for found in answers) == sum(W.numel() for W in model.parameters())
    whole = dict(model.named_parameters())
    for rank, found in enumerate(answers):
        assert found.layers == ranges_of("interleaved", split(config, 8, 5), rank, 4)
        assert [slot.action for slot in found.slots] == order("interleaved", 4, 4)[rank]
        assert all(slot.start < slot.end for slot in found.slots)
        assert found.losses == pytest.approx({n: loss.item() for n, loss in losses.items()},
                                             abs=1e-10)
        for name, grad in found.gradients.items():
            torch.testing.assert_close(grad, whole[name].grad, rtol=0, atol=1e-10, msg=name)


def test_what_a_notebook_is_told_of_zero1_and_of_two_layouts(four):
    config = CONFIGS["untied"].with_(drop_capacity=None)
    alone, shared = (four(demo_pipeline.kept, config, Layout(dp=4, zero1=zero1))
                     for zero1 in (False, True))
    names = [name for found in shared for name in found.moments]
    assert sorted(names) == sorted(alone[0].moments) and len(set(names)) == len(names)
    assert sum(alone[0].moments.values()) == 2 * alone[0].weights
    assert len({round(found.norm, 10) for found in alone + shared}) == 1
    ways = [four(demo_pipeline.asked, config, layout, [5, 1, 4], 4)
            for layout in (Layout(pp=4), Layout(dp=4))]
    for staged, whole in zip(*ways, strict=True):
        assert staged.text == whole.text and len(staged.text) == 4
        assert staged.losses == pytest.approx(whole.losses, abs=1e-10)
        assert staged.layers[0] < staged.layers[1] == whole.layers[0]


def test_a_process_is_started_and_answers():
    assert local.run(1, dist.get_world_size) == [1]


# ---- one process alone: quick, and what mutants meet

@pytest.fixture
def one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.cache_clear()
    yield
    dist.destroy_process_group()
    groups.cache_clear()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"])
def test_one_rank_holds_all_stages(one, schedule):
    answer = one_rank("tied", schedule, 1, 3)
    compare([answer], "tied", 3, 1)
    assert answer[3] == torch_order(schedule, 1, 3)[0]


def test_each_forward_pass_runs_inside_what_is_around(one):
    entered = []

    def around():
        entered.append(1)
        return nullcontext()

    config = CONFIGS["tied"]
    _, pipe = made(config, "interleaved", 1, around=around)
    pipe.backward(micro_batches(config, 3))
    assert len(entered) == 2 * 3


@pytest.mark.parametrize(("schedule", "most"), [("interleaved", 2), ("zbv", 10)])
def test_why_activations_are_not_made_again_in_a_split_backward(one, schedule, most, monkeypatch):
    """Right gradients, but a block runs as often as it has weights; `check` refuses it."""
    config, calls, right = CONFIGS["tied"], [], Block.forward
    stages, pipe = made(config, schedule, 1)
    for part in stages.parts:
        part.recompute = 1.0
    (expected, _), *_ = alone("tied", 1)[0]
    monkeypatch.setattr(Block, "forward",
                        lambda self, *args: (calls.append(self.layer), right(self, *args))[1])
    pipe.backward(micro_batches(config, 1))
    for name, W in stages.named_parameters():
        torch.testing.assert_close(W.grad, expected[name], rtol=0, atol=1e-10, msg=name)
    again = calls.count(config.n_layers - 1)
    assert again == 2 if most == 2 else again > most


def test_a_step_may_have_another_shape_than_the_last(one):
    config = CONFIGS["tied"]
    stages, pipe = made(config, "gpipe", 1)
    for m in (2, 3):
        losses, _ = pipe.backward(micro_batches(config, m))
        expected = alone("tied", m)[0][0][1]
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
            expected, abs=1e-10)
    assert losses["language"].dtype == torch.float64


def test_refusals(one):
    config = CONFIGS["tied"]
    stages, pipe = made(config, "gpipe", 1)
    refused(lambda: Pipeline(stages, "zbv"), "stages: 1 ranges", "expected 2 for zbv")
    refused(lambda: Pipeline(stages, "pipedream"), "schedule: 'pipedream'", "gpipe, 1f1b")
    (a, share), (b, _) = micro_batches(config, 2)
    refused(lambda: pipe.backward([(a, share), (b.rows(slice(1)), share)]),
            "micro-batches: of shapes [(1, 5), (2, 5)], expected one shape")

# SPDX-License-Identifier: MIT
"""The whole model with its experts on several gloo processes: losses, gradients and traffic are one
process's, with dropping and all balance losses; and what the notebook runs.

tests/test_expert.py has the exchange itself.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from oracles import loops
from ranks import world
from test_expert import Hub, transport
from torch.distributed.device_mesh import init_device_mesh

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import experts_loop
from dsv2_ref.parallel import demo_expert as demo
from dsv2_ref.parallel import local
from dsv2_ref.parallel.expert import Ledger, experts_across, experts_begun_across, keep_across

SMALL = Config(
    vocab=31, d=16, n_layers=3, n_h=2, d_h=6, d_r=4, d_v=5, d_c=8, d_cq=10, n_dense=1,
    dense_width=14, n_shared=2, n_routed=8, top_k=3, expert_width=12, n_devices=4, max_devices=2,
    routed_scaling_factor=2.5, alpha_expert=0.3, alpha_device=0.5, alpha_comm=0.2,
    drop_capacity=0.6, max_positions=64,
)
B, T = 7, 9                                              # sequences and their length
NAMES = ("language", "expert", "device", "communication")


@pytest.fixture(scope="module")
def four():
    with world(4) as ranks:
        yield ranks


def ids(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab, (B, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.rand(B, generator=generator) < 0.3


def build(config, dtype, held=None):
    """The whole model's weights, or a share of them."""
    whole = loops.randomize(DeepSeekV2(config), 3, 0.3).to(dtype).train()
    if held is None:
        return whole
    mine = DeepSeekV2(config, held=held).to(dtype).train()
    with torch.no_grad():
        for name, W in mine.named_parameters():
            full = whole.get_parameter(name)
            W.copy_(full[held.start : held.stop] if ".experts.W_" in name else full)
    return mine


def alone(config, dtype=torch.float64):
    model = build(config, dtype)
    losses = model.losses(*ids(), with_load=True)
    losses.total.backward()
    kept = [load.kept for load in losses.load]
    return [getattr(losses, n).item() for n in NAMES], {
        name: W.grad for name, W in model.named_parameters()}, kept


def share(group, everybody, config, dtype=torch.float64, recompute=0.0, begun=True, **how):
    """Of one rank: its share of the losses, gradients, kept slots, what it sent, the form it ran.

    It holds the experts of its place in `group`, and reads the sequences of its place among all.
    """
    rank, held, ledger, used = everybody.rank(), SMALL.n_routed // group.size(), Ledger(), []
    first = group.rank() * held
    model = build(config, dtype, range(first, first + held))
    model.recompute = recompute

    def across(forms):
        used.append(forms.experts.__name__)
        ranks = experts_begun_across if begun else experts_across
        return replace(forms, experts=ranks(forms.experts, group, ledger=ledger, **how),
                       keep=keep_across(forms.keep, everybody, **how))

    model.across = across
    cuts = [0, 1, 3, 5, 7]                               # rows of each rank: 1 2 2 2
    mine = slice(cuts[rank], cuts[rank + 1])
    losses = model.losses(*(t[mine] for t in ids()), with_load=True)
    part = (mine.stop - mine.start) / B
    (losses.total * part).backward()
    values = torch.tensor([getattr(losses, n).item() * part for n in NAMES], dtype=torch.float64)
    gradients = {name: W.grad for name, W in model.named_parameters()}
    return values, gradients, [load.kept for load in losses.load], ledger, used


def among_ranks(config, ep, *how):
    """Expert parallel over `ep` ranks, the others are replicas; summed, as a world does."""
    mesh = init_device_mesh("cpu", (4 // ep, ep), mesh_dim_names=("dp", "ep"))
    values, gradients, *rest = share(mesh.get_group("ep"), dist.group.WORLD, config, *how)
    dist.all_reduce(values)
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=mesh.get_group("dp") if ".experts.W_" in name else None)
    return values, gradients, *rest


def same(parts, expected, ep, tolerance=1e-10):
    """Of each rank, the losses and all gradients, relative to the largest if not in fp64."""
    losses, gradients, kept = expected
    held = SMALL.n_routed // ep
    for rank, (found, mine, *_) in enumerate(parts):
        assert found.tolist() == pytest.approx(losses, abs=tolerance)
        first = rank % ep * held
        for name, whole in gradients.items():
            part = whole[first : first + held] if ".experts.W_" in name else whole
            scale = 1.0 if whole.dtype == torch.float64 else whole.abs().max()
            assert (mine[name] - part).abs().max() <= tolerance * scale, name
    for layer, whole in enumerate(kept):
        if whole is not None:
            assert torch.equal(torch.cat([part[2][layer] for part in parts]), whole)


@pytest.mark.parametrize("ep", [2, 4])
def test_equals_one_process_with_dropping_and_all_balance_losses(four, ep):
    expected = alone(SMALL)
    assert all(loss > 0.01 for loss in expected[0])
    assert all(0.1 < (~kept).double().mean() < 0.9 for kept in expected[2])
    parts = four(among_ranks, SMALL, ep)
    same(parts, expected, ep)
    assert parts[0][4] == ["experts_padded"]
    assert parts[0][1]["blocks.1.ffn.experts.W_up"].shape == (SMALL.n_routed // ep, 12, 16)


@pytest.mark.parametrize("recompute, begun", [(1.0, True), (0.0, False)])
def test_recomputed_and_without_overlap(recompute, begun):
    """Here the ranks are threads."""
    parts = Hub(4)(lambda member: share(member, member, SMALL, torch.float64, recompute, begun,
                                        transport=transport))
    sums = sum(part[0] for part in parts)
    common = {name: sum(part[1][name] for part in parts) for name in parts[0][1]
              if ".experts.W_" not in name}
    same([(sums, part[1] | common, *part[2:]) for part in parts], alone(SMALL), 4)


def test_grouped_products_in_single_precision(four):
    parts = four(among_ranks, SMALL, 4, torch.float32)
    assert parts[0][4] == ["experts_grouped"]
    same(parts, alone(SMALL, torch.float32), 4, 1e-5)


def sent(parts, table, purpose):
    """(4, 4) from each rank to each."""
    return torch.tensor([getattr(part[3], table)[purpose] for part in parts])


def test_a_limit_bounds_what_is_sent(four):
    """Two layers with experts; each device is a rank, so a token reaches M at most."""
    roomy = SMALL.with_(drop_capacity=None)
    free = roomy.with_(max_devices=None)
    tokens = torch.tensor([1, 2, 2, 2]) * T * 2                              # of both layers
    rows = {}
    for name, config in (("limited", roomy), ("free", free)):
        parts = four(among_ranks, config, 4)
        same(parts, alone(config), 4)
        rows[name] = sent(parts, "rows", "tokens")
        slots = torch.tensor([part[3].slots for part in parts])
        assert torch.equal(slots.sum(1), tokens * SMALL.top_k)               # once a slot
        assert (rows[name] <= slots).all() and rows[name].sum() < slots.sum()
        assert torch.equal(rows[name].T, sent(parts, "rows", "sums"))
        assert torch.equal(rows[name], sent(parts, "rows", "gradients of sums"))
        assert torch.equal(sent(parts, "bytes", "tokens"), rows[name] * (8 * 16 + 12 * 3))
        assert (sent(parts, "messages", "tokens") == 2 * 3).all()            # rows, gates, numbers
    assert (rows["limited"].sum(1) <= tokens * roomy.max_devices).all()      # M·T
    assert (rows["free"].sum(1) > rows["limited"].sum(1)).all()
    assert rows["free"].sum() > roomy.max_devices * tokens.sum()


def test_the_overlap_is_seen_in_a_trace(four):
    """Rank 0, whose neighbours send 0.1 s late: what is under way while it computes."""
    for begun in (True, False):
        spans = four(demo.trace, 64, 32, 64, 0.1, begun)[0]
        for name in ("shared", "shared, backward"):
            (end,) = (b for what, _, b in spans if what == name)
            on_its_way = [a < end <= b for what, a, b in spans if what == "all_to_all"]
            assert len(on_its_way) == 8 and any(on_its_way) == begun, (name, spans)


def test_a_notebooks_layer_is_the_layer(four):
    rows, n = (3, 0, 5, 2), 10
    x, direction = loops.normal(1, n, 6), loops.normal(2, n, 6)
    gates, indices = loops.normal(3, n, 8).softmax(-1).topk(2)
    weights = [loops.normal(4 + i, *s) for i, s in enumerate([(8, 5, 6), (8, 5, 6), (8, 6, 5)])]
    keep = loops.normal(7, n, 2) > -1
    parts = four(demo.layer, rows, x, indices, gates, weights, direction, keep)
    x, gates, *weights = (t.requires_grad_() for t in (x, gates, *weights))
    y = experts_loop(x, indices, gates, *weights, keep)
    (y * direction).sum().backward()
    for name, expected in (("y", y.detach()), ("dx", x.grad), ("dgates", gates.grad)):
        got = torch.cat([getattr(part, name) for part in parts])
        assert (got - expected).abs().max() < 1e-10
    for i, W in enumerate(weights):
        assert (torch.cat([part.dW[i] for part in parts]) - W.grad).abs().max() < 1e-10
    half = [t.detach().bfloat16() for t in (x, *weights, direction)]         # gloo carries it, too
    parts = four(demo.layer, rows, half[0], indices, gates.detach().float(), half[1:4], half[4],
                 keep)
    for name, expected in (("y", y.detach()), ("dx", x.grad), ("dgates", gates.grad)):
        got = torch.cat([getattr(part, name) for part in parts])
        assert got.dtype == (torch.float32 if name == "dgates" else torch.bfloat16)
        assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    kept = keep_within_budget(indices, gates, 8, 4)
    assert torch.equal(torch.cat(four(demo.keep, rows, True, indices, gates, 8, 4)), kept)
    assert not torch.equal(torch.cat(four(demo.keep, rows, False, indices, gates, 8, 4)), kept)


@pytest.mark.parametrize("rows", [(0, 0, 0, 0), (0, 0, 4, 0), (1, 2, 0, 1)])
def test_processes_that_have_nothing_to_send_or_get_do_not_hang(four, rows):
    """All tokens want the two experts of rank 1, or there are none."""
    n = sum(rows)
    x, gates = loops.normal(1, n, 6), loops.normal(2, n, 2)
    indices = torch.tensor([2, 3]).expand(n, 2)
    weights = [loops.normal(4 + i, *s) for i, s in enumerate([(8, 5, 6), (8, 5, 6), (8, 6, 5)])]
    parts = four(demo.layer, rows, x, indices, gates, weights, x)
    assert torch.allclose(torch.cat([part.y for part in parts]),
                          experts_loop(x, indices, gates, *weights), atol=1e-10)
    assert [any(W.any() for W in part.dW) for part in parts] == [False, n > 0, False, False]
    assert torch.cat(four(demo.keep, rows, True, indices, gates, 8, 4)).sum() == n * 2 // 4


def test_a_notebooks_processes_answer_tell_their_errors_and_end():
    run = local.Processes(1)
    assert run(demo.rows_of, (2, 3)) == [slice(0, 2)]
    with pytest.raises(RuntimeError, match="rank 0:\n(?s:.*)TypeError"):
        run(demo.rows_of, None)
    assert run(demo.rows_of, (0, 1)) == [slice(0, 0)]
    processes = run._processes
    run.close()
    assert [process.exitcode for process in processes] == [0]

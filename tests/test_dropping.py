# SPDX-License-Identifier: MIT
"""Token dropping against sorted Python lists, and one example worked by hand."""

import pytest
import torch
from oracles import loops

from dsv2_ref.moe.dropping import keep_within_budget

E, D = 12, 4


def crowded(seed: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts a token, with a lean that overfills some devices; and their affinities."""
    s = (loops.normal(seed, n, E) + 1.5 * loops.normal(seed + 100, E)).softmax(-1)
    affinity, indices = s.topk(k, -1)
    return indices, affinity


def test_worked_example():
    """Eight tokens, one slot each, experts 0-1 on device 0 and 2-3 on device 1: budget 4 each.

    Device 0 got six slots of affinity .9 .8 .7 .6 .5 .4: the last two go. Device 1 got two, both
    stay, although one of them is the weakest of all.
    """
    indices = torch.tensor([0, 1, 0, 2, 1, 3, 0, 1])[:, None]
    affinity = torch.tensor([0.5, 0.9, 0.7, 0.1, 0.4, 0.3, 0.8, 0.6])[:, None]
    keep = keep_within_budget(indices, affinity, n_routed=4, n_devices=2)
    assert keep[:, 0].tolist() == [False, True, True, True, False, True, True, True]
    # tokens 0 and 4, the two that went, are protected: now .7 and .6 must make room
    protected = torch.tensor([True, False, False, False, True, False, False, False])
    keep = keep_within_budget(indices, affinity, 4, 2, protected)
    assert keep[:, 0].tolist() == [True, True, False, True, True, True, True, False]
    # half the capacity: two slots a device
    keep = keep_within_budget(indices, affinity, 4, 2, capacity=0.5)
    assert keep[:, 0].tolist() == [False, True, False, True, False, True, True, False]


@pytest.mark.parametrize("capacity", [1.0, 0.55, 1.3, 0.0, 1e300])
@pytest.mark.parametrize("n,k", [(11, 3), (7, 5), (1, 2), (3, 1)])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_equals_sorted_lists(n, k, capacity, share):
    indices, affinity = crowded(n * k, n, k)
    protected = None if share is None else loops.normal(1, n).abs() < 1.6 * share
    keep = keep_within_budget(indices, affinity, E, D, protected, capacity)
    expected = loops.keep_within_budget(
        indices.tolist(), affinity.tolist(), E, D,
        None if protected is None else protected.tolist(), capacity)
    assert keep.dtype == torch.bool and keep.tolist() == expected


def test_budget_is_per_device():
    indices, affinity = crowded(2, 17, 3)
    keep = keep_within_budget(indices, affinity, E, D)
    load = torch.bincount((indices // 3)[keep], minlength=D)
    wanted = torch.bincount((indices // 3).flatten(), minlength=D)
    budget = 17 * 3 // D
    assert wanted.max() > budget
    assert torch.equal(load, wanted.clamp(max=budget))
    # an expert may have more than the average of all experts, if its device has room for it
    indices = torch.tensor([[0], [0], [0], [3], [6], [7], [8], [9], [10], [11], [4], [5]])
    assert keep_within_budget(indices, torch.rand(12, 1), E, D).all()


def test_what_is_dropped_is_weaker_than_what_is_kept():
    indices, affinity = crowded(3, 19, 3)
    keep = keep_within_budget(indices, affinity, E, D)
    for device in range(D):
        here = indices // 3 == device
        if (here & ~keep).any():
            assert affinity[here & ~keep].max() < affinity[here & keep].min()
    assert not keep.all()


def test_protected_tokens_are_never_dropped_but_counted():
    indices, affinity = crowded(4, 16, 3)
    protected = torch.arange(16) % 4 == 1
    keep = keep_within_budget(indices, affinity, E, D, protected)
    assert keep[protected].all()
    load = torch.bincount((indices // 3)[keep], minlength=D)
    assert load.max() == 16 * 3 // D                        # they took the others' places
    keep = keep_within_budget(indices, affinity, E, D, torch.ones(16, dtype=torch.bool))
    assert keep.all()                                       # beyond the budget, if it must be
    keep = keep_within_budget(indices, affinity, E, D, protected, capacity=0.0)
    assert torch.equal(keep, protected[:, None].expand(16, 3))


def test_of_equal_affinities_the_earlier_is_kept():
    indices = torch.tensor([[0, 3], [1, 4], [2, 5], [0, 1]])       # five slots on device 0, of 8
    keep = keep_within_budget(indices, torch.full((4, 2), 0.25), 6, 2)
    assert keep.tolist() == [[True, True], [True, True], [True, True], [True, False]]


def test_nothing_is_dropped_when_balanced():
    indices = torch.arange(24).view(8, 3) % E
    for scale in (1.0, 16.0):
        assert keep_within_budget(indices, scale * torch.rand(8, 3), E, D).all()


def test_affinity_gets_no_gradient():
    indices, affinity = crowded(5, 9, 3)
    keep = keep_within_budget(indices, affinity.requires_grad_(), E, D)
    assert not keep.requires_grad

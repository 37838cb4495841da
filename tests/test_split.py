# SPDX-License-Identifier: MIT
"""Layers in stages: even work by trying all splits, the sum of all work, and what is refused."""

from itertools import combinations

import pytest
from refusals import refused

from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.cost import activated_parameters, causal_training_flops
from dsv2_ref.parallel.schedule import SCHEDULES, n_stages
from dsv2_ref.parallel.split import (
    Layout,
    check,
    experts_each,
    layout_of,
    ranges_of,
    split,
    work,
)

DEEP = TINY.with_(n_layers=9)


@pytest.mark.parametrize("config", [V2, LITE, TINY, DEEP.with_(n_dense=3, vocab=5000)],
                         ids=["v2", "lite", "tiny", "deep"])
def test_the_work_of_all_stages_is_that_of_the_model(config):
    parts = [work(config, stage, 33) for stage in split(config, 3)]
    total = sum(sum(part) for part in parts)
    assert total == pytest.approx(causal_training_flops(config, 33), rel=1e-12)
    assert sum(part.W for part in parts) == 2 * activated_parameters(config)
    assert all(part.I - part.F == pytest.approx(part.F - part.W) and part.F > part.W
               for part in parts)


@pytest.mark.parametrize("config", [DEEP, DEEP.with_(vocab=9000), DEEP.with_(n_dense=4,
                                                                             dense_width=900)])
@pytest.mark.parametrize("stages", [1, 2, 4, 9])
def test_no_split_is_more_even(config, stages):
    def fullest(ranges):
        return max(sum(work(config, stage)) for stage in ranges)

    ranges = split(config, stages)
    assert [i for stage in ranges for i in stage] == list(range(9)) and len(ranges) == stages
    tried = [[range(a, b) for a, b in zip((0, *cuts), (*cuts, 9))]
             for cuts in combinations(range(1, 9), stages - 1)]
    assert fullest(ranges) == pytest.approx(min(map(fullest, tried)), rel=1e-12)


def test_the_head_costs_layers():
    ranges = split(V2, 16)
    assert [len(stage) for stage in ranges] == [4, 3, 3, *[4] * 12, 2]
    works = [sum(work(V2, stage)) for stage in ranges]
    layer, last = (sum(work(V2, range(i, i + 1))) for i in (1, 59))
    assert (last - layer) / layer == pytest.approx(1.24, abs=0.01)
    assert max(works) / (sum(works) / 16) == pytest.approx(1.045, abs=0.001)
    even = [range(i * 60 // 16, (i + 1) * 60 // 16) for i in range(16)]      # the head forgotten
    assert max(sum(work(V2, stage)) for stage in even) > 1.2 * max(works)
    large = split(DEEP.with_(vocab=9000), 2)
    assert len(large[0]) > len(large[1])


def test_ranges_of_a_rank():
    ranges = split(DEEP, 4)
    assert ranges_of("1f1b", ranges, 2, 4) == [ranges[2]]
    assert ranges_of("interleaved", ranges, 0, 2) == [ranges[0], ranges[2]]
    assert ranges_of("zbv", ranges, 0, 2) == [ranges[0], ranges[3]]
    assert ranges_of("dualpipev", ranges, 1, 2) == [ranges[1], ranges[2]]
    refused(lambda: ranges_of("zbv", ranges, 0, 4), "stages: 4, expected 8 for zbv on 4 ranks")


def test_what_can_be_is_not_refused():
    for schedule in SCHEDULES:
        for p in (1, 2, 4):
            check(DEEP, schedule, p, n_stages(schedule, p))
    check(DEEP, "interleaved", 4, 4)
    check(DEEP, "interleaved", 4, 10)
    check(DEEP, "interleaved", 4, 8, recompute=1.0)


@pytest.mark.parametrize("arguments, words", [
    (("pipedream", 2, 4), ["schedule: 'pipedream', expected one of gpipe, 1f1b"]),
    (("1f1b", 0, 4), ["pp: 0, expected at least 1"]),
    (("1f1b", 10, 20), ["layers: 9, expected at least 10"]),
    (("interleaved", 5, 20), ["layers: 9, expected at least 10", "interleaved has 2 on each of 5"]),
    (("zbv", 5, 20), ["layers: 9, expected at least 10"]),
    (("1f1b", 4, 3), ["micro-batches: 3, expected at least 4 for 1f1b on 4 ranks"]),
    (("dualpipev", 4, 7), ["micro-batches: 7, expected at least 8"]),
    (("interleaved", 2, 5), ["micro-batches: 5, expected a multiple of 2"]),
    (("zb-h1", 2, 5), ["micro-batches: 5, expected a multiple of 2"]),
    (("zbv", 2, 4, 0.5), ["recompute: 0.5, expected 0 with zbv"]),
], ids=str)
def test_contradictions_are_one_line(arguments, words):
    refused(lambda: check(DEEP, *arguments), *words)


def test_a_layout_uses_all_ranks():
    lay = layout_of(2048, 8, 16, "zb-h1", True)
    assert lay == Layout(pp=16, dp=16, ep=8, schedule="zb-h1", zero1=True)
    assert lay.size == 2048 and lay.rows == 128
    refused(lambda: layout_of(2000, 8, 16, "1f1b", True), "ep x pp: 8 x 16", "of the 2000 ranks")
    refused(lambda: layout_of(0, 8, 16, "1f1b", True), "of the 0 ranks")
    refused(lambda: layout_of(4, 1, 0, "1f1b", True), "pp: 0, expected at least 1")
    refused(lambda: Layout(dp=0), "dp: 0, expected at least 1")
    assert experts_each(V2, 8) == 20
    refused(lambda: experts_each(V2, 7), "ep: 7, expected a divisor of the 160 routed experts")


def test_too_many_stages():
    refused(lambda: split(DEEP, 10), "stages: 10 of 9 layers, expected 1 to 9")

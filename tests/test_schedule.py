# SPDX-License-Identifier: MIT
"""The simulator of schedules: cases drawn on paper, a second simulator that ticks, formulas."""

import random

import pytest
from refusals import refused

from dsv2_ref.parallel.demo_pipeline import times_of
from dsv2_ref.parallel.pipeline import torch_order
from dsv2_ref.parallel.schedule import (
    SCHEDULES,
    Action,
    Slot,
    Timeline,
    Times,
    even,
    n_stages,
    order,
    published_bubble,
    simulate,
    stages_of,
)

OURS = ("gpipe", "1f1b", "interleaved", "zb-h1")
SIZES = [(1, 2), (2, 4), (3, 6), (4, 8), (4, 16)]


def drawn(text):
    """A row as on paper: "F0 0 1, B0 5 7" -> slots of one stage."""
    return [(a, float(start), float(end))
            for a, start, end in (part.split() for part in text.split(","))]


PAPER = {     # two stages, four micro-batches, a forward takes 1 and a backward 2
    "gpipe": ["F0 0 1, F1 1 2, F2 2 3, F3 3 4, B0 7 9, B1 9 11, B2 11 13, B3 13 15",
              "F0 1 2, F1 2 3, F2 3 4, F3 4 5, B0 5 7, B1 7 9, B2 9 11, B3 11 13"],
    "1f1b": ["F0 0 1, F1 1 2, B0 4 6, F2 6 7, B1 7 9, F3 9 10, B2 10 12, B3 13 15",
             "F0 1 2, B0 2 4, F1 4 5, B1 5 7, F2 7 8, B2 8 10, F3 10 11, B3 11 13"],
    "zb-h1": ["F0 0 1, F1 1 2, I0 3 4, W0 4 5, F2 5 6, I1 6 7, W1 7 8, F3 8 9, I2 9 10, "
              "W2 10 11, I3 11 12, W3 12 13",
              "F0 1 2, I0 2 3, F1 3 4, I1 4 5, W0 5 6, F2 6 7, I2 7 8, W1 8 9, F3 9 10, I3 10 11, "
              "W2 11 12, W3 12 13"],
    "zb-h2": ["F0 0 1, F1 1 2, F2 2 3, I0 3 4, W0 4 5, F3 5 6, I1 6 7, W1 7 8, I2 8 9, W2 9 10, "
              "I3 10 11, W3 11 12",
              "F0 1 2, I0 2 3, F1 3 4, I1 4 5, F2 5 6, I2 6 7, W0 7 8, F3 8 9, I3 9 10, W1 10 11, "
              "W2 11 12, W3 12 13"],
}


@pytest.mark.parametrize("schedule", PAPER)
def test_as_drawn_on_paper(schedule):
    found = simulate(order(schedule, 2, 4), even(2))
    assert [[(str(a), start, end) for a, start, end in row] for row in found.rows] == [
        drawn(row) for row in PAPER[schedule]]


def test_what_follows_from_the_drawing():
    gpipe, one = (simulate(order(name, 2, 4), even(2)) for name in ("gpipe", "1f1b"))
    assert gpipe.makespan == one.makespan == 15 and gpipe.busy == one.busy == [12, 12]
    assert gpipe.bubble == one.bubble == pytest.approx(0.2)
    assert gpipe.in_flight() == [4, 4] and one.in_flight() == [2, 1]
    assert one.held([3.0, 5.0]) == [6.0, 5.0]
    zb = simulate(torch_order("zb-h1", 2, 4), even(2))
    assert zb.makespan == 13 and zb.in_flight() == [2, 2]       # W late: what it needs is kept
    assert zb.rolling_bubble == pytest.approx(1 - 12 / 13) == zb.bubble


def test_a_link_delays_and_works_not():
    found = simulate(order("gpipe", 2, 2), even(2, link=0.5))
    assert [slot.start for slot in found.rows[1]] == [1.5, 2.5, 3.5, 5.5]
    assert [slot.start for slot in found.rows[0]] == [0, 1, 6, 8] and found.busy == [6, 6]
    inside = simulate(torch_order("zbv", 1, 2), even(2, link=0.5))     # both stages on one rank
    assert inside.makespan == 12 and inside.bubble == 0


def ticking(actions, times):
    """A second simulator: the clock ticks, and a rank that is free begins what it can."""
    stages = 1 + max(a.stage for row in actions for a in row)
    place = {a.stage: rank for rank, row in enumerate(actions) for a in row}
    done, rows, now = {}, [[] for _ in actions], 0
    left, made = [list(row) for row in actions], [[] for _ in actions]

    def there(kind, stage, batch, rank):
        kinds = "IB" if kind == "I" else kind
        return any((k, stage, batch) in done
                   and done[k, stage, batch] + times.link * (place[stage] != rank) <= now
                   for k in kinds)

    while any(left) and now < 10_000:
        for rank, (row, together) in enumerate(zip(rows, made, strict=True)):
            while left[rank] and not (row and row[-1].end > now):
                kind, stage, batch, _ = left[rank][0]
                needs = {"F": [("F", stage - 1)] * (stage > 0), "W": [("I", stage)]}.get(
                    kind, [("F", stage)] + [("I", stage + 1)] * (stage + 1 < stages))
                if not all(there(k, s, batch, rank) for k, s in needs):
                    break
                row.append(Slot(left[rank][0], now, now + times.of(left[rank].pop(0))))
                together.append((kind, stage, batch))
                if not row[-1].action.joined:
                    done |= dict.fromkeys(together, row[-1].end)
                    together.clear()
        now += 1
    return rows


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6)])
def test_equals_a_clock_that_ticks(schedule, p, m):
    """Stages and F, I, W all of different times, and a link."""
    draw = random.Random(p)
    stages = n_stages(schedule, p)
    times = Times(*([draw.randint(1, 9) for _ in range(stages)] for _ in range(3)), link=2)
    actions = torch_order(schedule, p, m)
    found = simulate(actions, times)
    assert found.rows == ticking(actions, times)
    done = sorted(slot.action for row in found.rows for slot in row)
    assert done == sorted(a for row in actions for a in row) and len(set(done)) == len(done)
    batches = [(stage, batch) for stage in range(stages) for batch in range(m)]
    assert sorted((a.stage, a.batch) for a in done if a.kind == "F") == batches
    assert sorted((a.stage, a.batch) for a in done if a.kind in "BW") == batches


@pytest.mark.parametrize("schedule", OURS)
@pytest.mark.parametrize(("p", "m"), [*SIZES, (4, 5), (2, 3), (3, 4)])
def test_our_order_is_torchs(schedule, p, m):
    assert order(schedule, p, m) == torch_order(schedule, p, m)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubbles_are_the_published_ones(schedule, p, m):
    for F, I, W in ((1, 1, 1), (3, 3, 2), (2, 3, 2)):
        if schedule == "dualpipev" and F != I:
            continue
        expected = published_bubble(schedule, p, m, F, I, W)
        if expected is None:
            assert schedule in ("interleaved-zb", "zbv")
            continue
        found = simulate(torch_order(schedule, p, m), even(n_stages(schedule, p), F, I, W))
        bubble = found.rolling_bubble if schedule == "zbv" else found.bubble
        assert bubble == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 7, 12, 20])
def test_how_long_a_rank_waits_and_how_much_it_holds(p, m):
    """The laws of Qi and others, and what they leave out: fewer micro-batches than stages.

    Weights' gradients cover W of p - 1 micro-batches in ZB-H1 and of twice as many in ZB-H2.
    """
    for F, I, W in ((1, 1, 1), (2, 3, 2), (5, 7, 4), (9, 10, 8)):
        idle = {
            "1f1b": (p - 1) * (F + I + W),
            "zb-h1": (p - 1) * (F + I) - min(p - 1, m - 1) * W,
            "zb-h2": max((p - 1) * (F + I) - min(2 * (p - 1), m - 1) * W, 0),
        }
        held = {"1f1b": [p - r for r in range(p)], "zb-h1": [p] * p, "zb-h2": [2 * p - 1] * p}
        for schedule in idle:
            found = simulate(order(schedule, p, m), even(p, F, I, W))
            assert found.longest - m * (F + I + W) == idle[schedule], schedule
            assert found.in_flight() == [min(n, m) for n in held[schedule]], schedule
            done = sorted((a.kind, a.batch) for a, *_ in found.rows[-1])
            assert done == sorted((kind, j) for kind in ("FB" if schedule == "1f1b" else "FIW")
                                  for j in range(m))


def test_stages_lie_on_ranks_as_torch_lays_them():
    for schedule in SCHEDULES:
        for p in (1, 2, 4):
            for rank, row in enumerate(torch_order(schedule, p, 2 * p)):
                assert sorted({a.stage for a in row}) == stages_of(schedule, p, rank)
    assert stages_of("zbv", 4, 1) == [1, 6] and stages_of("interleaved", 4, 1) == [1, 5]


def test_a_measured_timeline_starts_where_it_starts():
    rows = [[Slot(Action("F", 0, 0), 100.0, 101.0)], [Slot(Action("F", 1, 0), 101.5, 103.5)]]
    found = Timeline(rows)
    assert found.makespan == 3.5 and found.bubble == pytest.approx(1 - 3 / 7)
    assert found.rolling_bubble == pytest.approx(1 - 1.5 / 2)


@pytest.mark.parametrize("schedule", ["zbv", "1f1b"])
def test_times_are_found_again_in_what_was_measured(schedule):
    stages = n_stages(schedule, 2)
    halves = [2.0 + i for i in range(stages)]
    W = halves if schedule == "1f1b" else [0.5 + i for i in range(stages)]
    times = Times([1.0 + i for i in range(stages)], halves, W)
    rows = simulate(torch_order(schedule, 2, 5), times).rows
    late = rows[0][2]._replace(end=rows[0][2].end + 50)                    # one that took long
    assert times_of(Timeline([[*rows[0][:2], late, *rows[0][3:]], *rows[1:]])) == times


def test_refusals():
    refused(lambda: order("zbv", 2, 4), "schedule: 'zbv'", "torch's")
    refused(lambda: stages_of("zbv", 2, 2), "rank: 2, expected 0 to 1")
    refused(lambda: stages_of("v", 2, 0), "schedule: 'v', expected one of gpipe, 1f1b")
    stuck = [[Action("B", 0, 0), Action("F", 0, 0)]]
    refused(lambda: simulate(stuck, even(1)), "rank 0 waits forever", "B0 of stage 0")

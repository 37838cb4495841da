# SPDX-License-Identifier: MIT
"""Figures of pipelines: nothing clipped, titles and boxes from the data, the slider's pictures."""

import sys

import matplotlib
import numpy as np
import pytest
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.figures.pipeline import WORK
from dsv2_ref.parallel.pipeline import torch_order
from dsv2_ref.parallel.schedule import SCHEDULES, Times, even, n_stages, order, simulate

ONE = {"1f1b": simulate(order("1f1b", 2, 4), even(2))}
ALL = {name: simulate(torch_order(name, 2, 4), even(n_stages(name, 2))) for name in SCHEDULES}
WIDE = {"zbv": simulate(torch_order("zbv", 16, 2), even(32))}
M = [4, 8, 16, 32]
BUBBLES = {"1f1b": [3 / (m + 3) for m in M], "zbv": [0.1, 0.05, 0.03, 0.014]}
DRAW = {
    "schedule_gantt": lambda: figures.schedule_gantt(ONE),
    "schedule_gantt, all": lambda: figures.schedule_gantt(ALL),
    "schedule_gantt, wide": lambda: figures.schedule_gantt(WIDE, "seconds"),
    "bubble_curves": lambda: figures.bubble_curves(
        M, BUBBLES, {"1f1b": BUBBLES["1f1b"], "zbv": [None] * 4}),
    "bubble_curves, all": lambda: figures.bubble_curves(
        M, {name: [0.4, 0.3, 0.02 * i, 0.0] for i, name in enumerate(SCHEDULES)}),
    "in_flight_bars": lambda: figures.in_flight_bars({"gpipe": [8, 8, 8, 8], "1f1b": [4, 3, 2, 1]}),
    "phase_bars": lambda: figures.phase_bars(
        {"rank 0": {"a": 2**20, "b": 3 * 2**20}, "rank 1": {"a": 2**21, "b": 0}}),
    "in_flight_bars, all": lambda: figures.in_flight_bars(
        {name: np.linspace(30, 10 + i, 16) for i, name in enumerate(SCHEDULES)}),
}
LABELS = {
    "schedule_gantt": ("time (forwards)", "rank", "1f1b: idle 20 % of the time"),
    "schedule_gantt, wide": ("seconds", "rank", None),
    "bubble_curves": ("micro-batches", "ranks idle (% of a step)",
                      "At 32 micro-batches: 1f1b 9 %, zbv 1 %"),
    "phase_bars": ("", "MiB", "The fullest rank holds 3 MiB, in b"),
    "in_flight_bars": ("rank", "kept at most (GiB)",
                       "The fullest rank keeps 8 GiB with gpipe, 4 with 1f1b"),
}


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure)
    assert all(len(ax.get_title(loc="left")) > 10 for ax in figure.axes)


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_titles_are_computed(name):
    ax = DRAW[name]().axes[0]
    x, y, title = LABELS[name]
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x, y)
    assert title is None or ax.get_title(loc="left") == title


def test_a_box_for_each_action_at_its_time():
    ax = DRAW["schedule_gantt"]().axes[0]
    slots = [slot for row in ONE["1f1b"].rows for slot in row]
    assert len(ax.patches) == len(slots) == 16
    for box, (action, start, end) in zip(ax.patches, slots, strict=True):
        assert (box.get_x(), box.get_width()) == (start, end - start)
        assert round(box.get_y() + 0.42) == action.stage                    # a stage a rank here
        assert matplotlib.colors.to_hex(box.get_facecolor()).upper() == WORK[action.kind]
    assert [text.get_text() for text in ax.texts] == [str(action.batch) for action, _, _ in slots]


def test_the_second_stage_of_a_rank_is_pale_and_numbers_need_room():
    ax = figures.schedule_gantt({"zbv": ALL["zbv"]}).axes[0]
    stages = [slot.action.stage for row in ALL["zbv"].rows for slot in row]
    pale = [min(box.get_facecolor()[:3]) >= 0.5 for box in ax.patches]
    assert pale == [stage >= 2 for stage in stages]
    short = simulate(order("1f1b", 2, 4), Times([0.01, 9], [9, 9], [9, 9]))
    assert len(figures.schedule_gantt({"a": short}).axes[0].texts) == 12
    numbers = figures.schedule_gantt({"a": simulate(order("1f1b", 2, 12), even(2))}).axes[0].texts
    assert len(numbers) == 48                                # as many digits, as much room for all
    assert len(DRAW["schedule_gantt, wide"]().axes[0].get_yticks()) == 4


def test_a_measured_timeline_begins_at_its_first_action():
    rows = [[slot._replace(start=slot.start + 50, end=slot.end + 50) for slot in row]
            for row in ONE["1f1b"].rows]
    ax = figures.schedule_gantt({"measured": type(ONE["1f1b"])(rows)}).axes[0]
    assert ax.patches[0].get_x() == 0 and ax.get_xlim() == (0, 15)


def test_rings_are_the_published_values():
    lines = DRAW["bubble_curves"]().axes[0].lines
    rings = [line for line in lines if line.get_fillstyle() == "none"]
    assert len(lines) == 3 and len(rings) == 1
    assert rings[0].get_ydata() == pytest.approx([300 / (m + 3) for m in M])


def test_equal_lines_are_one_and_a_schedule_has_one_colour():
    equal = {"gpipe": BUBBLES["1f1b"], **BUBBLES}
    lines = figures.bubble_curves(M, equal, dict.fromkeys(equal, [0.1] * 4)).axes[0].lines
    assert [line.get_label() for line in lines if line.get_ls() == "-"] == ["gpipe, 1f1b", "zbv"]
    assert sum(line.get_fillstyle() == "none" for line in lines) == 3
    bars = figures.in_flight_bars({"zbv": [1, 2]}).axes[0].patches
    assert matplotlib.colors.same_color(bars[0].get_facecolor(), lines[-1].get_color())


def test_bars_of_a_phase_are_its_bytes():
    bars = DRAW["phase_bars"]().axes[0].patches
    assert [bar.get_height() for bar in bars] == [1, 3, 2, 0]
    assert bars[0].get_x() < bars[2].get_x() < bars[1].get_x()          # ranks within a phase


def test_refusals():
    refused(lambda: figures.schedule_gantt({}), "timelines: none")
    refused(lambda: figures.bubble_curves([1, 2], {"a": [1]}), "bubbles: [1]", "expected 2")
    refused(lambda: figures.phase_bars({"a": {"x": 1}, "b": {"y": 1}}), "ranks: phases", "same")
    refused(lambda: figures.in_flight_bars({"a": [1], "b": [1, 2]}), "held: [1, 2]")


@pytest.mark.parametrize("widgets", [True, False])
def test_the_slider_shows_what_it_is_set_to(widgets, monkeypatch):
    if widgets:
        pytest.importorskip("ipywidgets")
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    several = {(p, m): {"1f1b": simulate(order("1f1b", p, m), even(p))}
               for p, m in ((2, 4), (4, 8))}
    knob, picture = figures.pipeline_slider(several).children
    for size in (4, 8), (2, 4):
        knob.value = size
        assert bytes(picture.value) == figures.schedule_gantt(several[size])._repr_png_()

# SPDX-License-Identifier: MIT
"""Figures of a cluster on paper: what is drawn is what was given, and titles are computed."""

import pytest
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures

STAGES = [{"weights": 5e9, "kept": 30e9}, {"weights": 4e9, "kept": 50e9}, {"weights": 6e9,
                                                                           "kept": 10e9}]
RANGES = {"experts": (135e3, 181e3), "other": (138e3, 166e3), "again": (149e3, 163e3)}
HOURS = {"batch kept": [130e3, 149e3, 910e3], "batch grown": [147e3, 149e3, 149e3]}
DRAW = {
    "stage_memory": lambda: figures.stage_memory(STAGES, [3, 4, 2], 80e9,
                                                 {"nothing again": [90e9, 131e9, 70e9]}),
    "stage_memory, alone": lambda: figures.stage_memory(STAGES[:1], [3], 80e9),
    "stage_memory, sixteen": lambda: figures.stage_memory(STAGES * 5 + STAGES[:1], [4] * 16, 80e9,
                                                          {"a": [9e10] * 16, "b": [2e10] * 16}),
    "hour_ranges": lambda: figures.hour_ranges(RANGES, 149e3, 172.8e3,
                                               {"experts": ("0.55", "0.25")}),
    "hour_ranges, long words": lambda: figures.hour_ranges(
        RANGES, 149e3, 181e3, {name: ("nothing again", "more again") for name in RANGES}),
    "hour_ranges, long names": lambda: figures.hour_ranges(
        {f"{name}: share of the peak in products over sorted slots": pair
         for name, pair in RANGES.items()}, 149e3, 172.8e3),
    "hour_ranges, one": lambda: figures.hour_ranges({"experts": (100e3, 200e3)}, 149e3, 172.8e3),
    "hours_by_devices": lambda: figures.hours_by_devices([128, 2048, 65536], HOURS, 172.8e3),
}
TITLES = {
    "stage_memory": "Fullest device: 54 of 80 GB; nothing again: 131 GB",
    "stage_memory, alone": "Fullest device: 35 of 80 GB",
    "hour_ranges": "Least certain: experts, 135K to 181K",
    "hours_by_devices": "128 to 64K devices: hours times 7.0 and 1.0",
}
LABELS = {
    "stage_memory": ("stage, and how many layers it has", "memory of one device (GB)"),
    "hour_ranges": ("GPU-hours per trillion tokens (thousands)", ""),
    "hours_by_devices": ("devices", "GPU-hours per trillion tokens (thousands)"),
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    figures.save(figure, tmp_path / "figure.png")
    assert is_whole(figure)


@pytest.mark.parametrize("name", TITLES)
def test_titles_are_computed(name):
    assert DRAW[name]().axes[0].get_title(loc="left") == TITLES[name]


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_in_which_unit(name):
    ax = DRAW[name]().axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == LABELS[name]


def test_stages_stack_beside_the_card_and_the_other_plans():
    ax = DRAW["stage_memory"]().axes[0]
    assert [(bar.get_y(), bar.get_height()) for bar in ax.patches] == [
        (0, 5), (0, 4), (0, 6), (5, 30), (4, 50), (6, 10)]
    other, card = ax.lines
    assert list(other.get_ydata()) == [90, 131, 70] and card.get_ydata()[0] == 80
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0\n3", "1\n4", "2\n2"]


def test_a_range_goes_from_its_best_over_the_middle_to_its_worst():
    ax = DRAW["hour_ranges"]().axes[0]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    assert [end for pair in ends for end in pair] == pytest.approx(
        [135, 149, 149, 181, 138, 149, 149, 166, 149, 149, 149, 163])
    assert [line.get_xdata()[0] for line in ax.lines] == pytest.approx([149, 172.8])
    assert [line.get_label() for line in ax.lines] == ["all in the middle: 149K",
                                                       "the paper: 172.8K"]
    assert [t.get_text() for t in ax.texts] == ["0.55", "0.25"]
    assert [t.xy for t in ax.texts] == [(135, 0), (181, 0)]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(RANGES)


def test_lines_of_growth_are_what_was_given():
    ax = DRAW["hours_by_devices"]().axes[0]
    kept, grown, published = ax.lines
    assert list(kept.get_ydata()) == [130, 149, 910] and list(grown.get_xdata()) == [128, 2048,
                                                                                     65536]
    assert published.get_ydata()[0] == pytest.approx(172.8)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "2K", "64K"]


def test_bad_input_is_refused_in_one_line():
    refused(lambda: figures.stage_memory([], [], 80e9), "stages, layers: 0 and 0")
    refused(lambda: figures.stage_memory(STAGES, [1], 80e9), "3 and 1")
    refused(lambda: figures.stage_memory(STAGES, [1] * 3, 80e9, {"a": [1.0]}), "[1] totals", "3")
    refused(lambda: figures.hour_ranges({}, 1, 1), "at least one")
    refused(lambda: figures.hour_ranges({"a": (2, 1)}, 1, 1), "best hours first")
    refused(lambda: figures.hours_by_devices([1], {"a": [1, 2]}, 1), "[2] values", "1 each")

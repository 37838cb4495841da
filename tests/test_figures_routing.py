# SPDX-License-Identifier: MIT
"""Figures of experts and of the limit on devices: what is drawn is what was given."""


import numpy as np
import pytest
import torch
from drawn import is_whole
from matplotlib.colors import to_hex

from dsv2_ref import figures
from dsv2_ref.figures.routing import CHOSEN, IN_REACH, OUT_OF_REACH

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = ["name", "colour", "punctuation"]
LIFT = np.array([[1.0, 0.5, 1.5, 1.0], [0.2, 3.25, 0.3, 0.25], [1.1, 0.8, 1.0, 1.1]])
COST = np.array([[0.1, 0.0, 0.31, 0.2], [0.002, -0.003, 0.25, 0.0], [0.0, 0.9, 0.1, 0.2]])
TRAFFIC = torch.tensor([[40, 10, 10], [0, 50, 10], [20, 0, 60]])
SCORES = [0.30, 0.04, 0.20, 0.18, 0.05, 0.23]            # six experts on three devices
REACHED = {1: 1.0, 2: 2.0, 3: 2.75, 4: 2.75}
RUNS = [{"max_devices": m, "seed": seed, "bits_per_byte": bits}
        for seed, row in ((0, (1.1, 1.01, 1.0)), (1, (0.84, 0.79, 0.8)))
        for m, bits in zip((1, 2, 3), row, strict=True)]
DRAW = {
    "expert_lift": lambda: figures.expert_lift(LIFT, KINDS),
    "ablation_cost": lambda: figures.ablation_cost(torch.tensor(COST), KINDS),
    "ablation_cost, nothing": lambda: figures.ablation_cost(COST * 0, KINDS),
    "device_messages": lambda: figures.device_messages(REACHED, 2),
    "device_traffic": lambda: figures.device_traffic(TRAFFIC),
    "token_routing": lambda: figures.token_routing(SCORES, 2, 3, 2),
    "token_routing, one device": lambda: figures.token_routing(SCORES, 2, 1, 1),
    "limit_quality": lambda: figures.limit_quality(RUNS),
}
LABELS = {
    "expert_lift": [("routed expert", "kind of token"),
                    ("", "share of the gates (all tokens = 1)")],
    "ablation_cost": [("routed expert", "kind of token"), ("", "more loss (nats per token)")],
    "device_messages": [("limit M (devices a token may reach)", "devices reached (mean)")],
    "device_traffic": [("to device", "from device"), ("", "messages")],
    "token_routing": [("routed expert", "affinity")],
    "limit_quality": [("limit M (devices a token may reach)",
                       "bits per byte against no limit (%)")],
}
TITLES = {
    "expert_lift": "“colour”: expert 1 gets 3.2 times its usual share of the gates",
    "ablation_cost": "Without expert 1 a token after “punctuation” costs 0.90 nats more",
    "device_messages": "M = 2: 2.00 messages per token; without a limit 2.75",
    "device_traffic": "25 % of the messages leave their device",
    "token_routing": "M = 2: experts 0, 5, gates 0.53 in all",
    "limit_quality": "Within one seed a limit changes bits per byte by -1.2 to +10.0 %",
}


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def colors(ax) -> list[str]:
    return [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").read_bytes().startswith(PNG)
    assert is_whole(figure)


@pytest.mark.parametrize("name", TITLES)
def test_titles_are_computed_and_axes_are_labelled(name):
    axes = DRAW[name]().axes
    assert axes[0].get_title(loc="left") == TITLES[name]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == LABELS[name]


def test_tables_show_each_value_in_its_cell():
    ax = DRAW["expert_lift"]().axes[0]
    assert np.array_equal(ax.images[0].get_array(), LIFT)
    assert texts(ax) == [f"{v:.1f}" for v in LIFT.flatten()]
    ax = DRAW["ablation_cost"]().axes[0]
    assert texts(ax)[4:8] == ["0.00", "0.00", "0.25", "0.00"]        # no minus sign on noise
    assert [t.get_text() for t in ax.get_yticklabels()] == KINDS


def test_writing_is_light_on_dark_cells_alone():
    ax = DRAW["device_traffic"]().axes[0]
    light = [text.get_color() == "white" for text in ax.texts]
    assert light == [bool(n == 60) for n in TRAFFIC.flatten()]


def test_the_limit_that_is_meant_stands_out():
    ax = DRAW["device_messages"]().axes[0]
    assert colors(ax) == [IN_REACH, CHOSEN, IN_REACH, IN_REACH]
    assert [bar.get_height() for bar in ax.patches] == list(REACHED.values())
    assert texts(ax) == ["1.00", "2.00", "2.75", "2.75"]


@pytest.mark.parametrize("limit, chosen, reach", [
    (1, [0, 1], [0, 1]), (2, [0, 5], [0, 1, 4, 5]), (3, [0, 5], [0, 1, 2, 3, 4, 5])])
def test_a_token_goes_where_v2_sends_it(limit, chosen, reach):
    """By its best expert device 2 beats device 1; by the sum of its two it would not."""
    ax = figures.token_routing(SCORES, 2, 3, limit).axes[0]
    assert colors(ax) == [CHOSEN if e in chosen else IN_REACH if e in reach else OUT_OF_REACH
                          for e in range(6)]
    assert texts(ax)[-3:] == ["device 0", "device 1", "device 2"]


def test_messages_at_home_are_framed():
    boxes = DRAW["device_traffic"]().axes[0].patches
    assert [(b.get_x() + b.get_width() / 2, b.get_y() + b.get_height() / 2) for b in boxes] == [
        (i, pytest.approx(i)) for i in range(3)]


def test_each_seed_is_compared_with_its_own_run_without_a_limit():
    """Seed 1 is 20 % better throughout, which is no answer to what a limit does."""
    lines = DRAW["limit_quality"]().axes[0].lines
    assert [line.get_label() for line in lines] == ["no limit", "seed 0", "seed 1", "mean"]
    assert np.allclose([line.get_ydata() for line in lines],
                       [[0, 0], [10, 1], [5, -1.25], [7.5, -0.125]])
    assert all(np.round(line.get_xdata()).tolist() == [1, 2] for line in lines[1:])


@pytest.mark.parametrize("call, message", [
    (lambda: figures.expert_lift(LIFT, KINDS[1:]), r"lift: shape \(3, 4\), .* 2 rows"),
    (lambda: figures.ablation_cost(COST[0], KINDS), r"cost: shape \(4,\), expected two dim"),
    (lambda: figures.device_messages(REACHED, 9), r"limit: 9, expected one of \[1, 2, 3, 4\]"),
    (lambda: figures.device_traffic(TRAFFIC[1:]), "as many rows as columns"),
    (lambda: figures.device_traffic(TRAFFIC * 0), "0 messages"),
    (lambda: figures.token_routing(SCORES, 2, 4, 1), "scores: 6 on 4 devices"),
    (lambda: figures.token_routing(SCORES, 3, 3, 1), "at most 3 = top_k experts on 1"),
    (lambda: figures.limit_quality(RUNS[1:]), "runs: 5 for 3 limits and 2 seeds"),
    (lambda: figures.limit_quality([]), "runs: 0"),
    (lambda: figures.limit_quality(RUNS[::3]), "at least two limits"),
    (lambda: figures.device_limit_slider(SCORES[:5], 2, 3), "scores: 5 on 3 devices"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_slider_redraws_when_it_is_moved():
    pytest.importorskip("ipywidgets")
    slider, image = figures.device_limit_slider(SCORES, 3, 3).children
    assert (slider.min, slider.max, slider.value) == (2, 3, 3)       # M = 1 has two experts
    free = image.value
    assert bytes(free).startswith(PNG)
    slider.value = 2
    assert image.value != free and bytes(image.value).startswith(PNG)
    slider.value = 3
    assert image.value == free

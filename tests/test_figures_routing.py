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
SHARES = np.array([[0.25, 0.2, 0.3, 0.25], [0.02, 0.9, 0.05, 0.03], [0.4, 0.3, 0.2, 0.1]])
PANELS = {"Before": np.full((3, 4), 0.25), "After": torch.tensor(SHARES)}
BITS = {"by choice": {"trained": 0.1, "untrained": [0.12, 0.2], "shuffled": 0.01},
        "by gate": {"trained": 0.6, "untrained": (0.1, 0.2), "shuffled": 0.02}}
DOTS = {"A kind": BITS, "A token": {row: {**told, "trained": 1.0} for row, told in BITS.items()}}
COST = np.array([[0.1, 0.0, 0.31, 0.2], [0.002, -0.003, 0.25, 0.0], [0.0, 0.9, 0.1, 0.2]])
TRAFFIC = torch.tensor([[40, 10, 10], [0, 50, 10], [20, 0, 60]])
SCORES = [0.30, 0.04, 0.20, 0.18, 0.05, 0.23]            # six experts on three devices
REACHED = {1: 1.0, 2: 2.0, 3: 2.75, 4: 2.75}
RUNS = [{"max_devices": m, "seed": seed, "bits_per_byte": bits}
        for seed, row in ((0, (1.1, 1.01, 1.0)), (1, (0.84, 0.79, 0.8)))
        for m, bits in zip((1, 2, 3), row, strict=True)]
DRAW = {
    "expert_shares": lambda: figures.expert_shares(PANELS, KINDS),
    "expert_shares, three": lambda: figures.expert_shares({**PANELS, "Other": SHARES}, KINDS),
    "expert_shares, one": lambda: figures.expert_shares({"After": SHARES}, KINDS),
    "information_dots": lambda: figures.information_dots(DOTS),
    "ablation_cost": lambda: figures.ablation_cost(torch.tensor(COST), KINDS),
    "ablation_cost, nothing": lambda: figures.ablation_cost(COST * 0, KINDS),
    "device_messages": lambda: figures.device_messages(REACHED, 2),
    "device_traffic": lambda: figures.device_traffic(TRAFFIC),
    "token_routing": lambda: figures.token_routing(SCORES, 2, 3, 2),
    "token_routing, one device": lambda: figures.token_routing(SCORES, 2, 1, 1),
    "limit_quality": lambda: figures.limit_quality(RUNS),
}
LABELS = {
    "expert_shares": [("routed expert", "kind of token"), ("routed expert", ""),
                      ("", "share of each expert (%)")],
    "information_dots": [("bits", ""), ("bits", "")],
    "ablation_cost": [("routed expert", "kind of token"), ("", "more loss (nats per token)")],
    "device_messages": [("limit M (devices a token may reach)", "devices reached (mean)")],
    "device_traffic": [("to device", "from device"), ("", "messages")],
    "token_routing": [("routed expert", "affinity")],
    "limit_quality": [("limit M (devices a token may reach)", "bits per byte"),
                      ("limit M (devices a token may reach)", "against no limit, same seed (%)")],
}
TITLES = {
    "expert_shares": "Before: at most 25 %",
    "information_dots": "A kind: 3.0 times untrained, by gate",
    "ablation_cost": "Without expert 1 a token after “punctuation” costs 0.90 nats more",
    "device_messages": "M = 2: 2.00 messages per token; without a limit 2.75",
    "device_traffic": "25 % of the messages leave their device",
    "token_routing": "M = 2: experts 0, 5, gates 0.53 in all",
    "limit_quality": "Another seed changes 25.0 to 31.0 %",
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
    before, after, bar = DRAW["expert_shares"]().axes
    assert np.allclose(after.images[0].get_array(), 100 * SHARES)
    assert texts(after) == [f"{100 * v:.0f}" for v in SHARES.flatten()]
    assert after.get_title(loc="left") == "After: at most 90 %"
    assert before.images[0].get_clim() == after.images[0].get_clim() == (0, 100)
    assert tuple(bar.get_ylim()) == (0, 100)
    assert len(DRAW["expert_shares, three"]().axes) == 4           # no empty panel, and a bar
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


def test_dots_are_the_bits_and_each_row_is_compared_with_the_best_untrained():
    kind, token = DRAW["information_dots"]().axes
    crosses, hollow, filled = kind.lines[3:6]                        # of the second row
    assert (list(crosses.get_xdata()), list(filled.get_xdata())) == ([0.02], [0.6])
    assert list(hollow.get_xdata()) == [0.1, 0.2] and list(hollow.get_ydata()) == [1, 1]
    assert [t.get_text() for t in kind.texts] == ["0.5 times", "3.0 times"]
    assert [t.get_text() for t in token.texts] == ["5.0 times", "5.0 times"]
    assert [t.get_text() for t in kind.get_yticklabels()] == ["by choice", "by gate"]


def test_each_seed_is_compared_with_its_own_run_without_a_limit():
    """Seed 1 is 20 % better throughout, which is no answer to what a limit does."""
    runs, change = DRAW["limit_quality"]().axes
    assert [line.get_label() for line in runs.lines] == ["seed 0", "seed 1"]
    assert [list(line.get_ydata()) for line in runs.lines] == [[1.1, 1.01, 1.0], [0.84, 0.79, 0.8]]
    assert np.allclose([line.get_ydata() for line in change.lines[:2]], [[10, 1, 0], [5, -1.25, 0]])
    assert change.get_title(loc="left") == "Same seed, a limit: -1.2 to +10.0 %"
    assert [t.get_text() for t in runs.get_xticklabels()] == ["1", "2", "none"]


@pytest.mark.parametrize("call, message", [
    (lambda: figures.expert_shares(PANELS, KINDS[1:]), r"Before: shape \(3, 4\), .* 2 rows"),
    (lambda: figures.expert_shares({"a": 2 * SHARES}, KINDS), "shares: 1 tables, .* sum to 1"),
    (lambda: figures.expert_shares({}, KINDS), "shares: 0 tables"),
    (lambda: figures.information_dots({}), "panels: expected at least one"),
    (lambda: figures.information_dots({"a": BITS, "b": {}}), "the same rows in each"),
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

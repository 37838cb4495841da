# SPDX-License-Identifier: MIT
"""Figures: written, labelled, nothing clipped, nothing left behind; and a slider that moves."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from drawn import is_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dsv2_ref import figures
from dsv2_ref.figures.style import MORE_COLORS

BYTES = {"MHA": 3_932_160, "GQA": 983_040, "MQA": 30_720, "MLA": 69_120}
PNG = b"\x89PNG\r\n\x1a\n"


def log(n=300):
    noise = np.random.default_rng(0).normal(0, 0.08, n)
    records = [
        {"step": i, "tokens": (i + 1) * 8192, "language": 1.9 + 4.4 * np.exp(-i / 60) + noise[i],
         "expert": 0.003, "device": 0.05, "communication": 0.02, "lr": 1e-3, "seconds": 0.1 * i}
        for i in range(n)
    ]
    for record in records[29::30]:
        record["bits_per_byte"] = 1.7 + 2.2 * np.exp(-record["step"] / 120)
    return records


def gates(n_tokens=12, n_experts=32):
    g = torch.zeros(n_tokens, n_experts)
    generator = torch.Generator().manual_seed(0)
    for row in g:
        row[torch.randperm(n_experts, generator=generator)[:4]] = 0.1
    return g


TEXTS = ["def", " sort", "(", "x", "):", "\n", "    ", "if", "$a$", "$b", "你好", "\x00"]
LOAD = np.random.default_rng(0).multinomial(6000, [1 / 48] * 48, size=7)
DRAW = {
    "loss_curve": lambda: figures.loss_curve(log(), {"gzip": 2.41, "xz": 2.17}),
    "loss_curve, training alone": lambda: figures.loss_curve(
        [{"tokens": r["tokens"], "language": r["language"]} for r in log()]),
    "loss_curve, one record": lambda: figures.loss_curve(log(1)),
    "cache_bars": lambda: figures.cache_bars(BYTES),
    "cache_bars, more": lambda: figures.cache_bars({**BYTES, "MLA, six bits": 25_920}),
    "expert_load": lambda: figures.expert_load(torch.from_numpy(LOAD), 8, first_layer=1),
    "expert_load, one device": lambda: figures.expert_load(LOAD[:1]),
    "router_heat_map": lambda: figures.router_heat_map(gates(), TEXTS, 4),
    "cache_against_context": lambda: figures.cache_against_context(BYTES, figures.LENGTHS, 80e9),
    "cache_against_context, more": lambda: figures.cache_against_context(
        {**BYTES, "MLA, six bits": 25_920}, figures.LENGTHS),
}
LABELS = {
    "loss_curve": [("tokens read (millions)", "training loss (nats per token)"),
                   ("tokens read (millions)", "held-out text (bits per byte)")],
    "cache_bars": [("cache of one token, all layers (bytes)", "")],
    "expert_load": [("routed expert", "layer"), ("", "load (fair share = 1)")],
    "router_heat_map": [("routed expert", "token"), ("", "gate (weight of the expert)")],
    "cache_against_context": [("context length (tokens)", "cache of one sequence (GiB)")],
}


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    path = figures.save(figure, tmp_path / "new" / "folder" / "figure.png")
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    assert figure.get_constrained_layout()
    assert is_whole(figure)
    assert all(len(ax.get_title(loc="left")) > 10 for ax in figure.axes if ax.get_title("left"))
    assert figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_in_which_unit(name):
    axes = DRAW[name]().axes
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == LABELS[name]


def test_titles_state_the_message_from_the_data():
    title = figures.cache_bars(BYTES).axes[0].get_title(loc="left")
    assert title == "MLA caches 56.9 times less than MHA"
    assert figures.cache_bars({"MLA": 10, "MHA": 40}).axes[0].get_title(loc="left") == (
        "MLA caches 4 times less than MHA")
    for references, end in (({"gzip": 2.41, "xz": 2.17}, ", below xz"), ({"xz": 1.0}, "byte"),
                            ({"gzip": 2.41, "xz": 1.0}, ", below gzip")):
        held_out = figures.loss_curve(log(), references).axes[1]
        assert held_out.get_title(loc="left").endswith(end)
    load = np.ones((2, 4))
    load[1] = 3, 1, 0, 0
    assert "3.0 times its fair share, the emptiest 0.0" in (
        figures.expert_load(load, 2).axes[0].get_title(loc="left"))
    assert "4 of 32 experts" in DRAW["router_heat_map"]().axes[0].get_title(loc="left")


def test_bars_carry_values_ratios_and_the_colours_of_their_kind():
    ax = figures.cache_bars(BYTES).axes[0]
    assert [t.get_text() for t in ax.texts] == [
        "3,932,160", "983,040  (1/4 of MHA)", "30,720  (1/128 of MHA)", "69,120  (1/56.9 of MHA)"]
    assert [bar.get_width() for bar in ax.patches] == list(BYTES.values())
    lines = {line.get_color() for line in DRAW["cache_against_context"]().axes[0].lines}
    for bar, kind in zip(ax.patches, BYTES, strict=True):
        assert matplotlib.colors.to_hex(bar.get_facecolor()).upper() == figures.COLORS[kind]
        assert figures.COLORS[kind] in lines


def test_kinds_without_a_colour_of_their_own_get_different_ones():
    ax = figures.cache_bars({**BYTES, "a": 1, "b": 2, "c": 3}).axes[0]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 7


def test_gqa_has_its_colour_whatever_its_groups():
    kinds = {"MHA": 4, "GQA, 8 groups": 2, "MLA": 1, "MLA, six bits": 0.5}
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper()
              for bar in figures.cache_bars(kinds).axes[0].patches]
    assert colors[1] == figures.COLORS["GQA"] and len(set(colors)) == 4
    assert colors[3] == MORE_COLORS[0]      # the first of the other kinds, as without the groups


def test_heat_map_shows_shares_of_each_layer_and_device_borders():
    load = np.array([[1, 1, 1, 1, 1, 3], [10, 10, 10, 10, 10, 10]])
    ax = figures.expert_load(load, 3, first_layer=5).axes[0]
    shown = ax.images[0].get_array()
    assert np.allclose(shown[0], load[0] / (8 / 6)) and np.allclose(shown[1], 1)
    assert [line.get_xdata()[0] for line in ax.lines] == [1.5, 3.5]
    assert tuple(ax.images[0].get_extent()) == (-0.5, 5.5, 6.5, 4.5)
    assert len(figures.expert_load(load, 1).axes[0].lines) == 0
    one_layer = figures.expert_load(load[:1], 1, first_layer=1).axes[0]
    assert [y for y in one_layer.get_yticks() if 0.5 <= y <= 1.5] == [1]


def test_tokens_are_printable_labels_even_where_the_font_has_no_glyph():
    ax = DRAW["router_heat_map"]().axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["def", "·sort", "(", "x", "):", "\\n", "····", "if", "$a$", "$b", "□□", "□"]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())


def test_names_of_close_lines_do_not_overlap():
    figure = DRAW["cache_against_context, more"]()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = sorted((t.get_window_extent(renderer) for t in figure.axes[0].texts),
                   key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))


def test_context_axis_is_in_powers_of_two():
    ax = DRAW["cache_against_context"]().axes[0]
    assert ax.get_xscale() == "log" and ax.xaxis.get_transform().base == 2
    assert [ax.xaxis.get_major_formatter()(n) for n in (512, 1024, 131072)] == ["512", "1K", "128K"]
    mla = next(line for line in ax.lines if line.get_color() == figures.COLORS["MLA"])
    assert mla.get_ydata()[-1] == 69_120 * 131_072 / 2**30 == 8.4375


def test_running_mean_is_centred_and_keeps_a_straight_line():
    records = [{"tokens": i, "language": 5.0 - i * 0.01} for i in range(400)]
    raw, smooth = (line.get_ydata() for line in figures.loss_curve(records).axes[0].lines)
    assert np.allclose(smooth[20:-20], raw[20:-20])


@pytest.mark.parametrize("call, message", [
    (lambda: figures.loss_curve([]), "log: empty"),
    (lambda: figures.cache_bars({}), "bytes_per_token"),
    (lambda: figures.cache_bars({"MHA": 1, "MLA": 0}), "expected positive"),
    (lambda: figures.expert_load(LOAD, 5), r"load: shape \(7, 48\) on 5 devices"),
    (lambda: figures.expert_load(LOAD[0], 1), "two dimensions"),
    (lambda: figures.router_heat_map(gates(), TEXTS[1:]), "token_texts: 11 given, expected 12"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_same_data_gives_the_same_bytes(tmp_path):
    first, second = (figures.save(DRAW["cache_bars"](), tmp_path / n).read_bytes() for n in "ab")
    assert first == second == DRAW["cache_bars"]()._repr_png_()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = figures.save(DRAW["cache_bars"](), tmp_path / "figure.png")
    old = path.read_bytes()
    figure = DRAW["cache_against_context"]()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.save(figure, path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_settings_of_the_caller_stay_and_do_not_leak_in():
    plain = DRAW["cache_bars"]()._repr_png_()
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "black"}):
        names = set(matplotlib.rcParams) - {"backend"}      # reading it would choose one
        before = {name: matplotlib.rcParams[name] for name in names}
        assert DRAW["cache_bars"]()._repr_png_() == plain
        assert {name: matplotlib.rcParams[name] for name in names} == before


def test_pyplot_is_never_imported():
    code = ("import sys; from dsv2_ref import figures; figures.cache_bars({'MHA': 2, 'MLA': 1}); "
            "assert 'matplotlib.pyplot' not in sys.modules and 'ipywidgets' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_slider_redraws_when_it_is_moved():
    pytest.importorskip("ipywidgets")
    slider, image = figures.cache_slider(BYTES).children
    assert [text for text, _ in slider.options][::7] == ["1K", "128K"]
    longest = image.value
    assert bytes(longest).startswith(PNG)
    slider.value = 1024
    shortest = image.value
    assert shortest != longest and bytes(shortest).startswith(PNG)
    slider.value = figures.LENGTHS[-1]
    assert image.value == longest

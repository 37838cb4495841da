# SPDX-License-Identifier: MIT
"""Figures of the decode-time re-association and of the cache's savings: drawn, told, refused."""


import matplotlib
import pytest
from drawn import is_whole

from dsv2_ref import figures
from dsv2_ref.figures.absorption import bracket

BYTES = {"MHA": 3_932_160, "GQA, 8 groups": 245_760, "MQA": 30_720, "MLA": 69_120,
         "MLA, six bits": 26_160}
FLOPS = {
    "to decode: 1 new token on 4,096": {"expanded": (100e9, 2e9), "absorbed": (1e9, 5e9)},
    "to read a prompt: 4,096 new tokens": {"expanded": (100e9, 100e9), "absorbed": (100e9, 340e9)},
}
NEW = [1, 4, 16, 64, 256, 1024]
PREDICTED = [0.01, 0.04, 0.16, 0.5, 2.0, 3.0]
STEPS = {"67B at 16 bits": 400_000, "latent at 16 bits": 100_000, "six bits": 40_000}
READ = [32, 64, 96, 97, 98, 99, 100]
FILLED = {kind: [n * a for n in READ] for kind, a in (("MHA", 1152), ("MLA", 480))}
DRAW = {
    "absorption_flops": lambda: figures.absorption_flops(FLOPS),
    "absorption_crossover": lambda: figures.absorption_crossover(
        NEW, PREDICTED, [2 * r for r in PREDICTED], 130.4),
    "absorption_crossover, never": lambda: figures.absorption_crossover(
        NEW, PREDICTED, [r / 10 for r in PREDICTED], 130.4),
    "absorption_crossover, always": lambda: figures.absorption_crossover(
        NEW, PREDICTED, [200 * r for r in PREDICTED], 130.4),
    "absorption_regions": lambda: figures.absorption_regions(
        [16, 1024, 16384, 131072], [14, 146, 169, 170]),
    "saving_steps": lambda: figures.saving_steps(STEPS, ["one row", "six bits"]),
    "batch_bars": lambda: figures.batch_bars(BYTES, 32768, 80 * 2**30),
    "batch_bars, none fits": lambda: figures.batch_bars(BYTES, 131072, 2**20),
    "cache_growth": lambda: figures.cache_growth(READ, FILLED, prompt=96),
    "cache_growth, no prompt": lambda: figures.cache_growth(READ, FILLED),
}
TITLES = {
    "absorption_flops":
        "Absorbed needs 17 times fewer FLOPs to decode, 2.2 times more to read a prompt",
    "absorption_crossover":
        "Break-even: 130 new tokens by FLOPs, between 16 and 64 by the clock",
    "absorption_crossover, never":
        "Break-even: 130 new tokens by FLOPs, above 1024 by the clock",
    "absorption_crossover, always":
        "Break-even: 130 new tokens by FLOPs, below 1 by the clock",
    "absorption_regions": "At 128K tokens absorbed pays for up to 170 new ones",
    "saving_steps": "90.0 % saved: × 0.250 (one row) × 0.400 (six bits)",
    "batch_bars": "In 80 GiB fit 37 sequences with MLA, 0 with MHA",
    "cache_growth": "MLA fills 2.4 times less than MHA, token by token",
}


@pytest.mark.parametrize("name", DRAW)
def test_drawn_with_nothing_clipped(name):
    figure = DRAW[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert is_whole(figure)
    assert all(ax.get_xlabel() for ax in figure.axes)


@pytest.mark.parametrize("name", TITLES)
def test_titles_state_the_message_from_the_data(name):
    figure = DRAW[name]()
    assert (figure.get_suptitle() or figure.axes[0].get_title(loc="left")) == TITLES[name]


def test_a_crossing_lies_between_the_points_that_were_tried():
    assert bracket([1, 4], [0.5, 2.0]) == (1, 4)
    assert bracket([4, 8, 16, 32], [0.1, 0.9, 1.0, 3.0]) == (8, 16)
    assert bracket([1, 2], [0.1, 0.2]) is None and bracket([1, 2], [1.5, 2.0]) is None


def test_bars_show_projections_then_pairs_in_gflop():
    axes = DRAW["absorption_flops"]().axes
    assert [ax.get_title(loc="left") for ax in axes] == list(FLOPS)
    for ax, forms in zip(axes, FLOPS.values(), strict=True):
        bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
        parts = [n / 1e9 for form in ("expanded", "absorbed") for n in forms[form]]
        assert bars == [(0, parts[0]), (parts[0], parts[1]), (0, parts[2]), (parts[2], parts[3])]


def test_steps_say_what_each_of_them_leaves_of_the_one_before():
    texts = [t.get_text() for t in DRAW["saving_steps"]().axes[0].texts]
    assert texts == ["400,000", "100,000   × 0.250", "40,000   × 0.400"]


def test_growth_is_drawn_from_zero_in_kib():
    lines = DRAW["cache_growth"]().axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [0, 0]
    assert [line.get_ydata()[-1] for line in lines] == [1152 * 100 / 1024, 480 * 100 / 1024]
    assert matplotlib.colors.to_hex(lines[1].get_color()).upper() == figures.COLORS["MLA"]


def test_only_whole_sequences_fit():
    bars = [bar.get_width() for bar in DRAW["batch_bars"]().axes[0].patches]
    assert bars == [80 * 2**30 // (n * 32768) for n in BYTES.values()]
    assert [bar.get_width() for bar in DRAW["batch_bars, none fits"]().axes[0].patches] == [0] * 5


@pytest.mark.parametrize("call, message", [
    (lambda: figures.absorption_flops({}), "cases: expected"),
    (lambda: figures.absorption_flops({"a": {"expanded": (1, 1)}}), "cases: expected"),
    (lambda: figures.absorption_crossover([1], [1], [1], 1), "2 at least"),
    (lambda: figures.absorption_crossover([1, 2], [1, 2], [1], 1), "the same number"),
    (lambda: figures.absorption_regions([16, 32], [17, 20]), "limit: expected"),
    (lambda: figures.saving_steps({"a": 1}, []), "two at least"),
    (lambda: figures.saving_steps({"a": 1, "b": 2}, ["b"]), "that fall"),
    (lambda: figures.saving_steps({"a": 2, "b": 1}, []), "steps: .*expected 1 for 2 sizes"),
    (lambda: figures.batch_bars(BYTES, 0, 1), "context, memory_bytes: 0, 1"),
    (lambda: figures.batch_bars({}, 1, 1), "bytes_per_token"),
    (lambda: figures.cache_growth([1, 2], {"MLA": [1]}), r"filled: \[1\] sizes, expected 2"),
])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_memory_slider_redraws_when_it_is_moved():
    pytest.importorskip("ipywidgets")
    slider, image = figures.batch_slider(BYTES, 32768).children
    assert [text for text, _ in slider.options][::6] == ["10 GiB", "640 GiB"]
    most = image.value
    slider.value = 80
    assert image.value != most and bytes(image.value).startswith(b"\x89PNG")

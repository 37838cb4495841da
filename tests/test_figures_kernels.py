# SPDX-License-Identifier: MIT
"""Figures about kernels: nothing clipped, titles from the data, and "pending" where it is."""

import numpy as np
import pytest
from drawn import is_whole
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.figures.kernels import PENDING, shares, tile_kinds

SCORES = [1, 3, 2, 0, 4, 2, 3, 1]
WORK = {"16 heads": (16 * 2176, 1152), "16 heads, six bits": (16 * 2176, 436),
        "64 heads": (64 * 2176, 1152), "128 heads": (128 * 2176, 1152)}
WAYS = {"bf16": [("read", 1152)], "six bits, fused": [("read", 436)],
        "six bits, unpacked first": [("read", 436), ("write", 1152), ("read", 1152)]}
BYTES = {"bf16": 1152, "six bits": 436}
LAUNCHES = {"plain": {"other": 80, "products": 40}, "fused": {"products": 40, "steps": 10}}
DRAW = {
    "program_grid": lambda: figures.program_grid(10, 4),
    "attention_tiles": lambda: figures.attention_tiles(8, 8, 2, 2),
    "attention_tiles, ragged": lambda: figures.attention_tiles(5, 13, 4, 4),
    "softmax_in_pieces": lambda: figures.softmax_in_pieces(SCORES, 4),
    "softmax_in_pieces, more": lambda: figures.softmax_in_pieces(SCORES + [9], 2),
    "decode_roofline": lambda: figures.decode_roofline(WORK, 4.8, 989, "data sheet"),
    "decode_roofline, measured": lambda: figures.decode_roofline(
        WORK, 4.3, 785, "measured", {"a run": (30.0, 100.0)}),
    "bytes_moved": lambda: figures.bytes_moved(WAYS),
    "decode_floors": lambda: figures.decode_floors((8, 16, 32, 64, 128), 2176, BYTES, 2**19,
                                                   4.8, 989),
    "launch_bars": lambda: figures.launch_bars(LAUNCHES, 4),
}


def title(name: str) -> str:
    return DRAW[name]().axes[0].get_title(loc="left")


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure)
    ax = figure.axes[0]
    assert len(ax.get_title(loc="left")) > 10 and ax.get_xlabel()


@pytest.mark.parametrize(("T", "S", "BM", "BN"), [(8, 8, 2, 2), (5, 13, 4, 4), (7, 7, 3, 2),
                                                  (1, 9, 4, 4), (8, 8, 8, 8)])
def test_tiles_are_what_the_mask_says(T, S, BM, BN):
    mask = np.tril(np.ones((T, S), bool), S - T)
    for i, row in enumerate(tile_kinds(T, S, BM, BN)):
        for j, kind in enumerate(row):
            tile = mask[i * BM : (i + 1) * BM, j * BN : (j + 1) * BN]
            assert kind == ("whole" if tile.all() else "masked" if tile.any() else "skipped")


def test_shares_are_softmaxes_of_what_was_seen():
    first, second = shares(SCORES, 4)
    assert first * 15 == pytest.approx([2, 8, 4, 1])
    assert second * 45 == pytest.approx([2, 8, 4, 1, 16, 4, 8, 2])


def test_titles_state_the_message_from_the_data():
    assert title("program_grid") == "3 programs of 4 places; 2 of these do not exist"
    assert title("attention_tiles") == "6 of 16 tiles are never loaded, 4 need a mask"
    assert title("softmax_in_pieces").endswith("by one factor: 0.33")
    assert title("decode_roofline") == "Memory is the limit of 3 of 4: those left of the ridge"
    assert title("bytes_moved") == ("six bits, fused: 2.6 times less\n"
                                    "six bits, unpacked first: 2.4 times more")
    assert title("launch_bars") == "Launches a layer: 30 to 12"
    assert title("decode_floors") == "six bits gains 2.6x at 8 heads and 1.0x at 128"


def test_launches_are_told_by_kind_the_most_first():
    ax = DRAW["launch_bars"]().axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["other", "products", "steps"]
    assert [bar.get_width() for bar in ax.patches] == [20, 10, 0, 0, 10, 2.5]
    assert [t.get_text() for t in ax.texts] == ["20", "10", "0", "0", "10", "2.5"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain: 120", "fused: 50"]


def test_numbers_that_are_missing_are_said_to_be():
    texts = [[t.get_text() for t in DRAW[name]().axes[0].texts]
             for name in ("decode_roofline", "decode_roofline, measured")]
    assert PENDING in texts[0] and "a run" not in texts[0]
    assert PENDING not in texts[1] and "a run" in texts[1]


def test_points_lie_on_the_roof():
    ax = DRAW["decode_roofline"]().axes[0]
    tops = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines
                  if line.get_marker() == "o")
    assert tops[0] == pytest.approx((16 * 2176 / 1152, 16 * 2176 / 1152 * 4.8))
    assert tops[-1] == pytest.approx((128 * 2176 / 1152, 989))


def test_floors_are_the_slower_of_reading_and_multiplying():
    ax = DRAW["decode_floors"]().axes[0]
    bf16, six = (line.get_ydata() for line in ax.lines if line.get_marker() == "o")
    assert bf16[0] == pytest.approx(2**19 * 1152 / 4.8e12 * 1e6)             # microseconds
    assert six[-1] == bf16[-1] == pytest.approx(2**19 * 128 * 2176 / 989e12 * 1e6)


def test_refusals():
    refused(lambda: figures.program_grid(0, 4), "n, block", "positive")
    refused(lambda: figures.attention_tiles(4, 3, 2, 2), "T, S", "expected", "S >= T")
    refused(lambda: figures.softmax_in_pieces([1, 2], 2), "scores", "two tiles")
    refused(lambda: figures.decode_roofline({}, 1, 1, ""), "work", "positive")
    refused(lambda: figures.decode_roofline({"a": (1, 0)}, 1, 1, ""), "work", "positive")
    refused(lambda: figures.bytes_moved({"a": [("x", 1)]}), "ways", "two at least")
    refused(lambda: figures.decode_floors([1], 1, BYTES, 1, 1, 1), "heads", "expected two")
    refused(lambda: figures.launch_bars({"a": {}}, 1), "ways", "one way")

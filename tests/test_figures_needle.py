# SPDX-License-Identifier: MIT
"""The figures of long contexts: what is drawn is what was given, and titles are computed."""

import numpy as np
import pytest
import torch
from drawn import is_whole

from dsv2_ref import figures
from dsv2_ref.attention.rope import rope_frequencies, yarn_frequencies

RESULT = {"lengths": [128, 1024, 131072], "depths": [0, 50], "mean": 0.5,
          "grid": [[1.0, 0.75], [0.5, 0.25], [0.0, 0.5]]}


def test_a_column_is_a_length_and_a_row_a_depth():
    ax = figures.needle_grid(RESULT).axes[0]
    drawn = ax.images[0].get_array()
    assert np.array_equal(drawn, np.array(RESULT["grid"]).T)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "1K", "128K"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "50"]
    assert ax.images[0].get_clim() == (0, 1)         # colours mean the same in every grid
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.50", "0.00", "0.75", "0.25", "0.50"]
    assert ax.get_title(loc="left") == "50 % of the needles found"


def test_a_large_grid_has_no_numbers():
    large = {"lengths": [*range(1, 13)], "depths": [*range(12)], "mean": 1.0,
             "grid": [[1.0] * 12] * 12}
    assert not figures.needle_grid(large).axes[0].texts


def test_grids_stand_side_by_side_under_their_names():
    figure = figures.needle_grids({"plain": RESULT, "YaRN": RESULT | {"mean": 1.0}})
    titles = [ax.get_title(loc="left") for ax in figure.axes[:2]]
    assert titles == ["plain\n50 % found", "YaRN\n100 % found"]
    with pytest.raises(ValueError, match="results: empty"):
        figures.needle_grids({})


def test_a_grid_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"grid: \(3, 2\), expected a row for each of 2 lengths"):
        figures.needle_grid(RESULT | {"lengths": [128, 1024]})


def test_wavelengths_are_tokens_for_one_turn():
    before, after = rope_frequencies(16), yarn_frequencies(16, 1e4, 8, 32, 1, 128)
    ax = figures.pair_wavelengths(before, after, 128, 8).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), 2 * np.pi * 10.0 ** (np.arange(8) / 2))
    assert np.allclose(ax.lines[1].get_ydata() / ax.lines[0].get_ydata(),
                       (before / after).numpy())
    assert [line.get_ydata()[0] for line in ax.lines[2:4]] == [128, 1024]
    assert ax.get_title(loc="left").startswith("5 of 8 pairs never made a whole turn")


def seed(plain, yarn):
    return {"plain": {"lengths": [512, 4096], "grid": [[1.0, 1.0], plain]},
            "YaRN": {"lengths": [512, 4096, 8192], "grid": [[1.0, 1.0], yarn, [0.5, 0.5]]}}


def test_each_seed_is_a_dot_and_the_line_is_their_mean(tmp_path):
    figure = figures.found_by_length([seed([0.0, 0.2], [1.0, 0.8]), seed([0.0, 0.0], [1.0, 1.0])],
                                     512)
    ax = figure.axes[0]
    dots, line = ax.lines[2:4]
    assert np.allclose(dots.get_ydata(), [1, 0.9, 0.5, 1, 1, 0.5])
    assert np.allclose(line.get_ydata(), [1, 0.95, 0.5]) and line.get_label() == "YaRN"
    assert np.allclose(dots.get_xdata()[:3], line.get_xdata())
    assert np.allclose(np.log2(line.get_xdata() / [512, 4096, 8192]), 0.045)
    assert ax.lines[4].get_xdata()[0] == 512 and ax.lines[4].get_label() == "trained at 512"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["512", "4K", "8K"]
    assert ax.get_title(loc="left") == "At 4K tokens: 5 % with plain, 95 % with YaRN"
    figures.save(figure, tmp_path / "found.png")
    assert is_whole(figure)
    with pytest.raises(ValueError, match="runs: expected at least one seed"):
        figures.found_by_length([], 512)
    with pytest.raises(ValueError, match="the same names in all"):
        figures.found_by_length([seed([0], [0]), {"plain": seed([0], [0])["plain"]}], 512)


def test_mistakes_are_means_over_the_seeds():
    seeds = [{"1.001": {"yarn": 1.0, "layout": 0.5}, "8": {"yarn": 1.0, "layout": low}}
             for low in (0.0, 0.2)]
    ax = figures.mistakes_by_factor(seeds, 128).axes[0]
    assert [line.get_label() for line in ax.lines] == ["yarn", "layout"]
    assert np.allclose(ax.lines[1].get_ydata(), [0.5, 0.1])
    assert list(ax.lines[1].get_xdata()) == [1, 8]
    assert ax.get_title(loc="left") == "The worst mistake here: layout"


def test_attention_is_summed_over_the_needle_and_the_best_head_is_shown():
    weights = torch.zeros(2, 3, 50)
    weights[1, 2, 10:13] = torch.tensor([0.1, 0.6, 0.1])
    weights[0, 0, 30] = 1.0                          # elsewhere: not on the needle
    figure = figures.needle_attention(weights, range(10, 13), ["a", "b", "c"])
    heads, bars = figure.axes
    assert np.allclose(heads.images[0].get_array(), [[0, 0, 0], [0, 0, 0.8]])
    assert np.allclose([bar.get_height() for bar in bars.patches], [0.1, 0.6, 0.1])
    assert bars.get_title(loc="left") == "layer 1, head 2: 80 % on 3 of 50 tokens"


def test_costs_are_drawn_as_measured_and_scaled_counts_meet_the_last_point():
    points = [{"tokens": 1024 * k, "cache_bytes": 2**30 * k, "seconds": 3.0 * k * k,
               "counted": 7 * k * k, "decode_ms": 1.0 + k} for k in (1, 2, 4)]
    memory, reading, decoding = figures.length_costs(points).axes
    assert list(memory.lines[0].get_ydata()) == [1, 2, 4]
    assert np.allclose(reading.lines[1].get_ydata(), reading.lines[0].get_ydata())
    assert list(decoding.lines[0].get_ydata()) == [2, 3, 5]
    assert [t.get_text() for t in memory.get_xticklabels()] == ["1K", "2K", "4K"]

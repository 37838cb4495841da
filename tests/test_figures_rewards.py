# SPDX-License-Identifier: MIT
"""Figures of learning from rewards: nothing clipped, titles and lines from the data."""

import numpy as np
import pytest
from drawn import is_whole
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch
from refusals import refused

from dsv2_ref import figures
from dsv2_ref.figures.rewards import DOWN, UP

ANSWERS = ["1 2 3", "3", "1 3", "2 1"]
A = [5 / 3, -1, -1 / 3, -1 / 3]
LOG = [{"step": n, "reward": 0.4 + 0.01 * n, "entropy": 1 / n} for n in range(1, 51)]
LOG[0]["held"], LOG[24]["held"], LOG[49]["held"] = 0.3, 0.8, 0.95
PANELS = {"reward": "mean reward", "held": "greedy, held out", "entropy": "entropy (nats)"}
BINS = [(0.05, 0.1, 40), (0.45, 0.3, 10), (0.9, 1.0, 50)]         # chance, share, how many
TABLE = {"base": {"sort": 0.0, "count": 0.1, "bits_per_byte": 0.115},
         "stage-1": {"sort": 0.6, "count": 1.0, "bits_per_byte": 0.31}}
WAYS = [{"curves": {way: [{"seconds": 0.0, "right": 0.4}, {"seconds": 9.0 + seed, "right": end}]
                    for way, end in (("grpo", 0.8 + seed / 10), ("control", 0.6))}}
        for seed in (0, 1)]
DRAW = {
    "learning_ways": lambda: figures.learning_ways(WAYS),
    "reward_loop": lambda: figures.reward_loop("sort 3 1 2", ANSWERS, [0.8, 0, 0.2, 0.2], A),
    "reward_loop, equal": lambda: figures.reward_loop("?", ["a", "b"], [1, 1], [0, 0]),
    "clipped_gain": lambda: figures.clipped_gain(0.2),
    "reward_curves": lambda: figures.reward_curves({"GRPO": LOG}, PANELS),
    "reward_curves, more": lambda: figures.reward_curves(
        {"online": LOG, "offline": LOG[:25]}, {**PANELS, "step": "step"}),
    "calibration_curves": lambda: figures.calibration_curves({"a": BINS}, "the first one wins"),
    "exam_table": lambda: figures.exam_table(TABLE),
    "calibration_curves, more": lambda: figures.calibration_curves(
        {"pair-wise": BINS, "point-wise": [(0.5, 0.5, 9)]}, "the answer is right"),
    "answer_tokens": lambda: figures.answer_tokens(list("abcde"), [False, True, True, False, True],
                                                   across=3),
}


@pytest.mark.parametrize("name", DRAW)
def test_png_is_written_and_nothing_is_clipped(name, tmp_path):
    figure = DRAW[name]()
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size > 5000
    assert is_whole(figure) and figure.axes[0].get_title(loc="left")


def test_the_loop_shows_each_answer_with_its_reward_and_advantage():
    ax = DRAW["reward_loop"]().axes[0]
    shown = [t.get_text() for t in ax.texts]
    for told in ("sort 3 1 2", *ANSWERS, "0.8", "+1.67", "-1.00"):
        assert told in shown
    assert shown.count("0.2") == 2 and shown.count("-0.33") == 2
    edges = [to_hex(box.get_edgecolor()).upper() for box in ax.patches
             if isinstance(box, FancyBboxPatch)]
    assert edges.count(UP) == 1 and edges.count(DOWN) == 3
    assert ax.get_title(loc="left") == (
        "4 answers to one question: the best counts +1.67, the worst -1.00")
    equal = DRAW["reward_loop, equal"]().axes[0]
    assert equal.get_title(loc="left") == "2 answers of equal worth teach nothing"


def test_what_was_predicted_stands_beside_what_happened():
    ax = DRAW["calibration_curves"]().axes[0]
    equal, curve = (line.get_data() for line in ax.lines)
    assert np.array_equal(equal, [[0, 1], [0, 1]])
    assert np.allclose(np.transpose(curve), [bin_[:2] for bin_ in BINS])
    (dots,) = ax.collections
    assert np.allclose(dots.get_offsets(), np.transpose(curve))
    sizes = dots.get_sizes()
    assert sizes[1] < sizes[0] < sizes[2] and np.allclose(np.diff(sizes) / np.diff([40, 10, 50]),
                                                          (sizes[2] - sizes[1]) / 40)
    assert ax.get_title(loc="left") == "chances are off by 0.09"         # 2 + 1.5 + 5 of 100
    assert "the first one wins" in ax.get_xlabel()
    both = DRAW["calibration_curves, more"]()
    assert both.axes[0].get_title(loc="left") == "chances are off by 0.09 and 0.00"
    assert [t.get_text() for t in both.legends[0].get_texts()] == [
        "perfectly calibrated", "pair-wise", "point-wise"]


def test_the_line_of_calibration_leaves_bins_with_few_out():
    bins = [(0.05, 0.1, 40), (0.3, 0.9, 4), (0.45, 0.3, 5), (0.9, 1.0, 50)]
    ax = figures.calibration_curves({"a": bins}, "it wins").axes[0]
    assert np.allclose(ax.lines[1].get_xydata(), [bins[0][:2], bins[2][:2], bins[3][:2]])
    (dots,) = ax.collections
    assert np.allclose(dots.get_offsets(), [bin_[:2] for bin_ in bins])       # all are drawn
    dark, pale, *others = dots.get_facecolors()[:, 3]
    assert pale < 0.5 * dark and others == [dark, dark]


def test_learned_tokens_have_colour():
    ax = DRAW["answer_tokens"]().axes[0]
    assert [t.get_text() for t in ax.texts] == list("abcde")
    filled = [to_hex(box.get_facecolor()).upper() == UP for box in ax.patches]
    assert filled == [False, True, True, False, True]
    assert len({round(t.get_position()[1], 3) for t in ax.texts}) == 2
    assert ax.get_title(loc="left") == "3 of 5 tokens are learned, the others are read"


def test_the_gain_is_the_smaller_of_two_lines():
    better, worse = DRAW["clipped_gain"]().axes
    for ax, sign in ((better, 1), (worse, -1)):
        ratio, plain = ax.lines[0].get_data()
        gain = ax.lines[1].get_ydata()
        assert np.allclose(plain, sign * ratio) and (gain <= plain + 1e-12).all()
        assert np.allclose(gain, np.minimum(sign * ratio, sign * ratio.clip(0.8, 1.2)))
        flat = np.abs(np.diff(gain)) < 1e-12
        assert 0.3 < flat.mean() < 0.4 and flat[-1] == (sign > 0) and flat[0] == (sign < 0)
    shaded = [(ax.patches[0].get_x(), ax.patches[0].get_width()) for ax in (better, worse)]
    assert np.allclose(shaded, [(1.2, 0.4), (0.4, 0.4)])
    assert better.get_title(loc="left") == "A = +1: no more say above 1.2"
    assert worse.get_title(loc="left") == "A = -1: no more say below 0.8"


def test_curves_are_the_entries_that_have_the_number():
    axes = DRAW["reward_curves"]().axes
    assert [ax.get_ylabel() for ax in axes] == list(PANELS.values())
    x, y = axes[1].lines[0].get_data()
    assert x.tolist() == [1, 25, 50] and y.tolist() == [0.3, 0.8, 0.95]
    assert [ax.get_title(loc="left") for ax in axes] == ["0.41 → 0.90", "0.30 → 0.95",
                                                         "1.00 → 0.02"]
    many = DRAW["reward_curves, more"]().axes
    assert [line.get_label() for line in many[0].lines] == ["online", "offline"]
    assert many[0].get_title(loc="left") == "ends at 0.90, 0.65"
    assert len({line.get_color() for line in many[0].lines}) == 2
    assert [ax.axison for ax in many] == [True] * 4 + [False] * 2


def test_the_table_writes_every_share_and_colours_no_bits():
    ax = DRAW["exam_table"]().axes[0]
    assert [t.get_text() for t in ax.texts] == ["0%", "60%", "10%", "100%", "0.115", "0.310"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sort", "count", "bits per byte"]
    (image,) = ax.images
    assert np.allclose(image.get_array()[:2], [[0, 0.6], [0.1, 1]])
    assert np.isnan(np.ma.filled(image.get_array(), np.nan)[2]).all()
    assert ax.get_title(loc="left") == "right: 5% → 80%"


def test_ways_are_drawn_seed_by_seed_and_as_their_mean():
    ax = DRAW["learning_ways"]().axes[0]
    assert len(ax.lines) == 6 and ax.get_title(loc="left") == "from 40% to grpo 85%, control 60%"
    mean = next(line for line in ax.lines if line.get_label() == "grpo")
    assert np.allclose(mean.get_xydata(), [(0, 0.4), (9.5, 0.85)])
    assert len({line.get_color() for line in ax.lines}) == 2


def test_refusals():
    refused(lambda: figures.learning_ways([]), "runs: expected at least one")
    refused(lambda: figures.exam_table({}), "models: 0 with different kinds")
    refused(lambda: figures.exam_table({"a": {"x": 1}, "b": {"y": 1}}), "models: 2 with different")
    refused(lambda: figures.reward_loop("?", ["a"], [1.0, 2.0], [0.0]), "answers: 1 with 2 rewards")
    refused(lambda: figures.reward_loop("?", [], [], []), "answers: 0")
    refused(lambda: figures.clipped_gain(1.0), "clip: 1.0")
    refused(lambda: figures.reward_curves({}, PANELS), "runs: expected at least one")
    refused(lambda: figures.reward_curves({"x": []}, PANELS), "runs: expected at least one")
    refused(lambda: figures.reward_curves({"x": [{"step": 1}]}, PANELS), "'x' has no 'reward'")
    refused(lambda: figures.calibration_curves({}, "x"), "models: expected at least one")
    refused(lambda: figures.calibration_curves({"a": []}, "x"), "models: expected at least one")
    refused(lambda: figures.answer_tokens(["a"], []), "tokens: 1, learned: 0")
    refused(lambda: figures.answer_tokens([], []), "tokens: 0")

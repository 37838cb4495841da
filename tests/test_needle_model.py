# SPDX-License-Identifier: MIT
"""What the committed model, data/needle, finds: with YaRN, without, through six bits, misread."""

import math
from pathlib import Path

import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref import model as model_module
from dsv2_ref.attention import rope
from dsv2_ref.bench.needle import MISTAKES, misread
from dsv2_ref.config import Config
from dsv2_ref.inference.needle import Grid, run
from dsv2_ref.model import _rope
from dsv2_ref.stretch import stretched, stretched_config, trained_positions
from dsv2_ref.text import stories
from dsv2_ref.text.corpora import Document
from dsv2_ref.text.needles import haystack
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.long_context import PRESETS

FOLDER = Path(__file__).parents[1] / "data" / "needle"
TOKENIZER = load_tokenizer(FOLDER / "tokenizer.json")
CONFIG = Config.from_hf(FOLDER)
TRAINED = trained_positions(CONFIG)
TEXT = haystack([Document(str(i), story.text) for i, story in enumerate(stories.sample(7, 400))],
                TOKENIZER, 8 * TRAINED)
EIGHT = Grid((8 * TRAINED,), (0, 50, 100), samples=4)
MORE = Grid(EIGHT.lengths, EIGHT.depths, samples=6)        # where not all or nothing is found


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(FOLDER, torch.float32)


@pytest.fixture(scope="module")
def found(model):
    return run(model, TOKENIZER, TEXT, EIGHT)["mean"]


def test_the_folder_is_small_and_says_what_it_was_trained_at(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 3e6
    preset = PRESETS["cpu"]
    plain = preset.config.with_(max_positions=preset.recipe.sequence, vocab=TOKENIZER.vocab)
    assert model.config == CONFIG == stretched_config(plain, preset.factor)
    assert CONFIG.yarn_factor == 8 and CONFIG.max_positions == 8 * TRAINED


def test_with_yarn_needles_are_found_at_eight_times_the_trained_length(found):
    assert found >= 0.95


def test_with_plain_rope_they_are_found_at_the_trained_length_and_not_at_eight_times_it(model):
    plain = stretched(model, 1)
    assert run(plain, TOKENIZER, TEXT, Grid((TRAINED,), EIGHT.depths, samples=4))["mean"] >= 0.95
    assert run(plain, TOKENIZER, TEXT, EIGHT)["mean"] <= 0.4


def test_six_bits_lose_at_most_a_point(model, found):
    six = run(model, TOKENIZER, TEXT, Grid(EIGHT.lengths, EIGHT.depths, 4, cache="six_bit"))["mean"]
    assert six >= found - 0.01


@pytest.mark.parametrize("mistake, most", [("layout", 0.1), ("index ramp", 0.8),
                                           ("no mscale", 0.8)])
def test_the_mistakes_show_in_the_grid(model, mistake, most):
    assert run(misread(model, mistake), TOKENIZER, TEXT, MORE)["mean"] <= most


def test_a_forgotten_mscale_leaves_all_but_the_softmax_scale(model):
    ids = torch.tensor([TEXT])
    right, wrong = (m.blocks[0].attention.scale for m in (model, misread(model, "no mscale")))
    m = 0.0707 * math.log(8) + 1
    assert right / wrong == pytest.approx(m * m, rel=1e-12)
    assert not torch.equal(model(ids), misread(model, "no mscale")(ids))
    assert torch.equal(_rope(model.config, ids.device)[0],
                       _rope(misread(model, "no mscale").config, ids.device)[0])


def test_the_misread_layout_is_half_split_rotation(model, monkeypatch):
    """Weights in another order under the right rotation, or the wrong rotation: the same."""

    def half_split(x, cos, sin):
        if x.ndim == 4:
            cos, sin = cos[..., None, :], sin[..., None, :]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    model, ids = stretched(model, 8).double(), torch.tensor([TEXT[:60]])
    expected = misread(model, "layout")(ids)
    right = model(ids)
    monkeypatch.setattr("dsv2_ref.attention.mla.rotate", half_split)
    assert (model(ids) - expected).abs().max() < 1e-10 < (right - expected).abs().max()


def test_the_misread_ramp_runs_over_the_index(model):
    frequencies, magnitude = _rope(misread(model, "index ramp").config, torch.device("cpu"))
    keep = rope.rope_frequencies(CONFIG.d_r)
    ramp = torch.linspace(0, 1, CONFIG.d_r // 2, dtype=torch.float64)
    expected = keep * (1 - ramp) + keep / 8 * ramp
    assert (frequencies / expected - 1).abs().max() < 1e-12 and magnitude == 1


def test_an_unknown_mistake_is_refused(model):
    with pytest.raises(ValueError, match="mistake: 'none', expected one of layout, no mscale"):
        misread(model, "none")
    assert len(MISTAKES) == 3


@pytest.mark.parametrize("pairs, times", [(slice(0, 2), 1 / 8), (slice(8, None), 8)])
def test_fast_pairs_must_stay_as_they_are_and_slow_ones_must_not(model, monkeypatch, pairs, times):
    """The two that YaRN keeps are slowed down as well; or the eight that it slows down are not."""
    right = model_module._rope

    def wrong(config, device):
        frequencies, magnitude = right(config, device)
        frequencies = frequencies.clone()
        frequencies[pairs] *= times
        return frequencies, magnitude

    far = Grid(EIGHT.lengths, (0,), samples=4)
    assert run(model, TOKENIZER, TEXT, far)["mean"] == 1
    monkeypatch.setattr(model_module, "_rope", wrong)
    assert run(model, TOKENIZER, TEXT, far)["mean"] <= 0.5


def test_misreading_leaves_the_model_as_it_was(model):
    before = {name: W.clone() for name, W in model.state_dict().items()}
    for mistake in MISTAKES:
        misread(model, mistake)
    assert all(torch.equal(W, before[name]) for name, W in model.state_dict().items())

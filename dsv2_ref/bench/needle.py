# SPDX-License-Identifier: MIT
"""Figure 4 in small: what YaRN, a short tuning, six bits and three mistakes do to the needle grid.

A small model is trained on stories with needles in them, once per seed (the CPU preset of
training/long_context.py), and read at 1 to 16 times the length that it was trained at. `grids` are
shares of needles found, by length and depth, of

  plain            RoPE as trained; the control, not tuned
  yarn             the same weights under YaRN with s = 8, not tuned
  tuned            the same after a few steps at twice the length
  yarn 16          not tuned, s = 16
  six_bit          yarn, through the cache of six bits per number
  several, chain   yarn, the harder questions of text/needles.py
  python           needles in Python source, of which it has never read a line

`by_factor`, of the first seed, asks from which length and s a mistake (see `misread`) shows: the
share found at s times the trained length with this s.
`interval` is ± of the mean over the seeds, Student's t at 95 %.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dsv2_ref import cost
from dsv2_ref.inference import needle
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched, trained_positions, with_config
from dsv2_ref.text.corpora import Corpus, open_corpus
from dsv2_ref.text.data import encode
from dsv2_ref.text.needles import NeedleBatches, haystack
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.long_context import (
    DOCUMENTS,
    PRESETS,
    extend,
    extension,
    set_up_needles,
    tokenizer_for,
)
from dsv2_ref.training.machine import keep_freed_memory, machine
from dsv2_ref.training.pretrain import train

PRESET = PRESETS["cpu"]
DEPTHS = (0, 20, 40, 60, 80, 100)
LENGTHS = {                                  # of each grid, in trained lengths
    "plain": (1, 2, 4, 8), "yarn": (1, 2, 4, 8, 16), "tuned": (1, 2, 4, 8), "yarn 16": (8, 16),
    "six_bit": (1, 2, 4, 8), "several": (1, 2), "chain": (1, 2), "python": (1, 8),
}
FACTORS = (1.001, 2, 4, 8, 16, 32)           # just above 1 the formulas are YaRN's, and do nothing
MISTAKES = ("layout", "no mscale", "index ramp")
T_95 = {1: math.inf, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # by number of seeds


def misread(model: DeepSeekV2, mistake: str) -> DeepSeekV2:
    """A stretched model, read wrongly. Each mistake is a change of weights or of the config.

    layout      pairs (i, i + d_r/2) are turned where the weights mean (2i, 2i+1): the same as rows
                of W_QR and W_KR in another order
    no mscale   the softmax scale without m(s)²
    index ramp  the ramp from kept to interpolated runs over all pairs, whatever their wavelength
    """
    c = model.config
    if mistake == "layout":
        wrong = with_config(model, c)
        adjacent = torch.arange(c.d_r).view(2, -1).T.flatten()               # 0, d_r/2, 1, ...
        for block in wrong.blocks:
            a = block.attention
            for layer in (a.W_QR, a.W_KR):
                rows = layer.weight.unflatten(0, (-1, c.d_r))                # (heads, d_r, ·)
                layer.weight = torch.nn.Parameter(rows[:, adjacent].flatten(0, 1), False)
        return wrong
    if mistake == "no mscale":                # m(s, 1e-9) is 1: cos and sin stay as they are
        return with_config(model, c.with_(yarn_mscale=1e-9, yarn_mscale_all_dim=None))
    if mistake == "index ramp":               # beta_slow that puts the ramp's end at the last pair
        slowest = 2 * math.pi * c.rope_theta ** (1 - 2 / c.d_r)
        beta_slow = c.yarn_original_positions / slowest * (1 + 1e-9)         # just before it
        return with_config(model, c.with_(yarn_beta_fast=1e9, yarn_beta_slow=beta_slow))
    raise ValueError(f"mistake: {mistake!r}, expected one of {', '.join(MISTAKES)}")


def measure(
    model: DeepSeekV2, tokenizer: TextTokenizer, corpus: Corpus, seed: int, samples: int,
    tuning: int, lengths: Mapping[str, Sequence[int]] = LENGTHS, depths: Sequence[float] = DEPTHS,
    factors: Sequence[float] = (), other: str = "python",
) -> dict[str, Any]:
    """All grids of one trained model, and `by_factor`; the model's own config is of no matter."""
    model, trained_at = stretched(model, 8), trained_positions(model.config)
    text = haystack(corpus.test, tokenizer, 32 * trained_at)
    code = haystack(open_corpus(other).test[:40], tokenizer, trained_at * max(lengths["python"]))

    def grid(of: DeepSeekV2, at: Sequence[int], text: list[int] = text, **asked: Any
             ) -> dict[str, Any]:
        of = with_config(of, of.config.with_(max_positions=32 * trained_at))
        asked = {"depths": tuple(depths), "samples": samples, "seed": seed} | asked
        at = tuple(n * trained_at for n in at)
        return needle.run(of, tokenizer, text, needle.Grid(at, **asked))

    began = time.process_time()
    unread = encode(corpus.train[DOCUMENTS : DOCUMENTS + 3000], tokenizer)
    recipe = extension(model.config, 8, tuning)
    tuned = extend(model, 8, recipe, NeedleBatches(unread, tokenizer, recipe.sequence, seed))
    seconds = time.process_time() - began
    read = {
        "plain": (stretched(model, 1), {}), "yarn": (model, {}), "tuned": (tuned, {}),
        "yarn 16": (stretched(model, 16), {}), "six_bit": (model, {"cache": "six_bit"}),
        "several": (model, {"kind": "several"}), "chain": (model, {"kind": "chain"}),
        "python": (model, {"text": code}),
    }
    grids = {name: grid(of, lengths[name], **asked) for name, (of, asked) in read.items()}
    by_factor = {}
    for s in factors:
        longer = stretched(model, s)
        ways = {"yarn": longer} | {mistake: misread(longer, mistake) for mistake in MISTAKES}
        by_factor[f"{s:g}"] = {name: grid(of, (round(s),), depths=tuple(depths[::2]))["mean"]
                               for name, of in ways.items()}
    return {"tuning_steps": tuning, "tuning_tokens": recipe.sequence,
            "tuning_cpu_seconds": seconds, "grids": grids, "by_factor": by_factor}


def column(grid: dict[str, Any], length: int) -> float:
    """Share found at a length, over all depths."""
    values = grid["grid"][list(grid["lengths"]).index(length)]
    return sum(values) / len(values)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each grid and length: mean over the seeds, and the interval."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, first in runs[0]["grids"].items():
        for length in first["lengths"]:
            values = torch.tensor([column(run["grids"][name], length) for run in runs]).double()
            spread = values.std().item() if len(runs) > 1 else math.nan
            result.setdefault(name, {})[str(length)] = {
                "mean": values.mean().item(), "least": values.min().item(),
                "most": values.max().item(),
                "interval": T_95[len(runs)] * spread / len(runs) ** 0.5}
    return result


def run(quick: bool = False) -> dict[str, Any]:
    """One JSON-able record; with `quick` its numbers mean nothing. Half an hour of one core."""
    keep_freed_memory()
    corpus = open_corpus("stories")
    tokenizer = tokenizer_for(corpus, PRESET.config.vocab)
    runs = [one_seed(seed, corpus, tokenizer, quick) for seed in range(1 if quick else 3)]
    return record(runs, quick)


def one_seed(
    seed: int, corpus: Corpus, tokenizer: TextTokenizer, quick: bool = False,
) -> dict[str, Any]:
    """Train, then measure; CPU seconds of both. The weights are rounded to bf16, as saved ones."""
    began = time.process_time()
    recipe = PRESET.recipe.with_(seed=seed, steps=4 if quick else None)
    setup = set_up_needles(PRESET, recipe, corpus, tokenizer)
    log = train(setup.trainer, load_every=0, progress=False)
    model = with_config(setup.model.bfloat16().float(), setup.saved)
    seconds = time.process_time() - began
    few = {"samples": 8, "tuning": 50, "factors": FACTORS if seed == 0 else ()}
    if quick:
        few = {"samples": 1, "tuning": 1, "lengths": dict.fromkeys(LENGTHS, (1, 2)),
               "depths": (50,), "factors": (1.001, 2), "other": "stories"}
    return {"seed": seed, "steps": len(log), "training_cpu_seconds": seconds,
            "answer_loss": log[-1]["answer"], **measure(model, tokenizer, corpus, seed, **few)}


def record(runs: list[dict[str, Any]], quick: bool = False) -> dict[str, Any]:
    """What `one_seed` gave for each of some seeds, as one record."""
    c = PRESET.config
    sizes = {key: getattr(c, key) for key in "d n_layers n_h d_h d_r d_v d_c vocab".split()}
    return {"name": "needle", "quick": quick, **machine(), "model": sizes,
            "parameters": cost.parameters(c).total, "trained_at": PRESET.recipe.sequence,
            "summary": summary(runs) if len(runs) > 1 else None, "runs": runs}

# SPDX-License-Identifier: MIT
"""What studies of quality share: one model trained and judged, then the same with one thing
changed, from several seeds.

Setting A of seed s starts from the same random state and reads the same batches as setting B of
seed s, so settings are compared seed by seed; the spread over seeds is the size of chance.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.machine import default_device
from dsv2_ref.training.pretrain import Trainer, train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import Setup, set_up

HELD_OUT = 300                                                           # documents


def trained(
    config: Config, recipe: Recipe, corpus: Corpus, tokenizer: TextTokenizer,
    change: Callable[[DeepSeekV2], object] | None = None,
) -> tuple[Setup, dict[str, Any]]:
    """A trained model and its record; `change` is made to the model before it is trained."""
    setup = set_up(config, recipe, corpus, tokenizer)
    if change is not None:
        change(setup.model)
        setup.model.to(default_device())
        setup.trainer = Trainer(setup.model, recipe, setup.trainer.batches.tokens)
    log = train(setup.trainer, load_every=1, progress=False)
    last = log[-max(len(log) // 10, 1):]
    dropped = [share for entry in last for share in entry.get("dropped", [])]
    return setup, {
        "seed": recipe.seed, "bits_per_byte": setup.held_out(corpus.test[:HELD_OUT]),
        "dropped": statistics.fmean(dropped) if dropped else 0.0,
    }


def summary(runs: Sequence[dict[str, Any]], setting: str, value: str) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of `value` for each setting, and of its difference, seed by
    seed, from the first setting."""
    rows = []
    by_setting = {run[setting]: {} for run in runs}
    for run in runs:
        by_setting[run[setting]][run["seed"]] = run[value]
    first = next(iter(by_setting.values()))
    for name, values in by_setting.items():
        change = [values[seed] - first[seed] for seed in first]
        rows.append({
            setting: name, "mean": statistics.fmean(values.values()),
            "deviation": _deviation(list(values.values())),
            "difference": statistics.fmean(change), "difference_deviation": _deviation(change),
        })
    return rows


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None

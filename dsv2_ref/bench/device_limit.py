# SPDX-License-Identifier: MIT
"""Device-limited routing against none: does a small M cost quality?

The paper (section 2.2.2) says that M >= 3 devices a token are about as good as no limit, and shows
no numbers. Here small models are trained with M = 1, 2, 3, 4 of D = 4 devices. The peer is M = D in
the same run: every device may be reached, which is the plain greedy top K. The seeds give the size
of chance: model M of seed s starts from the same weights and reads the same data for every M.

  bits_per_byte    of held-out stories, the model used with the M it was trained with
  floor            the grammar's entropy: no model needs less on average
  devices          how many devices a token reaches on those stories, mean over tokens and layers
  dropped          share of slots dropped in training (capacity 1.0), mean over the last tenth

TINY has two experts a device, too few for K = 3 with M = 1. So these models have 32 narrower
experts, eight a device, and K = 4; all else is TINY's.
"""

import os
from typing import Any

from dsv2_ref.bench.harness.study import HELD_OUT, held_out_load, trained
from dsv2_ref.bench.harness.timing import machine
from dsv2_ref.config import TINY
from dsv2_ref.text import stories
from dsv2_ref.text.corpora import stories_corpus
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import Setup

CONFIG = TINY.with_(n_routed=32, expert_width=32, top_k=4)
LIMITS = range(1, CONFIG.n_devices + 1)                                  # M


def devices_reached(setup: Setup, n_stories: int = 40) -> float:
    """Devices a token is sent to, on the first tokens of held-out stories."""
    load = held_out_load(setup, n_stories)
    sent = sum(layer.devices.sum().item() for layer in load)
    return sent / sum(len(layer.routing.indices) for layer in load)


def run(quick: bool = False) -> dict[str, Any]:
    """One JSON-able record; `quick` takes 2 steps of one seed and few stories."""
    steps, seeds = (2, (0,)) if quick else (500, (0, 1, 2))
    corpus = stories_corpus(200 if quick else 20_000)
    tokenizer = train_tokenizer((d.text for d in corpus.train), 1024)
    recipes = [Recipe(steps=steps, batch=8, sequence=128, precision="fp32", seed=seed)
               for seed in seeds]
    runs = []
    for recipe in recipes:
        for limit in LIMITS:
            setup, record = trained(CONFIG.with_(max_devices=limit), recipe, corpus, tokenizer)
            runs.append({"max_devices": limit, **record, "devices": devices_reached(setup)})
    c, recipe = CONFIG, recipes[0]
    return {
        "name": "device_limit", "quick": quick, **machine(), "cores": os.cpu_count(),
        "model": {"layers": c.n_layers, "d": c.d, "experts": c.n_routed, "top_k": c.top_k,
                  "expert_width": c.expert_width, "devices": c.n_devices},
        "training": {"corpus": "stories", "steps": steps, "batch": recipe.batch,
                     "sequence": recipe.sequence, "tokens": steps * recipe.batch * recipe.sequence},
        "held_out_stories": len(corpus.test[:HELD_OUT]), "floor": stories.entropy_rate(),
        "runs": runs,
    }

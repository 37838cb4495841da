# SPDX-License-Identifier: MIT
"""A model, a recipe and text for tests of training: some steps a second."""

import numpy as np
import torch

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer

CONFIG = TINY.with_(vocab=61, d=24, n_layers=2, dense_width=40, n_routed=8, expert_width=12,
                    n_h=2, d_h=6, d_r=4, d_v=6, d_c=10, d_cq=14)
RECIPE = Recipe(steps=12, batch=3, sequence=17, precision="fp32", batch_start=1, batch_ramp=0.4)


def tokens() -> np.ndarray:
    """The next token is one of three."""
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, 3000)) % 61
    return walk.astype(np.uint16)


def trainer(recipe=RECIPE, config=CONFIG, seed=0, **parts) -> Trainer:
    """`seed` is of the weights alone; the recipe has its own."""
    torch.manual_seed(seed)
    return Trainer(DeepSeekV2(config), recipe, tokens(), **parts)

# SPDX-License-Identifier: MIT
"""A trained model read further than it was trained, with YaRN (section 3.1.4).

The weights stay as they are. What changes is four numbers of the config: the factor s, the trained
length, and the two mscales; attention/rope.py says what they do to the frequencies, to cos and sin,
and to the softmax scale. It stands below inference and training, because both of them use it.
"""

import torch

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2

MSCALE = 0.707      # V2's: sqrt(t) = 0.0707 ln s + 1


def trained_positions(config: Config) -> int:
    """The length that a model was trained at, as far as its config says: under YaRN the original
    one."""
    if config.yarn_factor is not None:
        return config.yarn_original_positions
    return config.trained_positions or config.max_positions


def stretched_config(config: Config, factor: float, trained: int | None = None) -> Config:
    """`config` with YaRN by `factor` over `trained` positions (None: what the config says).

    Factor 1 is plain RoPE. There is room for factor·trained positions, or what there was before.
    """
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor: {factor}, expected a number >= 1 (1 is plain RoPE)")
    trained = trained_positions(config) if trained is None else trained
    room = max(config.max_positions, round(factor * trained))
    if factor == 1:
        return config.with_(yarn_factor=None, yarn_mscale=None, yarn_mscale_all_dim=None,
                            max_positions=room,
                            trained_positions=trained if trained < room else None)
    mscale = MSCALE if config.yarn_mscale is None else config.yarn_mscale
    all_dim = MSCALE if config.yarn_mscale_all_dim is None else config.yarn_mscale_all_dim
    return config.with_(yarn_factor=float(factor), yarn_original_positions=trained,
                        yarn_mscale=mscale, yarn_mscale_all_dim=all_dim, max_positions=room,
                        trained_positions=None)


def stretched(model: DeepSeekV2, factor: float, trained: int | None = None) -> DeepSeekV2:
    """The same weights, not copied, under `stretched_config`; in eval mode."""
    return with_config(model, stretched_config(model.config, factor, trained))


def with_config(model: DeepSeekV2, config: Config) -> DeepSeekV2:
    """The same weights, not copied, read by a config of the same sizes; in eval mode."""
    with torch.device("meta"):
        other = DeepSeekV2(config)
    other.load_state_dict(model.state_dict(), assign=True)
    if config.tie_embeddings:                # `assign` has parted the two owners of the matrix
        other.head.weight = other.embedding.weight
    return other.requires_grad_(False).eval()

# SPDX-License-Identifier: MIT
"""The ladder: V2 at about 10M, 50M and 150M activated parameters, each for minutes of one H200.

    python -m dsv2_ref train --preset 10m --corpus packages --no-save --out build/10m
    python -m dsv2_ref train --preset 50m --corpus packages --no-save --out build/50m
    python -m dsv2_ref train --preset 150m --corpus packages --no-save --out build/150m

A preset of the ladder comes with its recipe here unless another one is asked for (`--recipe`).
Without --no-save the model is kept as well, in the published format: 44 MB, 0.5 GB, 1.6 GB.

 |      | activated | with all experts | tokens | peak rate | batch (tokens) | steps | minutes |
 |------|-----------|------------------|--------|-----------|----------------|-------|---------|
 | 10m  |  10.4M    |  21.9M           | 200M   | 2.9e-3    | 30 x 2048      | 3,255 | 1.0     |
 | 50m  |  51.0M    | 239.2M           | 280M   | 2.3e-3    | 54 x 2048      | 2,532 | 6.0     |
 | 150m | 148.4M    | 802.6M           | 100M   | 2.3e-3    | 54 x 2048      |   904 | 5.9     |

Activated is `cost.activated_parameters`: what one token passes through, the head of 16,384 tokens
(tied to the embedding) counted once: 4.2M, 8.4M and 12.6M of it.

Minutes are an estimate, not a measurement: the FLOPs of the steps (`cost.causal_training_flops`) at
40 % of the 775 TFLOP/s that such a card's bf16 matmuls reach. The tokenizer and the encoding of the
corpus, on the CPU, come on top; the tokens leave two of eight minutes for them. No GPU has run this
yet: GPU numbers pending. 10m reads 20 tokens an activated parameter, enough for a dense model of
its size; the others read less.

Rate and batch scale with the compute C of the run, as DeepSeek's dense models found them best
(arXiv 2401.02954, equation 1): rate 0.3118·C^-0.1250 and batch 0.2920·C^0.3271 tokens. Deviations:
  1. They fitted dense models between 1e17 and 2e19 FLOPs; here it is taken for experts, and 10m
     lies below. Nothing was tuned.
  2. Their C leaves out embedding and head, ours has the head.
  3. Warm-up is 3 % of the run and not 2,000 steps; the decay by 0.316 at 80 % and at 90 % is
     theirs, and Lite's.
  4. 50m and 150m take a batch 18 and 9 sequences at a time: all 54 of 50m would need 160 GiB by the
     memory plan, 18 need 54. Balance and dropping are then counted within each of these parts.
"""

from dsv2_ref import cost
from dsv2_ref.config import PRESETS, Config
from dsv2_ref.training.recipe import Recipe

TOKENS = {"10m": 200e6, "50m": 280e6, "150m": 100e6}
AT_ONCE = {"10m": None, "50m": 18, "150m": 9}                            # sequences
MATMUL, SHARE = 775e12, 0.4            # FLOP/s of an H200 in bf16, and how much of them we hope for


def scaled(config: Config, tokens: float, sequence: int = 2048) -> Recipe:
    """A recipe for `tokens` whose rate and batch follow from the compute of the run."""
    compute = cost.causal_training_flops(config, sequence) * tokens
    batch = max(1, round(0.2920 * compute**0.3271 / sequence))
    return Recipe(
        steps=1, optimizer="adamw", lr=0.3118 * compute**-0.1250, schedule="step",
        decay_at=(0.8, 0.9), sequence=sequence, batch=batch,
    ).lasting(tokens)


def estimated_minutes(config: Config, recipe: Recipe) -> float:
    """Minutes of training on an H200 at the share of its matmuls that we hope for."""
    tokens = recipe.steps * recipe.batch * recipe.sequence
    return tokens * cost.causal_training_flops(config, recipe.sequence) / (SHARE * MATMUL) / 60


LADDER = {name: scaled(PRESETS[name], tokens).with_(micro_batch=AT_ONCE[name])
          for name, tokens in TOKENS.items()}

# SPDX-License-Identifier: MIT
"""A training step side by side with transformers: tokens per second, and MFU.

  small, 36M   on a CPU, fp32: forward, backward, clipping and AdamW on 1024 tokens, as 4 sequences
               of 256 and as one. `small` is that preset, 36M V2's proportions made
               small. Both sides have the same weights and take turns, step by step; the losses and
               the norms of all gradients must agree before anything is timed.
  lite         on a GPU, bf16: V2-Lite, as many of its 27 layers as leave a third of the card free
               beside the training state (all on 141 GB), 4 sequences of 4096. Two such models do
               not fit beside each other, so the sides take turns as wholes: ours, theirs, ours,
               theirs, the memory emptied between them; their weights are random and their own.
               Agreement is asserted before, in fp32, on two layers of full width and few tokens
               to choose from.

Equal work: balance losses and dropping are off, transformers has neither. transformers gets each of
its attention and expert backends for a few steps and is measured with the best; on a GPU the choice
is between its expert backends, with its activation checkpointing or single sequences, and what runs
out of memory is named. Left out are `batched_mm`, which would copy the weights of every slot, and
on a GPU eager attention, which would hold all scores. Ours on a GPU is
`Trainer.step`, the loop that `train` runs: bf16 weights rounded stochastically, AdamW8, as little
recomputed as the memory plan allows; the record has the plan beside the measured peak. Theirs has
torch's fused AdamW where its moments fit, else torchao's AdamW8bit, and without torchao the former
on fewer layers (20 of 27 on 141 GB); the record says which, and has all layers of ours alone then.

MFU is the arithmetic of `cost.causal_training_flops`, 6·N_active and the causal attention scores,
over time and the rate of a square matmul of the same dtype in the same run, the better of one
before and one after. Times on a shared machine are noise: read the ratios. GPU numbers pending.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv2_ref.bench.harness.one_card import LITTLE, in_turns_as_wholes
from dsv2_ref.bench.harness.peer import (
    ATTENTION,
    MODEL,
    add_mfu,
    agreement,
    both,
    peer,
    quiet,
    sizes,
    update,
    use,
)
from dsv2_ref.bench.harness.timing import in_turns, matmul_rate, milliseconds, result, times
from dsv2_ref.config import LITE, SMALL, Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.machine import machine
from dsv2_ref.training.recipe import Recipe

EQUAL = dict(alpha_expert=0.0, alpha_device=0.0, alpha_comm=0.0, drop_capacity=None)
MODELS = {"small": SMALL.with_(**EQUAL), "36M": MODEL}
EXPERTS = ("eager", "grouped_mm")


def run(quick: bool = False) -> dict[str, Any]:
    """All comparisons as one JSON-able record; `quick` is a smoke test whose ratios mean nothing.

    ImportError without transformers; RuntimeError if the two sides disagree.
    """
    transformers = peer("train")
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    size = 256 if quick else 8192 if gpu else 2048
    flops = matmul_rate(device, dtype, size)
    training: list[tuple[Config, dict[str, Any]]] = []
    lite: list[tuple[Config, dict[str, Any]]] = []
    with quiet(transformers), tempfile.TemporaryDirectory() as folder:
        if quick or not gpu:
            models, shapes, updates = MODELS, ((4, 256), (1, 1024)), 5
            if quick:
                models, shapes, updates = {"tiny": _tiny(MODEL)}, ((2, 16), (1, 32)), 2
            for name, config in models.items():
                pair = both(transformers, config, Path(folder) / name)
                training += [(config, {"model": name, **sizes(config),
                                       **_side_by_side(*pair, shape, updates)})
                             for shape in shapes]
        if quick or gpu:
            (case,) = QUICK if quick else CASES
            lite = list(in_turns_as_wholes(*case[1:4], device, Path(folder) / "lite"))
    flops = max(flops, matmul_rate(device, dtype, size))
    for config, row in training + lite:
        add_mfu(row, config, flops)
    return {"name": "train", "quick": quick, **machine(), "matmul_tflops": flops / 1e12,
            "transformers": transformers.__version__, "training": [row for _, row in training],
            "lite": lite[-1][1] if lite else None,
            "lite_alone": lite[0][1] if lite and lite[0][0] != lite[-1][0] else None}


def _tiny(config: Config) -> Config:
    return config.with_(d=64, n_layers=2, n_h=2, d_h=16, d_r=8, d_v=16, d_c=32, vocab=128, bos=0,
                        eos=1, dense_width=96, n_routed=16, top_k=4, expert_width=32)


class Case(NamedTuple):
    """A config of which as much is trained as fits: `needs` nothing beforehand."""

    name: str
    config: Config
    recipe: Recipe
    updates: int = 5
    needs: int = 0


CASES = [Case("lite", LITE.with_(**EQUAL), LITTLE)]
QUICK = [Case("lite", _tiny(CASES[0].config), LITTLE.with_(sequence=32, batch=2), 2)]


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """What `all` takes of it: ours as soon as it is there, with transformers or without."""
    size, dtype = (256, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    flops = matmul_rate(device, dtype, size)
    with tempfile.TemporaryDirectory() as folder:
        for config, row in in_turns_as_wholes(*case[1:4], device.type, Path(folder) / "lite"):
            flops = max(flops, matmul_rate(device, dtype, size))
            add_mfu(row, config, flops)
            yield row


def _side_by_side(
    ours: DeepSeekV2, theirs: Any, shape: tuple[int, int], updates: int
) -> dict[str, Any]:
    """The same batch again and again, in turns; both sides start from the same weights."""
    difference, losses = agreement(ours, theirs, shape)
    # rate 0: the work is the same, and both sides keep the same weights
    our_step, their_step = (
        update(model, [loss], torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))
        for model, loss in zip((ours, theirs), losses, strict=True))
    tried = {}
    for attention, experts in itertools.product(ATTENTION, EXPERTS):
        use(theirs, attention, experts)
        tried[f"{attention}+{experts}"] = min(times(their_step, 2))
    best = min(tried, key=tried.get)
    use(theirs, *best.split("+"))
    pair = in_turns(our_step, their_step, updates, lambda: None, turn=1)
    tokens = shape[0] * shape[1]
    return {"batch": shape[0], "length": shape[1], **result(pair, tokens), "best": best,
            "tried_ms": milliseconds(tried), "difference": difference}

# SPDX-License-Identifier: MIT
"""The memory plan of a training step, before it is run.

What stands all the time is known in closed form: weights, and the moments of the optimiser. What
comes and goes is the gradients, which grow through the backward pass while the activations that
autograd kept shrink; the peak lies somewhere between, and `plan` walks through the blocks to find
it. How many bytes a block keeps per token depends on which of the equal algorithms runs, so it is
asked, not derived: the model is run forward on a few tokens, and what autograd saves is counted.

Experts are taken to be as full as a new router makes them for random tokens. Where rows are padded
to the fullest expert (`experts_padded`), a router that prefers some needs more than is planned.

Left out are what a kernel library keeps for itself and the allocator's fragments: a per cent or
two at the sizes that matter, more on tiny models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_ref.cross_entropy import chunk_rows
from dsv2_ref.forms import kernels_serve
from dsv2_ref.kernels.eight_bit_moments import BLOCK, PIECE, blocks_of
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.machine import autocast
from dsv2_ref.training.optim import by_muon
from dsv2_ref.training.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak of a step; `kept` at its fullest, right before the backward pass."""

    weights: int
    moments: int
    gradients: int       # all of them
    kept: int            # activations for the backward pass
    peak: int            # the most there is at one time

    def lines(self) -> str:
        gib = {"weights": self.weights, "moments": self.moments, "gradients": self.gradients,
               "activations kept": self.kept, "peak": self.peak}
        return ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in gib.items())


def plan(model: DeepSeekV2, recipe: Recipe, precision: str) -> Plan:
    """For one step of `recipe` on the model, which is where and in the dtype it will train."""
    c, weight = model.config, model.embedding.weight
    N = (recipe.micro_batch or recipe.batch) * recipe.sequence
    stream = N * c.d * max(weight.element_size(), 4 if precision == "bf16" else 0)
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(_moment_bytes(name, p, recipe) for name, p in model.named_parameters())
    block = _kept_a_token(model, recipe, precision) * N // c.n_layers
    again = round(recipe.recompute * c.n_layers)
    kept = [stream if i < again else block for i in range(c.n_layers)]

    head = 4 * model.head.weight.numel() + stream    # its gradients, made in the forward pass
    logits = 3 * 4 * min(chunk_rows(weight.device, c.vocab), N) * c.vocab
    ready = weights if recipe.micro_batch else 0     # gradients of the micro-batches before
    peaks = [weights + moments + ready + sum(kept) + head + logits]
    for i in reversed(range(c.n_layers)):
        done = weights - sum(p.nbytes for b in model.blocks[:i] for p in b.parameters())
        # what a block keeps, made again or not, and gradients in flight: as many bytes
        peaks.append(weights + moments + (ready or done) + sum(kept[:i]) + 2 * block)
    peaks.append(2 * weights + moments + _optimizer_bytes(model, recipe))
    return Plan(weights, moments, weights, sum(kept) + head, max(peaks))


def state_bytes(n_parameters: int, recipe: Recipe) -> int:
    """Weights, gradients and moments alone, before there is a model; Muon counted as AdamW."""
    moments = 2 + 8 / BLOCK if recipe.optimizer == "adamw8" else 8
    return int(n_parameters * (moments + (4 if recipe.weights == "bf16" else 8)))


def _moment_bytes(name: str, weight: Tensor, recipe: Recipe) -> int:
    if recipe.optimizer == "adamw8":
        return blocks_of(weight.shape) * (2 * BLOCK + 8)
    one = recipe.optimizer == "muon" and by_muon(name, weight)
    return weight.nbytes if one else 2 * weight.nbytes


def _optimizer_bytes(model: DeepSeekV2, recipe: Recipe) -> int:
    """Temporaries of an update."""
    largest = max(p.numel() for p in model.parameters())
    if recipe.optimizer == "adamw8":
        if kernels_serve(model.embedding.weight):
            return 0
        return 10 * 4 * min(PIECE, largest)                      # fp32: g, m, v, w, codes, bits
    return 4 * 4 * largest


def _kept_a_token(model: DeepSeekV2, recipe: Recipe, precision: str) -> int:
    """Bytes that all blocks keep per token, none recomputed, from one and from two sequences."""
    T, before = min(recipe.sequence, 1024), (model.recompute, model.training)
    model.recompute = 0.0
    model.train()
    one, two = (_kept(model, B, T, precision) for B in (1, 2))
    model.recompute = before[0]
    model.train(before[1])
    return max(two - one, 1) // T


def _kept(model: DeepSeekV2, B: int, T: int, precision: str) -> int:
    """What autograd keeps of B sequences, each storage once, weights aside."""
    seen: dict[int, tuple[int, Tensor]] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        # detached: an operation that keeps its own output would keep itself alive by it for ever
        tensor, storage = tensor.detach(), tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the tensor is held, so that its address is not given to another one
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    device = model.embedding.weight.device
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab, (B, T), generator=draw).to(device)
    with autocast(device, precision), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.losses(tokens, tokens)
    kept = sum(nbytes for nbytes, _ in seen.values())
    seen.clear()                 # `keep` lives as long as the graph does
    return kept

# SPDX-License-Identifier: MIT
"""One training step: read, backward, reduce, clip, update, record.

With a number of steps, on a CPU, training is reproducible bit for bit: the data order comes from
(seed, epoch), the protected sequences from (seed, step), and a saved state holds weights, moments,
data position, step, and what the guard against spikes remembers.

What is trained for is the `objective`: pretraining unless another one is given. Who trains is the
`World`: one process unless another one is given.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dsv2_ref.block import Traffic
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.routing import Router
from dsv2_ref.text.data import PackedBatches
from dsv2_ref.training.machine import autocast, fast_precision
from dsv2_ref.training.objective import Batch, Named, pretraining
from dsv2_ref.training.optim import (
    build_optimizers,
    check_moments,
    moments,
    put_moments,
    set_rate,
)
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.world import World, update

SPIKE, RECENT = 10.0, 64     # an update is left out at 10 times the median of the last 64 norms
STATE = ("config", "recipe", "data", "steps", "tokens", "elapsed", "precision", "norms",
         "skipped")                                  # what a state holds beside its tensors
FREE, RATES = ("steps", "seconds"), ("lr", "adamw_lr")        # a resumed run may differ in these


class TrainingDiverged(FloatingPointError):
    """The loss is no longer a number."""


class Batches(Protocol):
    """Where sequences come from; a position that can be saved as JSON.

    One that has a `report`, numbers by name about its last batch, has it in the log.
    """

    def next_batch(self, batch: int) -> tuple[Tensor, ...]: ...      # (batch, ...) each

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """A model, its optimisers and its place in the data; one `step` at a time.

    An array of tokens as `batches` is packed by the recipe.
    """

    def __init__(
        self, model: DeepSeekV2, recipe: Recipe, batches: Batches | np.ndarray,
        objective: Callable[[DeepSeekV2, Batch], Named] = pretraining, world: World | None = None,
    ) -> None:
        self.model, self.recipe, self.objective = model, recipe, objective
        self.world = world or World()
        self.device = model.like.device
        if recipe.weights == "bf16":
            model.bfloat16()
            for module in model.modules():
                if isinstance(module, Router):
                    module.float()
        model.recompute = recipe.recompute
        self.optimizers = build_optimizers(model, recipe.optimizer, recipe.lr, recipe.weight_decay,
                                           adamw_lr=recipe.adamw_lr, seed=recipe.seed,
                                           make=self.world.optimizers)
        if isinstance(batches, np.ndarray):
            batches = PackedBatches(batches, recipe.batch, recipe.sequence, recipe.seed)
        self.batches = batches
        self.precision = recipe.precision
        if self.precision == "auto":      # autocast is for fp32 weights
            self.precision = "fp32" if recipe.weights == "bf16" else fast_precision(self.device)
        self.steps = self.tokens = self.skipped = 0
        self.norms: list[float] = []     # of the gradient, the last few
        self.elapsed = 0.0           # seconds spent in steps, over all sessions

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        if self.recipe.steps is not None:
            return self.steps / self.recipe.steps
        return min(self.elapsed / self.recipe.seconds, 1.0)

    @property
    def last_update(self) -> int:
        """The step of the last update that was made and not left out."""
        return self.steps - self.skipped

    def step(self, with_load: bool = False) -> dict[str, Any]:
        """One update. Returns the log entry; `load` in it, if asked, is a list of `Traffic`."""
        began = time.perf_counter()
        rate = self._set_rate()
        batch = self._read(with_load)
        entry = {"step": self.steps + 1, "tokens": self.tokens + batch.tensors[0].numel()}
        losses, load, norm = self._gradients(batch)               # waits for the device once
        entry |= losses | rate | {"batch": len(batch)} | getattr(self.batches, "report", {})
        if self._unusable(entry):
            entry["skipped"] = True
        else:
            update(self.optimizers, norm, self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.steps, self.tokens = entry["step"], entry["tokens"]
        self.elapsed = self.world.clock(self.elapsed + time.perf_counter() - began)
        entry["seconds"] = round(self.elapsed, 3)
        if with_load:
            entry["load"] = load
        return entry

    def look(self) -> dict[str, float]:
        """Losses and gradient norm that the next step would find; it is not taken."""
        place = self.batches.state()
        losses, *_ = self._gradients(self._read(False))
        self.batches.load(place)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return losses

    def _set_rate(self) -> dict[str, float]:
        """Set the rates of this step; by name, for the log."""
        recipe, progress = self.recipe, self.progress
        if recipe.steps is not None:
            progress = (self.steps + 1) / recipe.steps    # a rate of 0 would waste step 1
        share = recipe.rate(progress)
        set_rate(self.optimizers, share)
        rates = {"lr": share * recipe.lr}
        if recipe.optimizer == "muon":
            rates["adamw_lr"] = share * (recipe.adamw_lr or recipe.lr)
        return rates

    def _read(self, with_load: bool) -> Batch:
        """The batch of this step, of all processes together."""
        recipe = self.recipe
        tensors = self.batches.next_batch(recipe.batch_at(self.progress))         # (B, T) each
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.steps)
        protected = torch.rand(len(tensors[0]), generator=draw) < recipe.protected       # (B,)
        return Batch(tensors, protected, with_load)

    def _gradients(self, batch: Batch) -> tuple[dict[str, float], list[Traffic], Tensor]:
        """Losses and gradient norm of all processes, by name, the load, and that norm, ()."""
        losses, load = self._backward(batch)
        gradients = [W.grad for W in self.model.parameters() if W.grad is not None]
        self.world.reduce([*gradients, *losses.values()])
        norm = self.world.norm(gradients)
        return _on_host(losses | {"gradient_norm": norm}), load, norm

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], list[Traffic]]:
        """Gradients of this process's rows, a micro-batch at a time.

        The losses by name, summed in fp64 on the device, and the load of the last micro-batch.
        """
        self.model.train()
        sums, load = self.world.backward(
            self._micro_batches(batch), lambda part: self.objective(self.model, part),
            around=lambda: autocast(self.device, self.precision))
        sums["loss"] = sum(sums.values())
        return sums, load

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """This process's rows of each micro-batch, and their share of the batch."""
        size = self.recipe.micro_batch or len(batch)
        for start in range(0, len(batch), size):
            whole = batch.rows(slice(start, start + size))
            part = self.world.share(whole)
            if not len(part):
                raise ValueError(f"micro-batch: {len(whole)} sequences, expected one for each "
                                 "process at least")
            yield part.rows(slice(None), self.device), len(part) / len(batch)

    def _unusable(self, entry: dict[str, Any]) -> bool:
        """Whether this update must be left out: no number, or far above the usual gradient norm.

        TrainingDiverged if three in a row are no numbers; three large ones in a row are believed.
        """
        norm = entry["gradient_norm"]
        finite = math.isfinite(entry["loss"]) and math.isfinite(norm)
        usual = statistics.median(self.norms) if len(self.norms) == RECENT else math.inf
        if finite:
            self.norms = [*self.norms, norm][-RECENT:]
        if finite and (norm <= SPIKE * usual or self.skipped >= 3):
            self.skipped = 0
            return False
        if not finite and self.skipped >= 2:
            raise TrainingDiverged(
                f"step {entry['step']}: loss {entry['loss']}, gradient norm {norm} at rate "
                f"{entry['lr']:.2e}, the third unusable step in a row; the weights are those of "
                f"step {self.last_update}, try a lower lr or a longer warmup"
            )
        self.skipped += 1
        return True

    def save(self, path: str | Path) -> None:
        """Weights, moments, data position and step, whole or not at all.

        Tensors have the names of the whole model, whoever holds them: model.NAME, moment.NAME.KEY.
        """
        tensors = {f"model.{name}": W for name, W in self.model.state_dict().items()}
        self.world.save(path, tensors | moments(self.optimizers), {
            "config": self.model.config.to_hf(), "recipe": asdict(self.recipe),
            "data": self.batches.state(), "steps": self.steps, "tokens": self.tokens,
            "elapsed": self.elapsed, "precision": self.precision, "norms": self.norms,
            "skipped": self.skipped,
        })

    def load(self, path: str | Path) -> None:
        """`restore` what `save` wrote."""
        self.restore(path, *self.world.load(path, self))

    def restore(
        self, path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any],
        other_rates: bool = False,
    ) -> None:
        """Go on from a saved state; with `other_rates` at the rates of this recipe.

        ValueError if something is missing, or belongs to another model, recipe or data.
        """
        if "groups" in state:
            raise ValueError(f"{path}: moments by number, as an earlier version wrote them, "
                             "expected moments by name, of a run by this version")
        for name in STATE:
            if name not in state:
                raise ValueError(f"{path}: {name}: missing, expected in a training state")
        self._check_same(path, state, FREE + RATES if other_rates else FREE)
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n[:6] == "model."}
        _check_weights(path, weights, self.model.state_dict())
        rest = {n: t for n, t in tensors.items() if n[:6] != "model."}
        remembered = check_moments(path, rest, self.optimizers)
        self.batches.load(state["data"])
        self.model.load_state_dict(weights)
        put_moments(remembered)
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.elapsed, self.precision = state["elapsed"], state["precision"]
        self.norms, self.skipped = state["norms"], state["skipped"]

    def _check_same(self, path: str | Path, state: dict[str, Any], free: tuple[str, ...]) -> None:
        mine = {"config": self.model.config.to_hf(), "recipe": asdict(self.recipe)}
        for what, values in json.loads(json.dumps(mine)).items():
            for key, value in values.items():
                if state[what].get(key) != value and key not in free:
                    raise ValueError(f"{path}: {what}.{key} was {state[what].get(key)!r}, expected "
                                     f"{value!r} to go on with this run")


def _check_weights(path: str | Path, found: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    for name in sorted(set(found) ^ set(mine)):
        what = "missing from" if name in mine else "not expected in"
        raise ValueError(f"model.{name}: {what} {path}")
    for name, t in mine.items():
        if found[name].shape != t.shape:
            raise ValueError(f"model.{name}: shape {tuple(found[name].shape)} in {path}, expected "
                             f"{tuple(t.shape)}")


def _on_host(scalars: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([t.double() for t in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))

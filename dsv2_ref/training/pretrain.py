# SPDX-License-Identifier: MIT
"""The pretraining loop (section 3.1), for any recipe.

A run ends after the recipe's steps, or by the clock. With steps, on a CPU, it is reproducible bit
for bit: the data order comes from (seed, epoch), the protected sequences from (seed, step), and a
saved state holds weights, moments, data position and step. What is saved is saved between two
steps, whole or not at all.
"""

import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dsv2_ref.block import Traffic as Load
from dsv2_ref.checkpoint import load_state, save_state
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.data import PackedBatches
from dsv2_ref.training.machine import autocast, fast_precision, set_fastest_threads
from dsv2_ref.training.optim import build_optimizers, set_rate
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder

LOSSES = ("language", "expert", "device", "communication")
SPIKE, RECENT = 10.0, 64     # an update is left out at 10 times the median of the last 64 norms


class TrainingDiverged(FloatingPointError):
    """The loss is no longer a number."""


class Trainer:
    """A model, its optimisers and its place in the data; one `step` at a time."""

    def __init__(self, model: DeepSeekV2, recipe: Recipe, tokens: np.ndarray) -> None:
        self.model, self.recipe = model, recipe
        self.device = model.embedding.weight.device
        if recipe.weights == "bf16":
            model.bfloat16()
            for block in model.blocks:
                if hasattr(block, "router"):
                    block.router.float()
        model.recompute = recipe.recompute
        self.optimizers = build_optimizers(model, recipe.optimizer, recipe.lr, recipe.weight_decay,
                                           adamw_lr=recipe.adamw_lr, seed=recipe.seed)
        self.batches = PackedBatches(tokens, recipe.batch, recipe.sequence, recipe.seed)
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

    def step(self, with_load: bool = False) -> dict[str, Any]:
        """One update. Returns the log entry; `load` in it is the list of `model.Load`, if asked."""
        began = time.perf_counter()
        recipe, progress = self.recipe, self.progress
        if recipe.steps is not None:
            progress = (self.steps + 1) / recipe.steps    # a rate of 0 would waste step 1
        rate = recipe.rate(progress)
        set_rate(self.optimizers, rate)
        x, y = self.batches.next_batch(recipe.batch_at(self.progress))                # (B, T) each
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.steps)
        protected = torch.rand(len(x), generator=draw) < recipe.protected        # (B,)
        self.model.train()
        entry = {"step": self.steps + 1, "tokens": self.tokens + x.numel()}
        sums, load = self._backward(x, y, protected, with_load)
        norm = clip_gradients(self.model.parameters(), recipe.clip)
        entry |= sums | {"gradient_norm": norm, "lr": rate * recipe.lr, "batch": len(x)}
        if self._unusable(entry):
            entry["skipped"] = True
        else:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.steps, self.tokens = entry["step"], entry["tokens"]
        self.elapsed += time.perf_counter() - began
        entry["seconds"] = round(self.elapsed, 3)
        if with_load:
            entry["load"] = load
        return entry

    def _backward(
        self, x: Tensor, y: Tensor, protected: Tensor, with_load: bool
    ) -> tuple[dict[str, float], list[Load]]:
        """Gradients of the batch, a micro-batch at a time: its losses, and the last one's load."""
        sums: dict[str, float] = dict.fromkeys(LOSSES, 0.0)
        size = self.recipe.micro_batch or len(x)
        for rows in zip(*(t.split(size) for t in (x, y, protected)), strict=True):
            share = len(rows[0]) / len(x)
            with autocast(self.device, self.precision):
                losses = self.model.losses(*(t.to(self.device) for t in rows), with_load)
            (losses.total * share).backward()
            for name in LOSSES:
                sums[name] += getattr(losses, name).item() * share
        return sums, losses.load

    def _unusable(self, entry: dict[str, Any]) -> bool:
        """Whether this update must be left out: no number, or far above the usual gradient norm.

        TrainingDiverged if three in a row are no numbers; three large ones in a row are believed.
        """
        norm, finite = entry["gradient_norm"], math.isfinite(entry["language"])
        finite = finite and math.isfinite(norm)
        usual = statistics.median(self.norms) if len(self.norms) == RECENT else math.inf
        if finite:
            self.norms = [*self.norms, norm][-RECENT:]
        if finite and (norm <= SPIKE * usual or self.skipped >= 3):
            self.skipped = 0
            return False
        self.skipped += 1
        if not finite and self.skipped >= 3:
            raise TrainingDiverged(
                f"step {entry['step']}: loss {entry['language']}, gradient norm {norm} at rate "
                f"{entry['lr']:.2e}, the third unusable step in a row; the weights are those of "
                f"step {self.steps - 2}, try a lower lr or a longer warmup"
            )
        return True

    def save(self, path: str | Path) -> None:
        """Weights, moments, data position and step as one file, atomically."""
        tensors = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        groups = []
        for i, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            groups.append(state["param_groups"])
            for j, values in state["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{name}": t for name, t in values.items()}
        save_state(path, tensors, {
            "config": self.model.config.to_hf(), "recipe": asdict(self.recipe), "groups": groups,
            "data": self.batches.state(), "steps": self.steps, "tokens": self.tokens,
            "elapsed": self.elapsed, "precision": self.precision, "norms": self.norms,
            "skipped": self.skipped,
        })

    def load(self, path: str | Path) -> None:
        """`restore` what `save` wrote."""
        self.restore(path, *load_state(path))

    def restore(self, path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from a saved state. ValueError if it belongs to another model, recipe or data."""
        mine = {"config": self.model.config.to_hf(), "recipe": asdict(self.recipe)}
        for what, values in json.loads(json.dumps(mine)).items():
            for key, value in values.items():
                if state[what].get(key) != value and key not in ("steps", "seconds"):
                    raise ValueError(f"{path}: {what}.{key} was {state[what].get(key)!r}, expected "
                                     f"{value!r} to go on with this run")
        self.batches.load(state["data"])
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n[:6] == "model."}
        self.model.load_state_dict(weights)
        for i, (optimizer, groups) in enumerate(zip(self.optimizers, state["groups"], strict=True)):
            values: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, j, key = name.split(".")
                    values.setdefault(int(j), {})[key] = t
            optimizer.load_state_dict({"state": values, "param_groups": groups})
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.elapsed, self.precision = state["elapsed"], state["precision"]
        self.norms, self.skipped = state["norms"], state["skipped"]


def clip_gradients(weights: Iterable[Tensor], most: float) -> float:
    """Scale all gradients so that their common norm is at most `most`; the norm, taken in fp32."""
    weights = [W for W in weights if W.grad is not None]
    norms = [torch.linalg.vector_norm(W.grad, dtype=torch.float32) for W in weights]
    total = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(weights, most, total)
    return total.item()


def train(
    trainer: Trainer, folder: str | Path | None = None, save_every: int | None = 0,
    evaluate: Callable[[], float] | None = None, evaluate_every: int = 0, load_every: int = 50,
    progress: bool = True, watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run to the end of the recipe. Returns the log, one dictionary a step.

    With a `folder`, the log goes to log.jsonl as it grows, and the state into a file of its own
    every `save_every` steps, at the end, and on Ctrl-C, which ends the run between two steps; the
    last two are kept; with `save_every` None there is the log alone.
    Every `load_every` steps the entry has the expert load: `expert_load` (layers, experts), and
    `gate_entropy` of each layer's affinities, in nats. `watch` is called with each entry.
    """
    run = RunFolder(folder) if folder is not None else None
    log: list[dict[str, Any]] = []
    by_clock = trainer.recipe.seconds is not None and trainer.device.type == "cpu"
    keep = run and save_every is not None
    log_file = closing(run.open_log(trainer.steps)) if run else nullcontext()
    listeners = [listen for listen in (run and run.log, watch) if listen]
    with _Interrupt() as interrupt, log_file, tqdm(
        total=1000, initial=round(1000 * trainer.progress), disable=not progress,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:

        def advance() -> None:
            with_load = bool(load_every) and trainer.steps % load_every == 0
            entry = trainer.step(with_load)
            if load := entry.pop("load", None):
                entry |= _load_entries(load)
            if evaluate is not None and evaluate_every and trainer.steps % evaluate_every == 0:
                entry["bits_per_byte"] = evaluate()
            log.append(entry)
            for listen in listeners:
                listen(entry)
            bar.update(round(1000 * min(trainer.progress, 1.0)) - bar.n)
            speed = f"{trainer.tokens / trainer.elapsed:,.0f} tokens/s"
            bar.set_postfix_str(f"step {trainer.steps}, loss {entry['language']:.3f}, {speed}",
                                refresh=False)
            if keep and (interrupt.asked or save_every and trainer.steps % save_every == 0):
                run.save(trainer.steps, trainer.save)
            interrupt.obey()

        while trainer.progress < 1:
            if by_clock and trainer.steps % 64 == 0:
                set_fastest_threads(advance)
            else:
                advance()
        if keep and log:
            run.save(trainer.steps, trainer.save)
    return log


def _load_entries(load: list[Load]) -> dict[str, list]:
    return {
        "expert_load": [layer.experts.tolist() for layer in load],
        "dropped": [round(layer.dropped, 4) for layer in load],
        "gate_entropy": [round(layer.entropy, 4) for layer in load],
    }


class _Interrupt:
    """Ctrl-C sets `asked`, so that a step is never torn; a second one interrupts at once."""

    asked = False

    def __enter__(self) -> "_Interrupt":
        try:
            self.before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:          # not the main thread: nothing to catch here
            self.before = None
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def obey(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

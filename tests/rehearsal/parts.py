# SPDX-License-Identifier: MIT
"""What is rehearsed. Each part is a function that returns what was counted, as JSON takes it."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

# first: it changes what dsv2_ref finds
from rehearsal.card import Card, card, on_card  # isort: skip
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.__main__ import main
from dsv2_ref.config import PRESETS, Config
from dsv2_ref.cost import causal_training_flops
from dsv2_ref.forms import add_norm
from dsv2_ref.inference.generate import sample
from dsv2_ref.inference.graph import DecodeStep
from dsv2_ref.kernels import grouped_experts
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import swiglu
from dsv2_ref.moe.routing import Router
from dsv2_ref.text import stories
from dsv2_ref.training.adamw8 import AdamW8
from dsv2_ref.training.memory import plan
from dsv2_ref.training.recipe import PAPER
from dsv2_ref.training.trainer import Trainer
from rehearsal.counts import Counts
from rehearsal.launches import Recorder

BF16 = torch.bfloat16
# peers that are not installed, and one whose operator no counting mode sees
NOT_HERE = "ModuleNotFoundError", "no rule registered for HigherOrderOperator flex_attention"


def _config(preset: str, layers: int) -> Config:
    """At full width; `layers` 0 for all."""
    return PRESETS[preset].with_(n_layers=layers) if layers else PRESETS[preset]


def _model(config: Config, here: torch.device) -> DeepSeekV2:
    """In bf16 but for the routers, as checkpoints are loaded."""
    with torch.device(here):
        model = DeepSeekV2(config)
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, Router):
            module.float()
    return model


def _see(counts: Counts, model: DeepSeekV2) -> None:
    """Weights that were there before."""
    with counts.during("weights"):
        for W in model.parameters():
            counts.see(W)


@contextlib.contextmanager
def _stage(name: str = "NVIDIA H200", index: int = 0, build: bool = False) -> Iterator[Any]:
    with card(name, index) as mode:
        recorder = Recorder(mode, build)
        with recorder.recording():
            yield mode, recorder


def _told(mode: Card, recorder: Recorder, counts: Counts) -> dict[str, Any]:
    return {
        "torch": sum(counts.launches.values()), "triton": sum(recorder.launches.values()),
        "launches": sum(counts.launches.values()) + sum(recorder.launches.values()),
        "waits": dict(mode.waits), "uploads": dict(counts.uploads), "wrong": recorder.wrong,
        "kernels": dict(recorder.launches), "files": recorder.files,
        "operations": dict(counts.launches.most_common()),
        "moved": dict(counts.moved.most_common()),
    }


def decode(preset: str = "lite", layers: int = 0, batch: int = 1, cached: int = 4096,
           cache: str = "latent", ragged: int = 0, index: int = 0,
           graph: int = 0, plain: int = 0) -> dict[str, Any]:
    """The second of two decode steps; `ragged` 1: the first sequence is one token shorter.

    `graph` 1: the step of static shapes, not captured; and how it differs at a third of the length.
    `plain` 1: the small steps between products in plain torch, not in kernels.
    """
    if graph:
        return _static(preset, layers, batch, cached, cache, ragged, index)
    with _stage(index=index) as (mode, recorder), torch.no_grad():
        model = _model(_config(preset, layers), mode.here).eval()
        if plain:
            model.across = lambda forms: replace(forms, rotate_both=None, swiglu=swiglu,
                                                 add_norm=add_norm)
        kept = model.new_cache(batch, cached + 16, cache)
        kept.lengths = [cached - 2 - (ragged and b == 0) for b in range(batch)]
        for _ in range(2):
            mode.waits.clear(), recorder.launches.clear()
            with Counts() as counts:
                last = torch.tensor([[0]] * batch, device=mode.here)
                h = model.hidden(last, kept, [1] * batch)[:, -1]
                sample(model.head(h), 0.0, 1.0, None).tolist()
    return _told(mode, recorder, counts) | {"layers": len(model.blocks)}


def _static(preset: str, layers: int, batch: int, cached: int, cache: str, ragged: int,
            index: int) -> dict[str, Any]:
    with _stage(index=index) as (mode, recorder), torch.no_grad():
        model = _model(_config(preset, layers), mode.here).eval()
        kept, told = model.new_cache(batch, cached + 16, cache), []
        step = DecodeStep(model, kept, capture=False)
        for length in (cached // 3, cached):
            kept.lengths = [length - 2 - (ragged and b == 0) for b in range(batch)]
            for _ in range(2):
                mode.waits.clear(), recorder.launches.clear()
                with Counts() as counts:
                    h = step(torch.tensor([0] * batch, device=mode.here), [1] * batch)
                    sample(model.head(h), 0.0, 1.0, None).tolist()
            told.append(_told(mode, recorder, counts) | {"lengths": kept.lengths})
        with Counts() as counts:             # the way of the capture, too
            replayed = DecodeStep(model, kept)
            replayed(torch.tensor([0] * batch, device=mode.here), [1] * batch)
    differs = [f"{name}: {told[0][name]} and {told[1][name]}" for name in
               ("kernels", "operations", "moved") if told[0][name] != told[1][name]]
    return told[1] | {"layers": len(model.blocks), "differs": differs,
                      "replays": getattr(replayed._graph, "replays", 0)}


def prefill(preset: str = "lite", layers: int = 0, tokens: int = 4096,
            cache: str = "latent") -> dict[str, Any]:
    """A prompt of one sequence, read at once, and the peak of what that takes."""
    with _stage() as (mode, recorder), torch.no_grad():
        model = _model(_config(preset, layers), mode.here).eval()
        kept = model.new_cache(1, tokens + 16, cache)
        with Counts() as counts:
            _see(counts, model)
            model.head(model.hidden(torch.zeros(1, tokens, dtype=torch.int64, device=mode.here),
                                    kept)[:, -1])
    return _told(mode, recorder, counts) | {"peak": counts.peak}


def backward(preset: str = "lite", layers: int = 0, batch: int = 4, sequence: int = 4096,
             recompute: float = 1.0) -> dict[str, Any]:
    """Forward and backward of one micro-batch: what is kept, the peak, and every gradient."""
    with _stage() as (mode, recorder):
        model = _model(_config(preset, layers), mode.here).train()
        model.recompute = recompute
        ids = torch.zeros(batch, sequence, dtype=torch.int64, device=mode.here)
        with Counts() as counts:
            _see(counts, model)
            with counts.during("forward"):
                losses = model.losses(ids, ids)
            kept = counts.now - counts.born["weights"]
            with counts.during("backward"):
                losses.total.backward()
        wrong = [name for name, W in model.named_parameters()
                 if W.grad is None or (W.grad.shape, W.grad.dtype) != (W.shape, W.dtype)]
    return _told(mode, recorder, counts) | {
        "kept": kept, "peak": counts.peak, "gradients": sum(W.nbytes for W in model.parameters()),
        "wrong_gradients": wrong}


def step(preset: str = "lite", layers: int = 0, batch: int = 8, micro: int = 4,
         recompute: float = 1.0, sequence: int = 4096, steps: int = 2) -> dict[str, Any]:
    """The last of some training steps by notebook 15's recipe; memory beside the plan's."""
    recipe = PAPER["lite"].with_(batch=batch, micro_batch=micro, optimizer="adamw8",
                                 weights="bf16", recompute=recompute, lr=3e-4, warmup=0.1,
                                 sequence=sequence).lasting(5e6)
    config = _config(preset, layers)
    tokens = np.random.default_rng(0).integers(0, config.vocab, 3 * batch * sequence + 1000)
    with _stage() as (mode, recorder), Counts() as counts:
        with counts.during("weights"), torch.device(mode.here):
            model = DeepSeekV2(config)
            trainer = Trainer(model, recipe, tokens)
        with counts.during("plan"):
            planned = plan(trainer.model, recipe, trainer.precision)
        update: dict[str, int] = {}
        with _phases(counts, recorder, update):
            for _ in range(steps):
                counts.clear(), mode.waits.clear(), recorder.launches.clear(), update.clear()
                trainer.step()
    moments = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    found = {
        "weights": sum(W.nbytes for W in model.parameters()),
        "moments": sum(t.nbytes for t in moments if on_card(t)),
        "n_weights": len(list(model.parameters())),
        "peak": counts.peak, "peak_of": counts.peak_of, "at_peak": counts.at_peak,
        "plan": {name: getattr(planned, name) for name in
                 ("weights", "moments", "gradients", "kept", "peak")},
    }
    return _told(mode, recorder, counts) | found | {"update": update}


@contextlib.contextmanager
def _phases(counts: Counts, recorder: Recorder, update: dict[str, int]) -> Iterator[None]:
    """Say which part of a step is at work; `update` gets the launches of the optimiser."""

    def within(phase: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = sum(counts.launches.values()), sum(recorder.launches.values())
            with counts.during(phase):
                out = function(*args, **kwargs)
            if phase == "update":
                update["torch"] = sum(counts.launches.values()) - before[0]
                update["triton"] = sum(recorder.launches.values()) - before[1]
            return out

        return run

    with contextlib.ExitStack() as stack:
        for phase, owner, name in (
            ("forward", DeepSeekV2, "losses"), ("backward", Tensor, "backward"),
            ("update", AdamW8, "step"),
        ):
            stack.enter_context(mock.patch.object(owner, name,
                                                  within(phase, getattr(owner, name))))
        yield


def flops(preset: str = "lite", layers: int = 0, sequence: int = 4096) -> dict[str, float]:
    """Of a training step on one sequence: what torch multiplies, our kernels', and cost.py's.

    Torch's counter does not see our kernels; theirs are counted from their arguments' sizes: three
    products for each slot of an expert, two for each visible pair of an attention head, and twice
    as many in the backward pass.
    """
    c = _config(preset, layers)
    with _stage() as (mode, _), FlopCounterMode(display=False) as counted:
        model = _model(c, mode.here).train()
        ids = torch.zeros(1, sequence, dtype=torch.int64, device=mode.here)
        model.losses(ids, ids).total.backward()
    slots = sequence * c.top_k * (c.n_layers - c.n_dense)
    pairs = sequence * (sequence + 1) // 2 * c.n_h * c.n_layers
    experts = 3 * 6 * c.d * c.expert_width * slots
    attention = 3 * 2 * (c.d_h + c.d_r + c.d_v) * pairs
    return {"torch": counted.get_total_flops(), "experts": experts, "attention": attention,
            "cost": causal_training_flops(c, sequence) * sequence}


def variants(preset: str = "lite", batch: int = 1, cache: str = "latent", upto: int = 131_072,
             every: int = 1013, ragged: int = 0) -> dict[str, Any]:
    """Compilations of each kernel over decode steps of one layer, at lengths from 1 to `upto`."""
    c = PRESETS[preset].with_(n_layers=1, n_dense=0, max_positions=upto + 8)
    with _stage() as (mode, recorder), torch.no_grad():
        model = _model(c, mode.here).eval()
        kept = model.new_cache(batch, upto + 8, cache)
        last = torch.zeros(batch, 1, dtype=torch.int64, device=mode.here)
        for cached in sorted({*range(1, 70), *range(70, upto, every), upto}):
            kept.lengths = [cached - (ragged and b == 0) for b in range(batch)]
            model.hidden(last, kept)
    return {"variants": recorder.variants(), "wrong": recorder.wrong,
            "launches": sum(recorder.launches.values())}


def shapes(build: int = 0) -> dict[str, Any]:
    """Every kernel at the sizes of Lite and V2, both ways; really compiled if `build`."""
    failed: list[str] = []
    with _stage(build=bool(build)) as (mode, recorder):
        for preset in ("lite", "v2"):
            for what, run in _calls(PRESETS[preset], mode.here):
                try:
                    run()
                except Exception as error:
                    failed.append(f"{preset} {what}: {type(error).__name__}: {error}"[:300])
    seconds = [made["seconds"] for made in recorder.compiled.values() if made]
    return {"launches": sum(recorder.launches.values()), "failed": failed,
            "wrong": recorder.wrong, "variants": recorder.variants(), "seconds": sum(seconds)}


def wide() -> dict[str, Any]:
    """Decoding with latents wider than any published model's, compiled."""
    with _stage(build=True) as (mode, recorder), torch.no_grad():
        for d_c in (768, 1024):
            for n_h in (16, 128):
                c = PRESETS["lite"].with_(n_layers=1, d_c=d_c, n_h=n_h)
                model = _model(c, mode.here).eval()
                kept = model.new_cache(1, 4096)
                kept.lengths = [4000]
                model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=mode.here), kept)
    return {"failed": [], "wrong": recorder.wrong, "variants": recorder.variants()}


def _calls(c: Config, here: torch.device) -> Iterator[tuple[str, Any]]:
    """Attention, routing and experts as a layer calls them, by name."""
    one = _model(c.with_(n_layers=1, n_dense=0), here)

    def read(B: int, T: int, S: int, kind: str) -> None:
        with torch.no_grad():
            cache = one.new_cache(B, min(S + 16, c.max_positions), kind)
            cache.lengths = [S - T] * B
            one.hidden(torch.zeros(B, T, dtype=torch.int64, device=here), cache)

    def train(B: int, T: int) -> None:
        one.train()
        ids = torch.zeros(B, T, dtype=torch.int64, device=here)
        one.losses(ids, ids).total.backward()

    for B in (1, 128):
        for S in (4096, 32_768, 131_072):
            for kind in ("latent", "six_bit"):
                yield f"decode {B} x {S} {kind}", lambda B=B, S=S, kind=kind: read(B, 1, S, kind)
            yield f"read 1024 of {S} x {B}", lambda B=B, S=S: read(B, 1024, S, "latent")
    for B, T in ((1, 4096), (4, 4096), (1, 32_768)):
        yield f"train {B} x {T}", lambda B=B, T=T: train(B, T)


def experts_of(preset: str = "v2", tokens: int = 16_384) -> dict[str, Any]:
    """Forward and backward of one layer's routed experts alone."""
    c = PRESETS[preset]
    with _stage() as (mode, recorder), Counts() as counts, torch.device(mode.here):
        x = torch.empty(tokens, c.d, dtype=BF16, requires_grad=True)
        indices = torch.empty(tokens, c.top_k, dtype=torch.int64)
        gates = torch.empty(tokens, c.top_k, requires_grad=True)
        shapes = ((c.expert_width, c.d), (c.expert_width, c.d), (c.d, c.expert_width))
        weights = [torch.empty(c.n_routed, *s, dtype=BF16, requires_grad=True) for s in shapes]
        grouped_experts.experts_fused(x, indices, gates, *weights).sum().backward()
    return _told(mode, recorder, counts) | {"peak": counts.peak}


def command(lines: list[str]) -> dict[str, Any]:
    """`python -m dsv2_ref LINE` for each line, one after the other in one folder."""
    told, folder = [], Path(tempfile.mkdtemp())
    texts = folder / "texts"
    texts.mkdir()
    for i, story in enumerate(stories.sample(seed=0, n=150)):
        (texts / f"{i}.txt").write_text(story.text, encoding="utf-8")
    for line in lines:
        words = line.replace("TEXTS", str(texts)).replace("OUT", str(folder / "out")).split()
        began, out, messages = time.perf_counter(), io.StringIO(), io.StringIO()
        with _stage() as (mode, recorder), Counts() as counts, \
             contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            code = main(words)
        told.append(_told(mode, recorder, counts) | {
            "command": line, "code": code, "peak": counts.peak,
            "seconds": round(time.perf_counter() - began, 1), "out": out.getvalue()[-2000:],
            "messages": messages.getvalue()[-2000:]})
    return {"commands": told, "files": sorted(str(f.relative_to(folder)) for f in
                                              (folder / "out").rglob("*") if f.is_file())}


def bench(name: str, card_name: str = "NVIDIA H200") -> dict[str, Any]:
    """`bench NAME` at full size: every row, the peak, launches that are wrong.

    Numbers mean nothing: a comparison finds 0, and every call takes 1 ms.
    """
    out = io.StringIO()
    with _stage(card_name) as (mode, recorder), Counts() as counts, \
         contextlib.redirect_stdout(out):
        code = main(["bench", name, "--json"])
    record = json.loads(out.getvalue())
    failed = [f"{case}: {why}" for case, why in record.get("cases", {}).items()
              if why != "measured"]
    failed += [f"{row['case']}: {name}: {ms}" for row in record["rows"]
              for name, ms in row.get("ms", {}).items()
              if isinstance(ms, str) and not any(reason in ms for reason in NOT_HERE)]
    return {"code": code, "cases": [row["case"] for row in record["rows"]], "failed": failed,
            "peak": counts.peak, "wrong": recorder.wrong, "variants": recorder.variants()}


PARTS = {f.__name__: f for f in (decode, prefill, backward, step, flops, variants, shapes, wide,
                                 experts_of, command, bench)}

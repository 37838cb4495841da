# SPDX-License-Identifier: MIT
"""Watching a run while it goes on: its numbers in TensorBoard or trackio, beside log.jsonl.

log.jsonl has more (each layer's load) and needs no package; `figures` draws it. What is here is for
a browser that follows a run of hours. Both packages are optional, and both are behind two methods,
`write` and `close`. A writer is never worth a run: if one fails on the way, that is told once and
training goes on without it.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

KINDS = ("tensorboard", "trackio")
LOSSES = ("language", "expert", "device", "communication",       # of pretraining
          "answer", "text", "balance")                           # of learning to find needles


class Writer(Protocol):
    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def fair_shares(load: Any) -> np.ndarray:
    """Slots that experts got, (..., E), in fair shares: 1 where all get the same, 0 for none."""
    load = np.asarray(load, float)
    return load / np.maximum(load.mean(-1, keepdims=True), 1e-12)


def scalars(entry: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The numbers of a log entry by name; the speed is that since the entry `before`.

    Load is told relative to a fair share, the fullest and the emptiest expert of all layers; the
    gates' entropy and the share of dropped slots are means over layers.
    """
    values = {f"loss/{name}": entry[name] for name in LOSSES if name in entry}
    values |= {name: entry[name] for name in ("gradient_norm", "lr", "batch")}
    values["skipped"] = float(entry.get("skipped", False))
    before = before or {"tokens": 0, "seconds": 0.0}
    if (seconds := entry["seconds"] - before["seconds"]) > 0:
        values["tokens_per_second"] = (entry["tokens"] - before["tokens"]) / seconds
    if "bits_per_byte" in entry:
        values["bits_per_byte"] = entry["bits_per_byte"]
    if "expert_load" in entry:
        shares = fair_shares(entry["expert_load"])                          # (layers, E)
        values |= {"load/fullest": float(shares.max()), "load/emptiest": float(shares.min()),
                   "load/gate_entropy": float(np.mean(entry["gate_entropy"])),
                   "load/dropped": float(np.mean(entry["dropped"]))}
    return values


class Watch:
    """Takes log entries and hands their scalars to a writer; `kind` is one of KINDS.

    `steps` are already done (0 for a new run). ImportError if the package is missing.
    """

    def __init__(self, kind: str, folder: str | Path, steps: int,
                 say: Callable[[str], object]) -> None:
        if kind not in KINDS:
            raise ValueError(f"watch: {kind!r}, expected one of {', '.join(KINDS)}")
        self.kind, self.say = kind, say
        self.before: Mapping[str, Any] | None = None
        opened = _TensorBoard if kind == "tensorboard" else _Trackio
        self.writer: Writer | None = opened(Path(folder), steps)

    def __call__(self, entry: Mapping[str, Any]) -> None:
        values = scalars(entry, self.before)
        self.before = {name: entry[name] for name in ("tokens", "seconds")}
        self._try(lambda writer: writer.write(values, entry["step"]))

    def close(self) -> None:
        self._try(lambda writer: writer.close())
        self.writer = None

    def _try(self, act: Callable[[Writer], None]) -> None:
        if self.writer is None:
            return
        try:
            act(self.writer)
        except Exception as error:      # of a foreign package, a network, a disk
            self.writer = None
            told = " ".join(str(error).split()) or type(error).__name__
            self.say(f"watching with {self.kind} ends ({told}); the run goes on")


class _TensorBoard:
    """Event files in FOLDER/tensorboard: `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path, steps: int) -> None:
        module = _needed("torch.utils.tensorboard", "tensorboard")
        # what a killed run wrote after its last state is hidden
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    """A local trackio run, named like the folder: `trackio show --project dsv2_ref`.

    Steps that a killed run had done after its last state appear twice there.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        module = _needed("trackio", "trackio")
        with redirect_stdout(sys.stderr):            # stdout is for results
            self.run = module.init(project="dsv2_ref", name=folder.resolve().name,
                                   resume="allow" if steps else "never", embed=False)

    def write(self, values: dict[str, float], step: int) -> None:
        with redirect_stdout(sys.stderr):
            self.run.log(values, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.run.finish()


def _needed(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"watching with {package} needs {package}: "
                          "pip install 'dsv2-ref[watch]'") from error

# SPDX-License-Identifier: MIT
"""The pretraining loop (section 3.1), for any recipe.

A run ends after the recipe's steps, or by the clock. What is saved is saved between two steps,
whole or not at all: the beginning, so that there is always something to go back to, then every so
many steps, at the end, and when the run is stopped. After a step without numbers nothing is saved;
if the run ends so, states made by the update to blame or after it give way to one from before.
"""

import math
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dsv2_ref.block import Traffic
from dsv2_ref.training.machine import set_fastest_threads
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.trainer import Trainer, TrainingDiverged
from dsv2_ref.training.world import clip_gradients

__all__ = ["Stopped", "Trainer", "TrainingDiverged", "clip_gradients", "train"]
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")       # some systems lack some of them


class Stopped(KeyboardInterrupt):
    """A signal ended the run between two steps; `code` is the exit code, 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def train(
    trainer: Trainer, folder: RunFolder | str | Path | None = None, save_every: int | None = 0,
    evaluate: Callable[[], float] | None = None, evaluate_every: int = 0, load_every: int = 50,
    progress: bool = True, watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run to the end of the recipe. Returns the log, one dictionary a step.

    With a `folder`, the log goes to log.jsonl as it grows, and the state into a file of its own
    every `save_every` steps, at the beginning, at the end, and on Ctrl-C or a signal that asks to
    stop, which ends the run between two steps (`Stopped`); the last two are kept; with `save_every`
    None there is the log alone. TrainingDiverged if loss or gradient are no numbers at the end.
    Every `load_every` steps the entry has the expert load: `expert_load` (layers, experts), and
    `gate_entropy` of each layer's affinities, in nats. `watch` is called with each entry.
    """
    log: list[dict[str, Any]] = []
    world = trainer.world
    with ExitStack() as opened:
        run = _open(folder, trainer, opened)
        keep = run and save_every is not None
        stop = opened.enter_context(_Signals())
        bar = opened.enter_context(tqdm(
            total=1000, initial=round(1000 * trainer.progress), disable=not progress,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"))

        def advance() -> None:
            entry = _entry(trainer, load_every, evaluate, evaluate_every)
            log.append(entry)
            if run and world.first:
                run.log(entry)
            if watch:
                watch(entry)
            _show(bar, trainer, entry)
            asked = world.asked(stop.asked)
            due = asked or save_every and trainer.steps % save_every == 0
            if keep and due and _sound(entry):
                _save(run, trainer)
            if asked:
                raise Stopped(asked)

        try:
            if keep and not trainer.steps:
                _save(run, trainer)
            _to_the_end(trainer, advance, log)
        except TrainingDiverged:
            if keep and world.first:
                run.forget_from(trainer.last_update)
            raise
        if keep and log:
            _save(run, trainer)
    return log


def _open(
    folder: RunFolder | str | Path | None, trainer: Trainer, opened: ExitStack
) -> RunFolder | None:
    """The run's folder, locked and with an open log where this process writes it."""
    if folder is None:
        return None
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    if trainer.world.first:
        opened.enter_context(run.held())
        run.open_log(trainer.steps)
        opened.callback(run.close)
    return run


def _save(run: RunFolder, trainer: Trainer) -> None:
    """The state of all processes; the first forgets older ones."""
    run.save(trainer.steps, trainer.save, trainer.world.suffix, forget=trainer.world.first)


def _sound(entry: dict[str, Any]) -> bool:
    """Whether loss and gradient were numbers; weights that give none are worth no state."""
    return math.isfinite(entry["loss"]) and math.isfinite(entry["gradient_norm"])


def _to_the_end(
    trainer: Trainer, advance: Callable[[], None], log: list[dict[str, Any]]
) -> None:
    """Advance, which adds to the log, until the run is done."""
    by_clock = (trainer.recipe.seconds is not None and trainer.device.type == "cpu"
                and not trainer.world.several)       # several would not agree on how many steps
    while trainer.progress < 1:
        if by_clock and trainer.steps % 64 == 0:
            set_fastest_threads(advance)
        else:
            advance()
    if not log:
        return
    last = trainer.look() if _sound(log[-1]) else log[-1]      # the last update may ruin, too
    if not _sound(last):
        raise TrainingDiverged(
            f"step {trainer.steps}: loss {last['loss']}, gradient norm {last['gradient_norm']} at "
            "the end of the run, try a lower lr or a longer warmup")


def _entry(
    trainer: Trainer, load_every: int, evaluate: Callable[[], float] | None, evaluate_every: int
) -> dict[str, Any]:
    """One step, and what the log says of it."""
    with_load = bool(load_every) and trainer.steps % load_every == 0
    entry = trainer.step(with_load)
    if load := entry.pop("load", None):
        entry |= _load_entries(load)
    if evaluate is not None and evaluate_every and trainer.steps % evaluate_every == 0:
        entry["bits_per_byte"] = evaluate()
    return entry


def _load_entries(load: list[Traffic]) -> dict[str, list]:
    return {
        "expert_load": [layer.experts.tolist() for layer in load],
        "dropped": [round(layer.dropped, 4) for layer in load],
        "gate_entropy": [round(layer.entropy, 4) for layer in load],
    }


def _show(bar: tqdm, trainer: Trainer, entry: dict[str, Any]) -> None:
    bar.update(round(1000 * min(trainer.progress, 1.0)) - bar.n)
    speed = f"{trainer.tokens / trainer.elapsed:,.0f} tokens/s"
    loss = entry.get("language", entry["loss"])
    bar.set_postfix_str(f"step {trainer.steps}, loss {loss:.3f}, {speed}", refresh=False)


class _Signals:
    """A signal to stop sets `asked`, so that a step is never torn; a second Ctrl-C stops at once.

    Those that whoever started the process has it ignore (nohup, a job in the background) stay so.
    """

    asked: int | None = None

    def __enter__(self) -> "_Signals":
        self.before: dict[int, Any] = {}
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                try:
                    self.before[number] = signal.signal(number, self._ask)
                except ValueError:          # not the main thread: nothing to catch here
                    break
        return self

    def _ask(self, number: int, _: object) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

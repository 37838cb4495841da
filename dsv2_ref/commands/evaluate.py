# SPDX-License-Identifier: MIT
"""`evaluate`: a saved model on benchmarks by name, through lm-evaluation-harness."""

import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.sandbox import Uncontained
from dsv2_ref.alignment.sandbox import run as run_program
from dsv2_ref.alignment.tasks import LOCAL, SANDBOXED
from dsv2_ref.commands.common import say
from dsv2_ref.commands.options import filled
from dsv2_ref.commands.prompts import bytes_of
from dsv2_ref.files.whole import write_text
from dsv2_ref.inference.benchmarks import BENCHMARKS, Benchmark, benchmark
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import default_device

RUN = {"code_questions", *(spec["task"] for spec in SANDBOXED.values())}      # programs are run
PAPERS = ", ".join(b.name for b in BENCHMARKS if b.task is not None)


def add_options(parser: ArgumentParser) -> None:
    parser.description = (
        "Evaluate a saved model on tasks, into one object of JSON. Tasks of ours need no network: "
        f"{', '.join(LOCAL)}. Benchmarks of the paper have its shots and stand beside its number: "
        f"{PAPERS}. Any other name is a task of lm-eval. Needs the extra `eval`.")
    add = parser.add_argument
    add("model", type=filled, metavar="MODEL", help="folder of a saved model, as data/model")
    add("--tasks", type=filled, required=True, metavar="A,B", help="names, see above")
    add("--shots", type=int, help="examples before each question; default: the paper's for its "
        "benchmarks, else the task's own or none")
    add("--limit", type=int, help="the first so many questions of each task")
    add("--batch", type=int, default=16, help="texts that are read at once; default: 16")
    add("--memory", default="1GB",
        help="for the caches of all texts that are written at once; default: 1GB")
    add("--out", type=filled, metavar="FILE",
        help="the JSON goes here too, after each task; a file of an earlier one is replaced")
    add("--quiet", dest="progress", action="store_false", help="no progress bar")
    parser.set_defaults(act=evaluate_command)


def evaluate_command(
    model: str, tasks: str, shots: int | None = None, limit: int | None = None, batch: int = 16,
    memory: str = "1GB", out: str | None = None, progress: bool = True,
) -> dict[str, Any]:
    """{"model", "lm_eval", "tasks": {name: its shots, samples, metrics, and the paper's number}}"""
    folder, room = Path(model), bytes_of(memory)
    _check(folder, out, shots=(shots, 0), limit=(limit, 1), batch=(batch, 1))
    asked = {name: named(name) for name in tasks.replace(",", " ").split()}
    if not asked:
        raise ValueError(f"tasks: {tasks!r}, expected at least one name")
    if any(isinstance(spec, dict) and spec["task"] in RUN for spec, _ in asked.values()):
        try:
            run_program("")                            # before hours of writing programs
        except Uncontained as error:
            raise ValueError(f"tasks: programs cannot be run here: {error}") from None
    lm_eval = harness()
    from dsv2_ref.inference.lm_eval import Adapter

    manager = lm_eval.tasks.TaskManager(
        include_defaults=any(isinstance(spec, str) for spec, _ in asked.values()))
    for name, (spec, _) in asked.items():
        if isinstance(spec, str) and spec not in manager.task_index:
            raise ValueError(f"tasks: {name!r} is unknown, expected some of ours "
                             f"({', '.join([*LOCAL, *SANDBOXED])}), of the paper ({PAPERS}) or of "
                             "lm-eval")
    device = default_device()
    loaded = checkpoint.load(model, None if device == "cuda" else torch.float32, device)
    adapter = Adapter(loaded, load_tokenizer(folder / "tokenizer.json"), batch, room, progress)
    result: dict[str, Any] = {"model": model, "lm_eval": lm_eval.__version__, "tasks": {}}
    for name, (spec, paper) in asked.items():
        say(f"{name}:")
        given = paper.shots if shots is None and paper is not None else shots
        try:
            with redirect_stdout(sys.stderr):
                found = lm_eval.simple_evaluate(
                    model=adapter, tasks=[spec], num_fewshot=given, limit=limit, bootstrap_iters=0,
                    log_samples=False, task_manager=manager)
        except (OSError, KeyError) as error:           # its data cannot be had
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"tasks: {name!r} cannot be loaded: {why}") from error
        result["tasks"][name] = told(found, spec if isinstance(spec, str) else spec["task"], paper)
        if out:                                        # a later task may fail
            write_text(out, dumps(result, indent=2) + "\n")
    return result


def _check(folder: Path, out: str | None, **numbers: tuple[int | None, int]) -> None:
    """ValueError for what can be refused at once; numbers: each with the least it may be."""
    if not folder.is_dir():
        raise ValueError(f"model: {str(folder)!r} is no folder, expected a saved model, as "
                         "data/model")
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: {value}, expected at least {least}")
    if out and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise ValueError(f"out: {out!r} cannot be written, expected a file in a folder that exists")
    if out and Path(out).exists() and not _is_ours(Path(out)):
        raise ValueError(f"out: {out!r} exists and is no result of this command, expected a new "
                         "file or an earlier result")


def _is_ours(path: Path) -> bool:
    """Whether a file is what this command writes."""
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"model", "lm_eval", "tasks"} <= found.keys()


def named(name: str) -> tuple[str | dict[str, Any], Benchmark | None]:
    """What lm-eval is asked for, and the paper's benchmark if it is one."""
    if name in LOCAL or name in SANDBOXED:
        return dict((LOCAL | SANDBOXED)[name]), None
    paper = benchmark(name)
    task = name if paper is None else paper.task
    return dict(SANDBOXED[task]) if task in SANDBOXED else task, paper


def harness() -> Any:
    """lm-eval. ImportError of one line where it, or something that it needs, is missing."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(f"evaluate needs {error.name}: .venv/bin/pip install -e '.[eval]'"
                          ) from error
    return lm_eval


def told(found: dict[str, Any], task: str, paper: Benchmark | None) -> dict[str, Any]:
    """The numbers of one task, or of a group and its parts."""
    def metrics(of: str) -> dict[str, float]:
        return {key.removesuffix(",none"): value for key, value in found["results"][of].items()
                if isinstance(value, int | float) and "_stderr" not in key and key != "sample_len"}

    parts = {part: metrics(part) for part in found["n-samples"] if part != task}
    result = {"task": task, "samples": sum(n["effective"] for n in found["n-samples"].values()),
              "shots": max(found["n-shot"].values(), default=0),
              "metrics": metrics(task) if task in found["results"] else {}}
    if parts:
        result["parts"] = parts
    if paper is not None:
        value = result["metrics"].get(paper.metric.removesuffix(",none"))
        result["paper"] = {"benchmark": paper.name, "metric": paper.measure, "V2": paper.paper,
                           "ours": None if value is None else round(100 * value, 2),
                           "differs": paper.differs}
    return result

# SPDX-License-Identifier: MIT
"""`paper`: the paper's claims beside ours, or with --plan its cluster on paper."""

import json as js
from argparse import ArgumentParser
from dataclasses import asdict

from dsv2_ref import paper
from dsv2_ref.config import V2
from dsv2_ref.parallel import hours, plan
from dsv2_ref.parallel.split import Layout, split

SIZES = [128 * 4**i for i in range(5)] + [65536]


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plan", action="store_true",
                        help="memory and GPU-hours of V2 on the paper's cluster, every assumption")
    parser.set_defaults(act=paper_command)


def paper_command(json: bool, plan: bool) -> str:
    if plan:
        return _plan_json() if json else "\n".join(_plan_lines())
    rows = paper.rows()
    return paper.as_json(rows) if json else paper.as_table(rows)


def _plan_json() -> str:
    step = hours.step(V2)
    return js.dumps({
        "memory": [asdict(m) for m in plan.memory(V2, step.layout, step.micro_batches)],
        "fullest": plan.changes(V2, step.layout, step.micro_batches),
        "step": asdict(step) | {"hours": step.hours},
        "assumed": [asdict(row) | {"middle": getattr(hours.Assumptions(), row.name),
                                   "hours": [best, worst]}
                    for row, best, worst in hours.sensitivity(V2)],
        "growth": {name: [asdict(s) | {"hours": s.hours} for s in hours.growth(V2, SIZES, grown)]
                   for name, grown in (("batch kept", False), ("batch grown", True))},
    }, indent=2)


def _plan_lines() -> list[str]:
    step = hours.step(V2)
    lay, m = step.layout, step.micro_batches
    best, worst = hours.extremes(V2)
    shares = ", ".join(f"{name} {100 * s / step.seconds:.0f} %" for name, s in step.parts.items())
    return [
        f"V2 on {lay.size:,} devices: {lay.pp} stages x {lay.ep} shares of experts x {lay.dp} "
        f"replicas, {m} micro-batches.", "Nothing of this is measured.",
        "", f"GB of one device of each stage, of {plan.CARD / 1e9:.0f}", "", *_memory(lay, m), "",
        "GB of the fullest, with one assumption changed", "", *_changes(lay, m), "",
        f"GPU-hours of a trillion tokens: {step.hours / 1e3:.0f}K in the middle, {best / 1e3:.0f}K "
        f"to {worst / 1e3:.0f}K; the paper says {paper.HOURS / 1e3:.1f}K.",
        f"A step of {step.seconds:.1f} s:", f"{shares}.", "", *_assumed(), "",
        "More devices, the batch of 9,216 sequences kept, or grown with them", "", *_growth(),
    ]


def _memory(lay: Layout, m: int) -> list[str]:
    plans = {again: plan.memory(V2, lay, m, again=again) for again in plan.AGAIN}
    lines = [("stage", "layers", "weights", "gradients", "optimizer", "kept", "working", "in all",
              "  with nothing computed again")]
    for i, layers in enumerate(split(V2, lay.pp)):
        one = plans["part"][i]
        sizes = [*vars(one).values(), one.total, plans["nothing"][i].total]
        lines.append((str(i), str(len(layers)), *(f"{size / 1e9:.1f}" for size in sizes)))
    return paper.aligned(lines, range(8))


def _changes(lay: Layout, m: int) -> list[str]:
    return [f"{size / 1e9:6.1f}  {name}" for name, size in plan.changes(V2, lay, m).items()]


def _assumed() -> list[str]:
    middle = hours.Assumptions()
    lines = [("assumed", "best", "middle", "worst", "K hours", "what [where from]")]
    for row, best, worst in hours.sensitivity(V2):
        values = (row.best, getattr(middle, row.name), row.worst)
        lines.append((row.name, *(v if isinstance(v, str) else f"{v:g}" for v in values),
                      f"{best / 1e3:.0f}-{worst / 1e3:.0f}", f"{row.what} [{row.source}]"))
    return paper.aligned(lines, range(1, 5))


def _growth() -> list[str]:
    lines = [("devices", "micro-batches", "idle", "optimizer GB", "K hours", "grown to", "K hours")]
    for kept, grown in zip(hours.growth(V2, SIZES), hours.growth(V2, SIZES, True), strict=True):
        most = max(m.optimizer for m in plan.memory(V2, kept.layout, kept.micro_batches))
        lines.append((f"{kept.layout.size:,}", str(kept.micro_batches),
                      f"{100 * kept.parts['idle'] / kept.seconds:.0f} %", f"{most / 1e9:.2f}",
                      f"{kept.hours / 1e3:.0f}", f"{grown.batch:,}", f"{grown.hours / 1e3:.0f}"))
    return paper.aligned(lines, range(6))

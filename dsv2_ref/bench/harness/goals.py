# SPDX-License-Identifier: MIT
"""Our own goals, beside the rows that they are about: what is read, and how far it should get.

Ratios to something in the same run where there is one, so that a card of another speed reads them
too; the rates, times and bytes are those of one H200 of 141 GB. Below `base` a kernel is not done.
What to try then stands in bench/first_look.md.
"""

import re
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """`reads`: a step whose time is divided by ours, or tflops, us, tokens/s, ratio, peak GiB."""

    bench: str
    case: str                          # a regular expression for the whole name
    reads: str
    base: float
    goal: float
    moonshot: float | None = None

    @property
    def less_is_better(self) -> bool:
        return self.goal < self.base


BIG, LONG = "16 heads, 128x(4096|8192)", "16 heads, 1x131072"
FORWARD, BACKWARD = (rf"{way}, \d+ heads, \d+x8192" for way in ("forward", "backward"))
GOALS = (
    Goal("mla_decode", BIG, "copy", 0.85, 0.95, 1.02),
    Goal("mla_decode", BIG, "bmm", 1.8, 2.2, 2.4),
    Goal("mla_decode", LONG, "us", 60, 46, 42),
    Goal("mla_decode", "128 heads, 128x.*", "tflops", 300, 450, 550),
    # not one sequence of 8K: there launching takes the time, not reading
    Goal("six_bit_decode", f"16 heads, 128x8192|{LONG}", "bf16", 1.3, 1.8, 2.2),
    Goal("attention", FORWARD, "cudnn", 0.6, 0.8, 0.95),
    Goal("attention", FORWARD, "flex", 1.0, 1.25, 1.5),
    Goal("attention", FORWARD, "sdpa", 3, 4),
    Goal("attention", FORWARD, "tflops", 400, 500, 600),
    Goal("attention", BACKWARD, "cudnn", 0.55, 0.75, 0.9),
    Goal("attention", BACKWARD, "flex", 1.0, 1.15),
    Goal("attention", BACKWARD, "tflops", 280, 350, 430),
    Goal("experts", "V2-Lite, forward", "grouped_mm", 1.0, 1.5),
    Goal("experts", "V2-Lite, forward", "tflops", 300, 420, 480),
    Goal("experts", "V2-Lite, forward and backward", "grouped_mm", 1.0, 1.4),
    Goal("experts", "V2-Lite, forward and backward", "tflops", 280, 400, 460),
    Goal("train", "lite", "tokens/s", 10e3, 16e3, 20e3),
    Goal("train", "lite", "ratio", 2, 3),
    Goal("train", "lite", "peak GiB", 130, 115, 100),
)


def judged(bench: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal that this row has, with its value and how far that got."""
    found = []
    for goal in GOALS:
        if goal.bench == bench and re.fullmatch(goal.case, row["case"]):
            value = _value(goal.reads, row)
            if value is not None:
                found.append({"reads": goal.reads, "value": value, "base": goal.base,
                              "goal": goal.goal, "moonshot": goal.moonshot,
                              "reached": _reached(goal, value)})
    return found


def line(bench: str, row: dict[str, Any]) -> str:
    """A row for a person: its time, its best peer, its goals."""
    ms = row.get("ms", {}).get(row.get("ours"))
    parts = [f"{bench}: {row['case']}"]
    if isinstance(ms, float):
        parts.append(f"{ms:.4g} ms")
    if row.get("best") and row.get("ratio"):
        parts.append(f"{row['ratio']:.2f}x of {row['best']}")
    parts += [f"{g['reads']} {g['value']:.4g} (base {g['base']:g}, goal {g['goal']:g}): "
              f"{g['reached']}" for g in row.get("goals", [])]
    return "; ".join(parts)


def _value(reads: str, row: dict[str, Any]) -> float | None:
    if reads == "us":
        return 1e3 * row["ms"][row["ours"]]
    if reads == "peak GiB":
        return row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None
    names = {"tokens/s": "ours_tokens_per_s", "ratio": "ratio", "tflops": "tflops"}
    if reads in names:
        return row.get(names[reads])
    # cuDNN may refuse two widths, and then takes padded values
    times = [t for name, t in row["speed_of"].items() if name in (reads, f"{reads}_padded")]
    return min(times, default=None)


def _reached(goal: Goal, value: float) -> str:
    sign = -1 if goal.less_is_better else 1
    found = "below base"
    for name in ("base", "goal", "moonshot"):
        bar = getattr(goal, name)
        if bar is not None and sign * value >= sign * bar:
            found = name
    return found

# SPDX-License-Identifier: MIT
"""How to train: the paper's recipes (section 3.1.2), and one for minutes on a CPU.

 |                       | V2 (paper)              | Lite (paper)  | our default                   |
 |-----------------------|-------------------------|---------------|-------------------------------|
 | optimiser             | AdamW(0.9, 0.95)        | the same      | Muon, and AdamW beside it     |
 | peak rate, warm-up    | 2.4e-4, 2K steps        | 4.2e-4, same  | 6e-3, 3 % of the run          |
 | decay                 | x0.316 at 60 % and 90 % | 80 % and 90 % | from 30 %, linearly to 2 %    |
 | batch                 | 2304 -> 9216 x 4096     | 4608 x 4096   | 6 x 256                       |
 | weight decay, clip    | 0.1, 1.0                | the same      | the same                      |

`PAPER` holds the paper's numbers as recipes of the same type. A schedule is a function of the share
of the run that is done, so that a run may be measured in steps or by the clock.
"""

import math
from dataclasses import dataclass, replace
from typing import Any


def step_decay(
    progress: float, warmup: float, at: tuple[float, float] = (0.6, 0.9), factor: float = 0.316
) -> float:
    """The paper's schedule: share of the peak rate at `progress` in [0, 1] of the tokens."""
    if progress < warmup:
        return progress / warmup
    return factor ** sum(progress >= mark for mark in at)


def linear_decay(
    progress: float, warmup: float, hold: float = 0.3, final: float = 0.02
) -> float:
    """Warm up, hold until `hold`, then fall linearly to `final` of the peak at the end."""
    if progress < warmup:
        return progress / warmup
    if progress <= hold:
        return 1.0
    return 1.0 - (1.0 - final) * min((progress - hold) / (1.0 - hold), 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Exactly one of `steps` and `seconds` ends the run."""

    steps: int | None = None
    seconds: float | None = None
    optimizer: str = "muon"              # or "adamw", the paper's; "adamw8", it in little memory
    weights: str = "fp32"                # or "bf16", with "adamw8" alone; the router stays in fp32
    recompute: float = 0.0               # share of the blocks run again in the backward pass
    lr: float = 6e-3                     # peak rate
    adamw_lr: float | None = None        # of embedding, head, routers, norms beside Muon; None: lr
    weight_decay: float = 0.1
    clip: float = 1.0                    # largest norm of all gradients together
    schedule: str = "linear"             # or "step", the paper's
    warmup: float = 0.03                 # share of the run
    decay_at: tuple[float, float] = (0.6, 0.9)    # "step" only, shares of the run
    sequence: int = 256                  # tokens
    batch: int = 6                       # sequences
    micro_batch: int | None = None       # sequences at a time, gradients are summed; None: all
    batch_start: int | None = None       # sequences at the start of a ramp to `batch`
    batch_ramp: float = 0.0              # share of the run the ramp takes
    protected: float = 0.1               # share of sequences in which no slot is dropped
    precision: str = "auto"              # "fp32", "bf16" (autocast), auto: bf16 where it is fast
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"steps: {self.steps} and seconds: {self.seconds}, expected just one")
        for name in ("steps", "seconds", "batch", "sequence", "lr", "adamw_lr", "clip",
                     "batch_start", "micro_batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}, expected a number > 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed}, expected 0 to 2**32 - 1")
        if self.weights == "bf16" and self.optimizer != "adamw8":
            raise ValueError(f"optimizer: {self.optimizer!r}, expected 'adamw8' for bf16 weights: "
                             "small updates would be rounded away")
        for name in ("warmup", "batch_ramp", "protected", "recompute"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected a share from 0 to 1")
        for name, known in (("schedule", ("linear", "step")), ("weights", ("fp32", "bf16")),
                            ("precision", ("auto", "fp32", "bf16")),
                            ("optimizer", ("muon", "adamw", "adamw8"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of {known}")

    def rate(self, progress: float) -> float:
        """Share of the peak rate at `progress` in [0, 1]."""
        if self.schedule == "step":
            return step_decay(progress, self.warmup, self.decay_at)
        return linear_decay(progress, self.warmup)

    def batch_at(self, progress: float) -> int:
        """Sequences of a step at `progress`: a linear ramp from `batch_start` to `batch`."""
        if self.batch_start is None or progress >= self.batch_ramp:
            return self.batch
        grown = (self.batch - self.batch_start) * progress / self.batch_ramp
        return round(self.batch_start + grown)

    def with_(self, **changes: Any) -> "Recipe":
        """A copy with those changes that are not None; `steps` and `seconds` replace each other.

        `lr` moves `adamw_lr` in proportion, and `batch` the ramp's start, unless they are given.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        if "batch" in changes and self.batch_start is not None:          # the ramp keeps its ratio
            changes.setdefault("batch_start",
                               max(1, changes["batch"] * self.batch_start // self.batch))
        if "lr" in changes and self.adamw_lr is not None:
            changes.setdefault("adamw_lr", changes["lr"] * (self.adamw_lr / self.lr))
        if len({"steps", "seconds"} & set(changes)) == 1:
            changes = {"steps": None, "seconds": None} | changes
        return replace(self, **changes)

    def lasting(self, tokens: float) -> "Recipe":
        """The same, in as many whole steps as come closest to `tokens`; the ramp is counted."""
        if not 0 < tokens < math.inf:
            raise ValueError(f"tokens: {tokens}, expected a finite number > 0")
        ramp = 0.0 if self.batch_start is None else self.batch_ramp
        mean = self.batch - ramp * (self.batch - (self.batch_start or self.batch)) / 2
        return self.with_(steps=max(1, round(tokens / (mean * self.sequence))))


# The paper's own numbers (`train --recipe v2`, scaled down by --steps and --batch). 8.1T tokens are
# about 215,700 steps of 9216 x 4096; warm-up is 2K steps.
PAPER = {
    "v2": Recipe(steps=220_000, optimizer="adamw", lr=2.4e-4, schedule="step", warmup=2 / 220,
                 sequence=4096, batch=9216, batch_start=2304, batch_ramp=225 / 8100),
    "lite": Recipe(steps=302_000, optimizer="adamw", lr=4.2e-4, schedule="step", warmup=2 / 302,
                   decay_at=(0.8, 0.9), sequence=4096, batch=4608),
}

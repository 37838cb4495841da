# SPDX-License-Identifier: MIT
"""Schedules of a pipeline, and a simulator: who works when, and how long nobody does.

A model is cut into S stages on p ranks, a batch into m micro-batches. Each rank does its actions in
a fixed order, one at a time, and before each waits for what that needs:

  F  forward            after F of the stage before, and the link, where that is another rank
  B  whole backward     after its own F, and B or I of the stage behind, and the link
  I  backward for the inputs: the half of B that the stage before waits for
  W  backward for the weights: after its own I. Nobody waits for it: it can fill a bubble

The *bubble* is the share of the ranks' time in which they do nothing, from the first action of the
step to the last one. Everything else follows: `simulate` takes an order of actions and the seconds
of F, I and W of each stage (B takes I + W) and finds the start and end of each. Sending is counted
as delay and not as work, and links are never full.

`order` makes the short schedules itself, and ZB-H2, which torch has not. The others are taken from
torch as it runs them (`pipeline.torch_order`). There an F and a B that DualPipe-V overlaps run one
after the other, and what both have made goes on when both are done.

Sources: GPipe (Huang and others, 2018); 1F1B and interleaved (Narayanan and others, 2021,
"Efficient large-scale language model training on GPU clusters", section 2.2); ZB-H1 and ZBV (Qi and
others, 2023, "Zero bubble pipeline parallelism", which V2's section 3.1.3 cites); DualPipe-V (the
table of DeepSeek's repository DualPipe).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """What is special about a schedule."""

    torch: str               # its class in torch.distributed.pipelining
    chunks: int              # stages on each rank
    v: bool = False          # stages go down the ranks and up again: both ends are on rank 0
    splits: bool = False     # I and W apart


SCHEDULES = {
    "gpipe": Kind("ScheduleGPipe", 1),
    "1f1b": Kind("Schedule1F1B", 1),
    "interleaved": Kind("ScheduleInterleaved1F1B", 2),
    "zb-h1": Kind("ScheduleInterleavedZeroBubble", 1, splits=True),
    "interleaved-zb": Kind("ScheduleInterleavedZeroBubble", 2, splits=True),
    "zbv": Kind("ScheduleZBVZeroBubble", 2, v=True, splits=True),
    "dualpipev": Kind("ScheduleDualPipeV", 2, v=True, splits=True),
}


def kind_of(schedule: str) -> Kind:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule]


def n_stages(schedule: str, p: int) -> int:
    """Stages of a schedule on p ranks."""
    return kind_of(schedule).chunks * p


def stages_of(schedule: str, p: int, rank: int) -> list[int]:
    """The stages of one of p ranks: r; r and r + p; in a V r and 2p - 1 - r."""
    kind = kind_of(schedule)
    if not 0 <= rank < p:
        raise ValueError(f"rank: {rank}, expected 0 to {p - 1}")
    if kind.v:
        return [rank, 2 * p - 1 - rank]
    return [rank + chunk * p for chunk in range(kind.chunks)]


class Action(NamedTuple):
    """`kind` F, B, I or W of a stage for a micro-batch."""

    kind: str
    stage: int
    batch: int
    joined: bool = False     # with the next one: what it made goes on when that is done

    def __str__(self) -> str:
        return f"{self.kind}{self.batch}"


class Slot(NamedTuple):
    """An action and its time, in seconds."""

    action: Action
    start: float
    end: float


Order = Sequence[Sequence[Action]]       # the actions of each rank


def order(schedule: str, p: int, m: int) -> list[list[Action]]:
    """The actions of each of p ranks, for m micro-batches.

    ZB-H1 starts like 1F1B and lets W wait; ZB-H2 starts almost twice as many forwards.
    """
    if schedule == "gpipe":
        return [_phases([r], m, m, p, m) for r in range(p)]
    if schedule == "1f1b":
        return [_phases([r], m, min(m, p - 1 - r), p, m) for r in range(p)]
    if schedule == "zb-h1":
        return [_weights_late(r, m, min(m, p - r), r) for r in range(p)]
    if schedule == "zb-h2":
        return [_weights_late(r, m, min(m, 2 * (p - r) - 1), 2 * r) for r in range(p)]
    if schedule != "interleaved":
        raise ValueError(f"schedule: {schedule!r}, expected gpipe, 1f1b, interleaved, zb-h1 or "
                         "zb-h2; the order of the others is torch's")
    turn = m // max(1, m // p)           # micro-batches that one chunk reads before the next does
    return [_phases([r, r + p], m, min(2 * m, turn + 2 * (p - 1 - r)), turn, m) for r in range(p)]


def _phases(stages: list[int], m: int, ahead: int, turn: int, last: int) -> list[Action]:
    """Warm-up: `ahead` forwards; then a forward and a backward in turn; then what backwards remain.

    The chunks take turns of `turn` micro-batches, forward from the first, backward from the last.
    """
    def walk(kind: str, stages: list[int]) -> list[Action]:
        seen: dict[int, int] = defaultdict(int)
        actions = []
        for i in range(m * len(stages)):
            stage = stages[i // turn % len(stages)]
            actions.append(Action(kind, stage, seen[stage]))
            seen[stage] += 1
        return actions

    forward, backward = walk("F", stages), walk("B", stages[::-1])
    steady = len(forward) - ahead
    pairs = [a for pair in zip(forward[ahead:], backward, strict=False) for a in pair]
    return forward[:ahead] + pairs + backward[steady:]


def _weights_late(stage: int, m: int, ahead: int, wait: int) -> list[Action]:
    """Warm-up: `ahead` forwards; then I, the W of `wait` micro-batches before, F, in turn."""
    F, I, W = ([Action(kind, stage, j) for j in range(m)] for kind in "FIW")
    turns = zip_longest(I, [None] * wait + W, F[ahead:])
    return F[:ahead] + [a for turn in turns for a in turn if a is not None]


@dataclass(frozen=True)
class Times:
    """Seconds of F, I and W of each stage for one micro-batch, and of a message to another rank."""

    F: Sequence[float]
    I: Sequence[float]
    W: Sequence[float]
    link: float = 0.0

    def of(self, action: Action) -> float:
        if action.kind == "B":
            return self.I[action.stage] + self.W[action.stage]
        return getattr(self, action.kind)[action.stage]


def even(stages: int, F: float = 1.0, I: float = 1.0, W: float = 1.0,
         link: float = 0.0) -> Times:
    """The same times for each stage."""
    return Times([F] * stages, [I] * stages, [W] * stages, link)


@dataclass(frozen=True)
class Timeline:
    """What each rank did when; simulated or measured."""

    rows: Sequence[Sequence[Slot]]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        slots = [slot for row in self.rows for slot in row]
        return max(slot.end for slot in slots) - min(slot.start for slot in slots)

    @property
    def busy(self) -> list[float]:
        """Seconds of work of each rank."""
        return [sum(slot.end - slot.start for slot in row) for row in self.rows]

    @property
    def bubble(self) -> float:
        """Share of the makespan in which a rank does nothing, on average."""
        return 1 - sum(self.busy) / len(self.rows) / self.makespan

    @property
    def longest(self) -> float:
        """Seconds of the rank with the longest way from its first action to its last.

        What a step costs where no rank waits at the end for the others (Qi and others, section 4:
        the update is made before the common norm is known, and taken back where it was wrong).
        """
        return max(row[-1].end - row[0].start for row in self.rows)

    @property
    def rolling_bubble(self) -> float:
        """The bubble of such a step: the one that is zero in ZBV and ZB-H2."""
        return 1 - sum(self.busy) / len(self.rows) / self.longest

    def held(self, size: Sequence[float]) -> list[float]:
        """The most that each rank keeps at once, a micro-batch of stage s keeping size[s].

        From the start of F to the end of B or W: torch frees nothing at the end of I.
        """
        most = []
        for row in self.rows:
            now = peak = 0.0
            for slot in row:
                sign = (slot.action.kind == "F") - (slot.action.kind in "BW")
                now += sign * size[slot.action.stage]
                peak = max(peak, now)
            most.append(peak)
        return most

    def in_flight(self) -> list[int]:
        """The most micro-batches that each stage holds at once."""
        stages = 1 + max(slot.action.stage for row in self.rows for slot in row)
        return [round(max(self.held([float(s == stage) for s in range(stages)])))
                for stage in range(stages)]


Made = tuple[str, int, int]              # F, I or W of a stage and a micro-batch; a B makes an I


def simulate(order: Order, times: Times) -> Timeline:
    """When each action of an order starts and ends. ValueError where ranks wait for each other."""
    ranks = range(len(order))
    place = {action.stage: rank for rank in ranks for action in order[rank]}
    there: dict[Made, float] = {}        # since when what an action made can be used or sent
    rows: list[list[Slot]] = [[] for _ in ranks]
    joined: list[list[Made]] = [[] for _ in ranks]
    progress = True
    while progress:
        progress = False
        for rank in ranks:
            while len(rows[rank]) < len(order[rank]):
                action = order[rank][len(rows[rank])]
                ready = _ready(action, there, place, times.link)
                if ready is None:
                    break
                start = max(ready, rows[rank][-1].end if rows[rank] else 0.0)
                end = start + times.of(action)
                rows[rank].append(Slot(action, start, end))
                joined[rank].append(("I" if action.kind == "B" else action.kind, *action[1:3]))
                if not action.joined:
                    there |= dict.fromkeys(joined[rank], end)
                    joined[rank].clear()
                progress = True
    for rank in ranks:
        if len(rows[rank]) < len(order[rank]):
            stuck = order[rank][len(rows[rank])]
            raise ValueError(f"order: rank {rank} waits forever for what {stuck} of stage "
                             f"{stuck.stage} needs")
    return Timeline(rows)


def _ready(
    action: Action, there: dict[Made, float], place: dict[int, int], link: float
) -> float | None:
    """When all that an action needs is there; None if that is not yet known."""
    kind, stage, batch = action[:3]
    if kind == "W":
        needs = [("I", stage, batch)]
    elif kind == "F":
        needs = [("F", stage - 1, batch)] if stage else []
    else:
        needs = [("F", stage, batch)]
        needs += [("I", stage + 1, batch)] if stage + 1 in place else []
    if any(need not in there for need in needs):
        return None
    return max((there[need] + (link if place[need[1]] != place[stage] else 0.0)
                for need in needs), default=0.0)


def published_bubble(
    schedule: str, p: int, m: int, F: float = 1.0, I: float = 1.0, W: float = 1.0
) -> float | None:
    """The bubble as published; F, I and W are the times of one stage. None where none is known.

    All assume equal stages, links that cost nothing and m >= p micro-batches; beyond that

      gpipe, 1f1b    (p-1)/(m+p-1)
      interleaved    (p-1)/(v·m+p-1) with v = 2 stages on each rank; m a multiple of p
      zb-h1          (p-1)(F+I-W) idle beside m(F+I+W) of work; W at most F and I
      zbv            0; F = I = W, m >= 2p-1, and no common end: it is the `rolling_bubble`
      dualpipev      (p-1)(FB+B-3W) idle beside 2m(F+I+W) of work, B = I + W and FB the time of an
                     overlapped pair, here F + B; F = I, W at most that, and m >= 2p
    """
    work = kind_of(schedule).chunks * m * (F + I + W)
    idle = {
        "gpipe": (p - 1) * (F + I + W), "1f1b": (p - 1) * (F + I + W),
        "interleaved": (p - 1) * (F + I + W), "zb-h1": (p - 1) * (F + I - W),
        "zbv": 0.0 if F == I == W else None,
        "dualpipev": (p - 1) * (F + 2 * I - W),
    }.get(schedule)
    return None if idle is None else idle / (work + idle)

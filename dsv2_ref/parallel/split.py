# SPDX-License-Identifier: MIT
"""How ranks are used: the layout, the layers of each stage, and what a pipeline demands.

The slowest stage sets the pace of all, so stages should have equal *work*, not equally many layers:
the first layer has no experts, and the head of a model costs as much as some layers do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from dsv2_ref.config import Config
from dsv2_ref.cost import activated_parameters, pair_flops_expanded
from dsv2_ref.parallel.schedule import kind_of, n_stages, stages_of


@dataclass(frozen=True)
class Layout:
    """pp stages, dp replicas, ep shares of the experts; dp · ep ranks read different rows."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "1f1b"   # of the pipeline
    zero1: bool = False      # ranks with the same parameters share their moments

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")

    @property
    def rows(self) -> int:
        """Ranks that read different rows: those of one stage."""
        return self.dp * self.ep

    @property
    def size(self) -> int:
        """All ranks."""
        return self.pp * self.rows


def layout_of(size: int, ep: int, pp: int, schedule: str, zero1: bool) -> Layout:
    """The layout of so many ranks: dp is what is left. ValueError if it is no whole number."""
    one = Layout(pp, 1, ep, schedule, zero1)
    if size < 1 or size % one.size:
        raise ValueError(f"ep x pp: {ep} x {pp}, expected a divisor of the {size} ranks")
    return replace(one, dp=size // one.size)


def experts_each(config: Config, ep: int) -> int:
    """Routed experts of each of ep ranks."""
    if config.n_routed % ep:
        raise ValueError(f"ep: {ep}, expected a divisor of the {config.n_routed} routed experts")
    return config.n_routed // ep


class Work(NamedTuple):
    """FLOPs per token: forward, backward for the inputs, backward for the weights."""

    F: float
    I: float
    W: float


def work(config: Config, layers: range, sequence: int = 4096) -> Work:
    """Of a stage, in causal sequences; the head is the last one's, looking up a row costs nothing.

    A product with weights is three of one size. Scores of attention have no weights: two products
    forward, four backward for the inputs.
    """
    head = config.vocab * config.d + config.d                                # and the norm before
    n = sum(_matrices(config, config.is_moe(layer)) for layer in layers)
    n += head if config.n_layers - 1 in layers else 0
    scores = len(layers) * pair_flops_expanded(config) / config.n_layers * (sequence + 1) / 2
    return Work(2 * n + scores, 2 * n + 2 * scores, 2 * n)


@cache
def _matrices(config: Config, moe: bool) -> int:
    """Weights of a layer that each token is multiplied with."""
    one = config.with_(n_layers=1, n_dense=int(not moe), tie_embeddings=False)
    return activated_parameters(one) - config.vocab * config.d - config.d


def split(config: Config, stages: int, sequence: int = 4096) -> list[range]:
    """Layers in stages such that the fullest has the least work; then as even as can be."""
    n = config.n_layers
    if not 1 <= stages <= n:
        raise ValueError(f"stages: {stages} of {n} layers, expected 1 to {n}, a layer for each")
    upto = [0.0, *accumulate(sum(work(config, range(i, i + 1), sequence)) for i in range(n))]

    def best(join: Callable[[float, float], float], most: float) -> tuple[float, list[range]]:
        """Of all splits whose stages cost at most `most`, the one whose joined cost is least."""
        ways: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}          # by layers placed
        for _ in range(stages):
            longer: dict[int, tuple[float, list[range]]] = {}
            for a, (so_far, ranges) in ways.items():
                for b in range(a + 1, n + 1):
                    cost = upto[b] - upto[a]
                    if cost <= most and (b not in longer or join(so_far, cost) < longer[b][0]):
                        longer[b] = join(so_far, cost), [*ranges, range(a, b)]
            ways = longer
        return ways[n]

    least, _ = best(max, float("inf"))
    return best(lambda so_far, cost: so_far + cost**2, least)[1]


def ranges_of(schedule: str, ranges: Sequence[range], rank: int, p: int) -> list[range]:
    """Which of a split's stages a rank holds, in ascending order."""
    if len(ranges) != n_stages(schedule, p):
        raise ValueError(f"stages: {len(ranges)}, expected {n_stages(schedule, p)} for {schedule} "
                         f"on {p} ranks")
    return [ranges[stage] for stage in stages_of(schedule, p, rank)]


def check(
    config: Config, schedule: str, p: int, micro_batches: int, recompute: float = 0.0
) -> None:
    """ValueError of one line for what cannot be, before any process group is made."""
    kind, stages = kind_of(schedule), n_stages(schedule, p)
    if p < 1:
        raise ValueError(f"pp: {p}, expected at least 1")
    if config.n_layers < stages:
        raise ValueError(f"layers: {config.n_layers}, expected at least {stages}, one for each "
                         f"stage ({schedule} has {kind.chunks} on each of {p} ranks)")
    least = stages if schedule == "dualpipev" else p
    if micro_batches < least:
        raise ValueError(f"micro-batches: {micro_batches}, expected at least {least} for "
                         f"{schedule} on {p} ranks")
    rounds = micro_batches // p
    if kind.torch.startswith("ScheduleInterleaved") and micro_batches % rounds:
        raise ValueError(f"micro-batches: {micro_batches}, expected a multiple of {rounds}, the "
                         f"rounds of {schedule} on {p} ranks")
    if recompute and kind.splits:
        raise ValueError(f"recompute: {recompute}, expected 0 with {schedule}: a backward pass in "
                         "two parts would make activations again for each weight")

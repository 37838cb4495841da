# SPDX-License-Identifier: MIT
"""The optimisers: AdamW as in the paper, Muon for small budgets.

The paper trains with AdamW(0.9, 0.95) and weight decay 0.1.

A run of minutes has few steps to make use of. Muon replaces a matrix's momentum M = U·S·Vᵀ by about
U·Vᵀ, so that every direction moves alike: after 180 steps of the main job's model on Python source
the loss was 4.55 nats a token, against 5.73 and 5.62 for AdamW at 3e-3 and 6e-3 (one seed, AdamW
not tuned further). This is our choice, not the paper's.
`torch.optim.Muon` takes 2-D matrices only, while a layer's experts are one (E, w, d) stack; the
class below treats the last two dimensions as the matrix and equals torch's on 2-D (a test says so).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsv2_ref.kernels.eight_bit_moments import blocks_of
from dsv2_ref.moe.experts import MixtureOfExperts
from dsv2_ref.training.adamw8 import AdamW8
from dsv2_ref.training.machine import fast_precision


def orthogonalise(M: Tensor, iterations: int = 5) -> Tensor:
    """About U·Vᵀ of M = U·S·Vᵀ, for each matrix of (..., rows, columns).

    A quintic Newton-Schulz iteration: X <- aX + (b·XXᵀ + c·(XXᵀ)²)X maps every singular value
    towards 1 (into about 0.7 to 1.2; the coefficients trade the limit for steepness at zero). In
    bf16 where matrices are faster in it; a CPU that is not made for it takes up to 11 times longer.
    """
    fast = torch.bfloat16 if fast_precision(M.device) == "bf16" else torch.float32
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = M.shape[-2] > M.shape[-1]
    X = (M.mT if tall else M).to(fast)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape, X = X.shape, X.reshape(-1, *X.shape[-2:])
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.view(shape)
    return X.mT if tall else X


class Muon(Optimizer):
    """Momentum, orthogonalised. Parameters are matrices or stacks of them, (..., rows, columns).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)), as torch's is by default.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            alike: dict[tuple[int, int], list[Tensor]] = {}    # of one shape: iterated together
            for W in group["params"]:
                if W.grad is not None:
                    alike.setdefault(tuple(W.shape[-2:]), []).append(W)
            for (rows, columns), weights in alike.items():
                for W in weights:
                    if not self.state[W]:
                        self.state[W]["momentum"] = torch.zeros_like(W)
                    self.state[W]["momentum"].lerp_(W.grad, 1 - mu)
                ahead = [W.grad.lerp(self.state[W]["momentum"], mu) for W in weights]   # Nesterov
                updates = orthogonalise(torch.cat([M.reshape(-1, rows, columns) for M in ahead]))
                sizes = [W.numel() // (rows * columns) for W in weights]
                for W, update in zip(weights, updates.split(sizes), strict=True):
                    W.mul_(1 - lr * group["weight_decay"])
                    W.add_(update.view_as(W), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def by_muon(name: str, weight: Tensor) -> bool:
    """Whether Muon takes a parameter of that name: matrices and stacks that are no tables."""
    return weight.ndim > 1 and not any(x in name for x in ("embedding", "head", "router"))


def alone(kind: type[Optimizer], groups: list[dict], **options: object) -> list[Optimizer]:
    """One optimiser of that kind, of one process."""
    return [kind(groups, **options)]


def build_optimizers(
    model: nn.Module, kind: str, lr: float, weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95), adamw_lr: float | None = None, seed: int = 0,
    make: Callable[..., list[Optimizer]] = alone,
) -> list[Optimizer]:
    """The optimisers of a run; each group carries its peak rate as `peak`.

    kind 'adamw': everything by AdamW at `lr`; 'adamw8': the same in little memory, bf16 weights
    rounded stochastically from `seed`. kind 'muon': matrices and stacks of experts by Muon
    at `lr`, the embedding, the head, the routers and the norms by AdamW at `adamw_lr`, None for
    `lr`. Norm gains are never decayed: pulling a gain to zero regularises nothing (the paper does
    not say). `make` makes the optimisers of one kind; processes may share them.
    """
    if kind not in ("adamw", "adamw8", "muon"):
        raise ValueError(f"optimizer: {kind!r}, expected 'adamw', 'adamw8' or 'muon'")
    _tell_places(model)
    matrices, tables, gains = [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            gains.append(weight)
        elif kind == "muon" and by_muon(name, weight):
            matrices.append(weight)
        else:
            tables.append(weight)
    rate = lr if kind != "muon" or adamw_lr is None else adamw_lr
    groups = [{"params": tables}, {"params": gains, "weight_decay": 0.0}]
    options = {"lr": rate, "betas": betas, "weight_decay": weight_decay}
    if kind == "adamw8":
        optimizers = make(AdamW8, groups, **options, seed=seed)
    else:
        optimizers = make(torch.optim.AdamW, groups, **options, fused=True)
    if matrices:
        optimizers += make(Muon, [{"params": matrices}], lr=lr, weight_decay=weight_decay)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _tell_places(model: nn.Module) -> None:
    """Each weight gets its `place`: its name, and the first expert of its share; see `AdamW8`."""
    first = {W: module.held.start for module in model.modules()
             if isinstance(module, MixtureOfExperts) for W in module.parameters(recurse=False)}
    for name, W in model.named_parameters():
        W.place = name, first.get(W, 0)


def set_rate(optimizers: list[Optimizer], share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def keeper(optimizer: Optimizer) -> Optimizer:
    """Who has the moments: of an optimiser that processes share, this one's part of it.

    torch's ZeroRedundancyOptimizer calls that part `optim`.
    """
    return getattr(optimizer, "optim", optimizer)


def moments(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """What the optimisers of this process remember, as moment.NAME.KEY, NAME being the weight's."""
    return {f"moment.{W.place[0]}.{key}": t for optimizer in map(keeper, optimizers)
            for W, values in optimizer.state.items() for key, t in values.items()}


def check_moments(
    path: str | Path, found: dict[str, Tensor], optimizers: list[Optimizer]
) -> list[tuple[Optimizer, Tensor, dict[str, Tensor]]]:
    """What is to be put into each optimiser's state, by weight.

    ValueError if something is missing, too much, or of another size than the weight asks for.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, t in found.items():
        name, _, key = full.removeprefix("moment.").rpartition(".")
        by_name.setdefault(name, {})[key] = t
    result = []
    for optimizer in map(keeper, optimizers):
        weights = {W.place[0]: W for group in optimizer.param_groups for W in group["params"]
                   if W.requires_grad}
        mine = {name: by_name.pop(name, {}) for name in weights}
        keys = sorted(set().union(*mine.values()))
        for name, values in mine.items():
            shape = weights[name].shape
            for key in keys:
                if key not in values:
                    raise ValueError(f"moment.{name}.{key}: missing from {path}")
                t = values[key]
                if t.ndim and t.shape != shape and len(t) != blocks_of(shape):
                    raise ValueError(f"moment.{name}.{key}: shape {tuple(t.shape)} in {path}, "
                                     f"expected one for {tuple(shape)}")
            if keys:
                result.append((optimizer, weights[name], values))
    for name, values in by_name.items():
        raise ValueError(f"moment.{name}.{next(iter(values))}: not expected in {path}")
    return result


def put_moments(checked: list[tuple[Optimizer, Tensor, dict[str, Tensor]]]) -> None:
    """Put what `check_moments` has passed into the optimisers, in the dtypes that it has."""
    for optimizer, W, values in checked:
        optimizer.state[W] = {
            key: t.clone() if key == "step" else t.to(W.device, copy=True)
            for key, t in values.items()}

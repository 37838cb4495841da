# SPDX-License-Identifier: MIT
"""AdamW with moments of one byte each, as an optimiser of torch: `kernels/eight_bit_moments.py`
says what is computed and why.

An update does not depend on who makes it: a run that is resumed goes on with the same bits, and so
does one whose parameters are spread over several processes. On a CUDA device it is one kernel,
which reads a weight, its gradient and its moments once; elsewhere its twin in plain torch.

Gradients are all there when `step` is called, so that they can be clipped by their common norm: the
factor is an argument, and multiplied in as a gradient is read. It is not rounded to bf16 then, as
gradients would be that are scaled where they lie.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsv2_ref.forms import kernels_serve
from dsv2_ref.kernels.eight_bit_moments import new_moments, rounding_key, update_in_pieces


class AdamW8(torch.optim.Optimizer):
    """AdamW with 8-bit moments; bf16 parameters are rounded stochastically, from `seed`.

    A parameter's attribute `place`, if there is one, is its name in the whole model and the first
    expert of its share: (str, int).
    """

    def __init__(
        self, params: Iterable[Tensor] | list[dict], lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      seed=seed))

    def load_state_dict(self, state_dict: dict) -> None:
        """As saved: torch would cast codes and scales to the weights' dtype."""
        super().load_state_dict(state_dict)
        weights = [W for group in self.param_groups for W in group["params"]]
        for i, saved in state_dict["state"].items():
            device = weights[int(i)].device
            self.state[weights[int(i)]] = {
                name: t.clone() if name == "step" else t.to(device, copy=True)
                for name, t in saved.items()}

    @torch.no_grad()
    def step(self, *, clip: Tensor | None = None) -> None:
        """With gradients `clip` () times as large; nothing waits for that number."""
        for i, group in enumerate(self.param_groups):
            for j, W in enumerate(group["params"]):
                if W.grad is None:
                    continue
                state = self.state[W]
                if not state:
                    state |= {"step": torch.zeros((), dtype=torch.int64)} | new_moments(W)
                state["step"] += 1
                t = int(state["step"])                                   # on the host
                name, first = getattr(W, "place", (f"{i} {j}", 0))
                update_form(W)(W, W.grad, state, t, group["lr"], group["betas"], group["eps"],
                               group["weight_decay"], rounding_key(group["seed"], t, name), first,
                               clip)


def update_form(W: Tensor) -> Callable[..., None]:
    """Who updates a weight: the kernel or its twin."""
    if kernels_serve(W):
        from dsv2_ref.kernels.adamw8_update import update_fused

        return update_fused
    return update_in_pieces

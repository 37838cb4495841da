# SPDX-License-Identifier: MIT
"""AdamW whose two moments take two bytes a weight, for weights that may themselves be bf16.

A 15.7B model in one 141 GB card: bf16 weights 31 GB and bf16 gradients 31 GB leave no room for
moments in fp32 (126 GB). Here they take 32 GB. Three things have to be right.

  1. Codes are logarithmic, relative to the largest of a block of 256 weights: 255 of them over
     seven decades for the second moment, 127 and a sign over five for the first. Linear codes would
     round small entries to 0: without a first moment a weight stands still, without a second one
     the update m / sqrt(v) explodes. Below its range a second moment is taken for larger than it
     is: a gradient 3.5 decades below the largest of its block moves its weight less than AdamW's.
  2. A code must be able to forget. Each step takes 10 % from the first moment and 5 % from the
     second, 1.2 and 0.8 codes wherever it stands, so that rounding to nearest moves it. A linear
     code k would stick below 5 and 10: 0.95·10 rounds back to 10.
  3. bf16 weights have 8 bits of significand: an update below 0.2 to 0.4 % of a weight rounds to
     nothing, and training stands still while its loss looks almost right. Rounded *stochastically*,
     up with the probability of how far it is on the way, each update counts on average. The random
     bits come from (seed, step) alone, so a run that is resumed draws the same ones.

What is computed is AdamW as torch has it, decoupled decay and bias correction included; a test
compares the two. Parameters are taken in pieces, so that the fp32 temporaries stay small. Gradients
are all there when `step` is called: clipping by their common norm stays what it says it is.

This is ours: the paper trains with AdamW(0.9, 0.95) and says nothing of its precision.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 256                            # weights that share a scale
PIECE = 1 << 24                        # weights that are updated at a time, a multiple of BLOCK
M_CODES, M_DECADES = 127, 5
V_CODES, V_DECADES = 255, 7


def encode(x: Tensor, n_codes: int, decades: float) -> tuple[Tensor, Tensor]:
    """x (blocks, BLOCK) fp32 -> codes, of the numbers' signs, and their largest sizes (blocks, 1).

    int16 codes from -n_codes to n_codes: 0 for 0, n_codes for the largest, 1 for all below range.
    """
    step = math.log(10.0) * decades / (n_codes - 1)
    largest = x.abs().amax(1, keepdim=True)
    codes = n_codes + (x.abs() / largest.clamp(min=1e-38)).log() / step     # -inf for 0
    return (codes.round().clamp(1, n_codes) * x.sign()).to(torch.int16), largest


def decode(codes: Tensor, largest: Tensor, n_codes: int, decades: float) -> Tensor:
    """What `encode` took, within half a step of its logarithm."""
    step, codes = math.log(10.0) * decades / (n_codes - 1), codes.float()
    return codes.sign() * largest * ((codes.abs() - n_codes) * step).exp()


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, to one of the two neighbours, so that the mean over draws is x."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device,
                          generator=generator)
    bits = x.view(torch.int32) + noise           # a carry into the upper half rounds away from 0
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class AdamW8(torch.optim.Optimizer):
    """AdamW with 8-bit moments; bf16 parameters are rounded stochastically, from `seed`."""

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
    def step(self) -> None:
        for i, group in enumerate(self.param_groups):
            for j, W in enumerate(group["params"]):
                if W.grad is None:
                    continue
                state = self.state[W]
                if not state:
                    self._start(W)
                state["step"] += 1
                draw = torch.Generator(W.device)
                draw.manual_seed(hash((group["seed"], int(state["step"]), i, j)) % 2**63)
                self._update(W, state, group, draw)

    def _start(self, W: Tensor) -> None:
        blocks, device = -(-W.numel() // BLOCK), W.device
        self.state[W].update(
            step=torch.zeros((), dtype=torch.int64),
            m=torch.zeros(blocks, BLOCK, dtype=torch.int8, device=device),
            v=torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
            m_largest=torch.zeros(blocks, 1, device=device),
            v_largest=torch.zeros(blocks, 1, device=device),
        )

    def _update(self, W: Tensor, state: dict, group: dict, draw: torch.Generator) -> None:
        flat, gradient = W.view(-1), W.grad.reshape(-1)
        (beta_1, beta_2), t = group["betas"], int(state["step"])
        for start in range(0, W.numel(), PIECE):
            piece = slice(start, min(start + PIECE, W.numel()))
            rows = slice(start // BLOCK, -(-piece.stop // BLOCK))
            n = piece.stop - start
            g = torch.zeros(rows.stop - rows.start, BLOCK, device=W.device)  # a rest is zeros
            g.view(-1)[:n] = gradient[piece]
            m = decode(state["m"][rows], state["m_largest"][rows], M_CODES, M_DECADES)
            m.lerp_(g, 1 - beta_1)
            v = decode(state["v"][rows], state["v_largest"][rows], V_CODES, V_DECADES)
            v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
            state["m"][rows], state["m_largest"][rows] = encode(m, M_CODES, M_DECADES)
            state["v"][rows], state["v_largest"][rows] = encode(v, V_CODES, V_DECADES)
            v.div_(1 - beta_2**t).sqrt_().add_(group["eps"])
            w = flat[piece].float()
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(m.view(-1)[:n], v.view(-1)[:n], value=-group["lr"] / (1 - beta_1**t))
            flat[piece] = round_stochastically(w, draw) if W.dtype == torch.bfloat16 else w

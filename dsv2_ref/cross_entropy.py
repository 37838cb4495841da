# SPDX-License-Identifier: MIT
"""Cross entropy of a linear head without ever holding all logits.

The logits of one step are by far its largest tensor: 32K tokens times 102,400 words are 13.4 GB in
fp32, and a plain loss keeps them, their log-softmax and the gradient of both. But the gradient of
cross entropy is known in closed form, softmax - onehot, so a chunk of tokens can be taken from
hidden state to gradient in one go, in the forward pass, and forgotten: what is kept for the
backward pass has the size of the hidden states and of the head. On a CPU it is also faster, since
a chunk stays in the cache.

Shapes: N tokens, d width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100          # targets of this value do not count
CHUNK_LOGITS = 2**20    # logits held at a time: what a CPU's cache holds
GPU_CHUNK_LOGITS = 2**28                     # what keeps a GPU busy: 1 GiB in fp32


def chunk_rows(device: torch.device, vocab: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, (GPU_CHUNK_LOGITS if device.type == "cuda" else CHUNK_LOGITS) // vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, h: Tensor, W: Tensor, targets: Tensor, dtype: torch.dtype, need: bool
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        n = (targets != IGNORED).sum().clamp(min=1)
        grad_h = torch.zeros_like(h) if need else None
        grad_W = torch.zeros_like(W, dtype=exact) if need else None
        total = torch.zeros((), dtype=exact, device=h.device)
        W_low, rows = W.to(dtype), chunk_rows(h.device, len(W))
        for h_chunk, t, place in zip(
            h.split(rows), targets.split(rows), torch.arange(len(h)).split(rows), strict=True
        ):
            h_low = h_chunk.to(dtype)
            log_p = F.log_softmax(F.linear(h_low, W_low).to(exact), -1)          # (rows, V)
            total += F.nll_loss(log_p, t, ignore_index=IGNORED, reduction="sum")
            if need:
                grad = log_p.exp_()                                              # softmax - onehot
                counted = (t != IGNORED).to(exact)[:, None]
                grad.scatter_add_(1, t.clamp(min=0)[:, None], -torch.ones_like(counted))
                grad = grad.mul_(counted / n).to(dtype)
                grad_h[place[0] : place[-1] + 1] = grad @ W_low
                if dtype == exact:
                    torch.addmm(grad_W, grad.mT, h_low, out=grad_W)      # no second one of its size
                else:
                    grad_W += grad.mT @ h_low
                del grad
            del log_p            # or they would be there beside the next chunk's: 1.6 GB of Lite's
        ctx.save_for_backward(grad_h, grad_W)
        ctx.W_dtype = W.dtype
        return total / n

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():          # create_graph: what was made forward has no graph
            raise ValueError("cross entropy: asked for a second derivative, expected first ones "
                             "alone (`cross_entropy` of all logits has both)")
        grad_h, grad_W = ctx.saved_tensors
        return grad_h * upstream.to(grad_h.dtype), (grad_W * upstream).to(ctx.W_dtype), *[None] * 3


def linear_cross_entropy(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(h Wᵀ)[target] over the targets that count.

    h (N, d), W (V, d), targets (N,) -> scalar in at least fp32. Obeys autocast: the matmuls run in
    its dtype, the softmax in at least fp32.
    """
    dtype = h.dtype
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    need = torch.is_grad_enabled() and (h.requires_grad or W.requires_grad)
    with torch.autocast(h.device.type, enabled=False):
        return _LinearCrossEntropy.apply(h, W, targets, dtype, need)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits (N, V), all at once: for a head that is more than a matrix."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.to(exact), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def linear_log_probs(h: Tensor, head: torch.nn.Module, targets: Tensor) -> Tensor:
    """log softmax(head(h))[target] of each token, a chunk of tokens at a time.

    h (N, d), targets (N,) ids -> (N,) in at least fp32. With gradient the logits of a chunk are
    made again in the backward pass.
    """

    def of_chunk(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log_p.gather(-1, t[:, None])[:, 0]

    rows = chunk_rows(h.device, head.weight.shape[0])
    return torch.cat([
        checkpoint(of_chunk, *chunk, use_reentrant=False) if torch.is_grad_enabled()
        else of_chunk(*chunk) for chunk in zip(h.split(rows), targets.split(rows), strict=True)])


@torch.no_grad()
def linear_scores(h: Tensor, head: torch.nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_log_probs`, and whether the target is the most likely one, (N,) bool. No gradient.

    Of several that are equally likely the first is the most likely one.
    """
    found = []
    rows = chunk_rows(h.device, head.weight.shape[0])
    for h_chunk, t in zip(h.split(rows), targets.split(rows), strict=True):
        logits = head(h_chunk)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append((log_p.gather(-1, t[:, None])[:, 0], log_p.argmax(-1) == t))
    log_ps, largest = zip(*found, strict=True)
    return torch.cat(log_ps), torch.cat(largest)

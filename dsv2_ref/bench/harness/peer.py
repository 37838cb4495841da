# SPDX-License-Identifier: MIT
"""The peer of the speed comparisons: transformers, with each of its backends, on our weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import checkpoint, cost
from dsv2_ref.bench.harness.timing import Step, agree
from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2

MODEL = Config(
    vocab=4096, d=512, n_layers=4, n_h=16, d_h=64, d_r=32, d_v=64, d_c=256, d_cq=384,
    dense_width=1408, n_shared=2, n_routed=16, top_k=4, expert_width=256, n_devices=4,
    max_devices=2, routed_scaling_factor=2.0, max_positions=16384, init_std=0.05,
)
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def sizes(config: Config) -> dict[str, int | None]:
    """The sizes that matter for the time."""
    names = "d n_layers n_h d_h d_r d_v d_c d_cq n_routed top_k expert_width vocab"
    return {name: getattr(config, name) for name in names.split()}


def both(transformers: Any, config: Config, folder: Path) -> tuple[DeepSeekV2, Any]:
    """One random model, written once and read by both."""
    torch.manual_seed(0)
    checkpoint.save(DeepSeekV2(config), folder)
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return checkpoint.load(folder), theirs.eval()


def use(theirs: Any, attention: str, experts: str) -> None:
    theirs.set_attn_implementation(attention)
    theirs.set_experts_implementation(experts)


def agreement(
    ours: DeepSeekV2, theirs: Any, shape: tuple[int, int]
) -> tuple[float, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """How far losses and gradient norms are apart, and the two losses; RuntimeError if too far."""
    device, vocab = ours.embedding.weight.device, ours.config.vocab
    tokens = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), 1)
    losses = (lambda: ours.losses(tokens, targets).total,
              lambda: theirs(tokens, labels=tokens, use_cache=False).loss)   # shifts them itself
    values, norms = [], []
    for model, loss in zip((ours, theirs), losses, strict=True):
        model.train()
        value = loss()
        value.backward()
        values.append(value.detach())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        model.zero_grad()
    return max(agree(*values, "training loss"), agree(*norms, "gradient norm")), losses


def add_mfu(record: dict[str, Any], config: Config, flops: float) -> None:
    """Both sides' share of `flops` per second, from tokens per second in sequences of `length`."""
    work = cost.causal_training_flops(config, record["length"]) / flops
    for side in ("ours", "theirs"):
        rate = record[f"{side}_tokens_per_s"]
        record[f"{side}_mfu"] = rate and work * rate


def update(
    model: torch.nn.Module, losses: list[Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer | None,
) -> Step:
    """One step on the mean of `losses`, one backward pass each."""

    def step() -> None:
        for loss in losses:
            (loss() / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def peer(bench: str) -> Any:
    """transformers, or an ImportError that says what to install for the bench of that name."""
    try:
        import transformers
        from transformers import DeepseekV2ForCausalLM  # noqa: F401  (older ones lack it)
    except ImportError:
        raise ImportError(f"bench {bench} compares with transformers 5.15 or later: "
                          "pip install -e '.[test]'") from None
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars or advice on stderr while transformers loads."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

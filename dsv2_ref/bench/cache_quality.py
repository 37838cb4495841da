# SPDX-License-Identifier: MIT
"""What a quantised latent cache costs in quality, by scheme, on a trained model.

The model reads held-out text through a cache whose rows are quantised as they come in, so every
token attends to stored rows, itself included. Against the same model with an exact cache, on the
same tokens:

  kl      mean over tokens of KL(exact || quantised) of the next token's distribution, in nats
  change  of the bits per byte of the text, in per cent of the exact ones

The text comes in windows of four times the length that the model was trained on, each result by
quarters of the window. Only the first quarter is text as the model knows it: behind it the model
itself gets worse, and anything that disturbs it weighs more. `spread` is the standard deviation of
the mean KL over seeds, each of which reads other text.

`default` is SixBitCache as it is. Every other scheme quantises with scales of its own and keeps
plain numbers; `bits` is what it would take for a number of V2's row of 512 + 64, codes, scales and
zeros counted. `even_pairs` and `rotated` are the default on a model whose weights were changed
first (attention/latent_basis.py). FP8 is the yardstick: what people use without much thought.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.latent_basis import even_pairs, hadamard, rotate_latent
from dsv2_ref.checkout import in_checkout
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched
from dsv2_ref.text.corpora import Document, open_corpus
from dsv2_ref.text.data import encode
from dsv2_ref.text.tokenizer import TextTokenizer, load_tokenizer
from dsv2_ref.training.machine import machine

Quantiser = Callable[[Tensor], Tensor]      # rows (..., n) -> what is read back
TRAINED, TIMES = 256, 4                     # tokens of a training window; windows here are longer


def exact(x: Tensor) -> Tensor:
    return x


def symmetric(bits: int, group: int | None = None) -> Quantiser:
    """Integers times a bf16 scale for every `group` numbers, None for one per row."""

    def quantise(x: Tensor) -> Tensor:
        y, half = x.unflatten(-1, (-1, min(group or x.shape[-1], x.shape[-1]))), 2 ** (bits - 1)
        scale = (y.abs().amax(-1, keepdim=True) / (half - 0.5)).bfloat16().float().clamp(min=1e-30)
        return ((y / scale).round().clamp(-half, half - 1) * scale).flatten(-2)

    return quantise


def with_zero(bits: int, group: int) -> Quantiser:
    """Codes from the smallest to the largest number: an fp16 scale and an int8 zero a group."""

    def quantise(x: Tensor) -> Tensor:
        y, top = x.unflatten(-1, (-1, min(group, x.shape[-1]))), 2**bits - 1
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale = ((high - low) / top).half().float().clamp(min=1e-7)
        zero = (-low / scale).round().clamp(-128, 127)
        return ((((y / scale).round() + zero).clamp(0, top) - zero) * scale).flatten(-2)

    return quantise


def fp8(x: Tensor) -> Tensor:
    """e4m3 with a scale per row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Scheme(NamedTuple):
    latent: Quantiser
    rope: Quantiser
    bits: float              # a number of V2's row, everything counted


def _row(latent_bits: float, rope_bits: float, scale_bits: int = 0) -> float:
    return (512 * latent_bits + 64 * rope_bits + scale_bits) / 576


SCHEMES = {
    "int4 g32 zero, RoPE 16": Scheme(with_zero(4, 32), exact, _row(4.75, 16)),
    "int5 g64, RoPE 16": Scheme(symmetric(5, 64), exact, _row(5.25, 16)),
    "int6 g64, RoPE 16": Scheme(symmetric(6, 64), exact, _row(6.25, 16)),
    "int5, RoPE int8": Scheme(symmetric(5), symmetric(8), _row(5, 8, 32)),
    "int6, RoPE int6": Scheme(symmetric(6), symmetric(6), _row(6, 6, 32)),
    "int6, RoPE int6 a scale a pair": Scheme(symmetric(6), symmetric(6, 2), _row(6, 14, 16)),
    "int6, RoPE int8": Scheme(symmetric(6), symmetric(8), _row(6, 8, 32)),
    "int6, RoPE exact": Scheme(symmetric(6), exact, _row(6, 16, 16)),
    "latent exact, RoPE int6": Scheme(exact, symmetric(6), _row(16, 6, 16)),
    "fp8, RoPE fp8": Scheme(fp8, fp8, _row(8, 8, 64)),
    "fp8, RoPE 16": Scheme(fp8, exact, _row(8, 16, 32)),
}


class SchemeCache(LatentCache):
    """A LatentCache that keeps what a scheme makes of each row."""

    def __init__(self, scheme: Scheme, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.scheme = scheme

    def write(self, layer: int, c_kv: Tensor, k_r: Tensor) -> None:
        super().write(layer, self.scheme.latent(c_kv), self.scheme.rope(k_r))


@torch.no_grad()
def changed(model: DeepSeekV2, change: str) -> DeepSeekV2:
    """The same function with other weights: its cache is 'even_pairs' or 'rotated', or both."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        a = block.attention
        if "rotated" in change:
            weights = (a.W_DKV.weight, a.norm_kv.weight, a.W_UK.weight, a.W_UV.weight)
            for old, new in zip(weights, rotate_latent(hadamard(model.config.d_c), *weights)):
                old.copy_(new)
        if "even_pairs" in change:
            weights = (a.W_KR.weight, a.W_QR.weight)
            for old, new in zip(weights, even_pairs(*weights, block.norm_attention.weight)):
                old.copy_(new)
    return model


@torch.no_grad()
def log_probabilities(model: DeepSeekV2, window: Tensor, scheme: Scheme | str = "exact") -> Tensor:
    """Next-token log probabilities (T, vocab) of one window (T,), read through a cache."""
    c = model.config
    if isinstance(scheme, Scheme):
        cache = SchemeCache(scheme, c.n_layers, 1, len(window), c.d_c, c.d_r)
    else:
        cache = model.new_cache(1, len(window), "latent" if scheme == "exact" else "six_bit")
    return model(window[None], cache)[0].log_softmax(-1)


def windows(
    documents: list[Document], tokenizer: TextTokenizer, seed: int, n: int, length: int
) -> Tensor:
    """(n, length + 1) tokens of whole documents in an order drawn from `seed`."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = torch.from_numpy(encode([documents[i] for i in order], tokenizer).astype("int64"))
    if len(tokens) <= n * length:
        raise ValueError(f"text: {len(tokens)} held-out tokens, expected above {n * length}")
    return tokens[: n * length + 1].unfold(0, length + 1, length)


def compare(
    model: DeepSeekV2, scheme: Scheme | str, rows: Tensor, references: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """KL and the rise of the loss at every token, (n, T) each, in nats."""
    kl, rise = [], []
    for row, reference in zip(rows, references):
        got, target = log_probabilities(model, row[:-1], scheme), row[1:, None]
        kl.append((reference.exp() * (reference - got)).sum(-1))
        rise.append((reference - got).gather(-1, target)[:, 0])
    return torch.stack(kl), torch.stack(rise)


def measure(
    model: DeepSeekV2, tokenizer: TextTokenizer, documents: list[Document], seeds: int, n: int,
    trained: int = TRAINED,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The exact model's own figures, and those of every scheme."""
    length = min(TIMES * trained, model.config.max_positions)
    texts = [windows(documents, tokenizer, seed, n, length) for seed in range(seeds)]
    references = [[log_probabilities(model, row[:-1]) for row in rows] for rows in texts]
    loss = torch.stack([-reference.gather(-1, row[1:, None])[:, 0]
                        for rows, parts in zip(texts, references)
                        for row, reference in zip(rows, parts)])               # (seeds·n, T)
    quarters, n_bytes = loss.split(trained, 1), [
        sum(len(tokenizer.decode(part).encode()) for part in parts)
        for parts in zip(*[row[1:].split(trained) for rows in texts for row in rows])]
    of_model = {"seeds": seeds, "windows_a_seed": n, "tokens_a_window": length,
                "bits_per_byte_by_quarter": [
                    q.sum().item() / math.log(2) / b for q, b in zip(quarters, n_bytes)]}
    runs = {"default": ("six_bit", model)} | {
        f"default, {change}": ("six_bit", changed(model, change))
        for change in ("even_pairs", "rotated", "rotated even_pairs")}
    runs |= {name: (scheme, model) for name, scheme in SCHEMES.items()}
    results = {}
    for name, (scheme, its_model) in runs.items():
        parts = [compare(its_model, scheme, *text) for text in zip(texts, references)]
        kl, rise = (torch.cat(x) for x in zip(*parts))
        means = torch.stack([x.mean() for x, _ in parts])
        per_token = SixBitCache(1, 1, 1, 512, 64).nbytes_per_token
        results[name] = {
            "bits": 8 * per_token / 576 if scheme == "six_bit" else scheme.bits,
            "kl": kl.mean().item(), "spread": means.std(correction=0).item(),
            "kl_by_quarter": [q.mean().item() for q in kl.split(trained, 1)],
            "change_percent": 100 * (rise.sum() / loss.sum()).item(),
            "change_percent_first_quarter": 100 * (
                rise[:, :trained].sum() / quarters[0].sum()).item(),
        }
    return of_model, results


def run(
    quick: bool = False, model: str | Path | None = None, corpus: str = "stories",
    yarn: bool = True,
) -> dict[str, Any]:
    """One JSON-able record, of data/model by default; with `quick` the figures mean nothing.

    `yarn`: the model is stretched to the length it is read at, without further training.
    """
    model = model or in_checkout("data/model")
    loaded = checkpoint.load(model, dtype=torch.float32)
    if yarn:
        # beyond its trained length a model with plain RoPE fails by itself, and any small change
        # of its cache counts for more
        loaded = stretched(loaded, TIMES, TRAINED)
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    documents = open_corpus(corpus).test
    of_model, schemes = measure(loaded, tokenizer, documents, *((2, 1) if quick else (4, 10)))
    c = loaded.config
    return {
        "name": "cache_quality", "quick": quick, **machine(), "dtype": "float32", "corpus": corpus,
        "model": {key: getattr(c, key) for key in "d n_layers n_h d_h d_r d_v d_c vocab".split()},
        "trained_on_tokens_a_window": TRAINED, "yarn_factor": c.yarn_factor,
        "exact": of_model, "schemes": schemes,
    }

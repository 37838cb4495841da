# SPDX-License-Identifier: MIT
"""What a length costs: a small model reads 128K tokens on a CPU, finds needles, and decodes.

The text is read in pieces, once. At each power of two on the way:

  seconds       since the beginning, of reading alone; `counted` are the multiply-adds of the same
                passes: a constant part per token, and a part that grows with the square of the
                length, since each piece meets every row that is cached
  cache_bytes   allocated by a cache that is made for this length; `peak_bytes` of the whole process
  decode_ms     of one token behind that many cached ones, absorbed attention, the fastest of 100

`decode_slope_ns` is the straight line through decode_ms: nanoseconds per cached token. In each
layer a step reads c_kv of every cached token twice, as key and as value, and k_r once:
`read_bytes_per_token`. `slope_gb_per_s` is what that makes of the slope, beside the
`read_gb_per_s` of a plain sum on this machine.

`needles` are cells at the full length at three depths, each read on from a fork of the cache at its
place, and the minutes of each; `minutes` are those of everything together.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.attention.kv_cache import Cache
from dsv2_ref.bench.harness.timing import times
from dsv2_ref.checkout import in_checkout
from dsv2_ref.config import Config
from dsv2_ref.inference import needle
from dsv2_ref.inference.generate import PIECE, step
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched, trained_positions
from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.needles import haystack
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import machine

LONGEST, DEPTHS = 128 * 1024, (0, 50, 100)


def counted(c: Config, length: int, piece: int = PIECE) -> int:
    """Multiply-adds of reading `length` tokens in pieces through expanded attention, head left out.
    """
    per_token = c.n_layers * (
        c.d * (c.d_cq or 0) + (c.d_cq or c.d) * c.n_h * (c.d_h + c.d_r)      # queries
        + c.d * (c.d_c + c.d_r) + c.n_h * c.d_v * c.d)                       # latents, output
    per_token += c.n_dense * 3 * c.d * c.dense_width
    routed = 3 * c.d * c.expert_width * (c.n_shared + c.top_k) + c.d * c.n_routed
    per_token += (c.n_layers - c.n_dense) * routed
    attention = 0
    for begin in range(0, length, piece):
        T = min(piece, length - begin)
        S = begin + T
        attention += S * c.d_c * c.n_h * (c.d_h + c.d_v)                     # keys, values
        attention += T * S * c.n_h * (c.d_h + c.d_r + c.d_v)
    return length * per_token + c.n_layers * attention


def peak_bytes() -> int:
    """Of the whole process so far; on Linux, which counts in KiB."""
    import resource  # which other systems lack

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_through(
    model: DeepSeekV2, text: list[int], todo: list[needle.Plan], steps: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read all of the text once. What each power of two costs, and the cells on the way."""
    cache, rows = model.new_cache(1, len(text) + 1), torch.tensor([text])
    marks = [n for n in (2**i for i in range(8, 31)) if n <= len(text)]
    begin, seconds, points, cells = 0, 0.0, [], []
    for stop in sorted({*marks, *(plan.at for plan in todo)}):
        started = time.perf_counter()
        needle.read_pieces(model, rows[:, begin:stop], cache)
        seconds, begin = seconds + time.perf_counter() - started, stop
        if stop in marks:
            points.append({
                "tokens": stop, "seconds": seconds, "counted": counted(model.config, stop),
                "cache_bytes": model.new_cache(1, stop).nbytes, "peak_bytes": peak_bytes(),
                "decode_ms": 1e3 * min(_decode(model, rows[:, 0], cache, steps))})
        for plan in todo:
            if plan.at == stop:
                started = time.perf_counter()
                cells.append(needle.score(model, plan, text, cache)
                             | {"minutes": (time.perf_counter() - started) / 60})
    return points, cells


@torch.inference_mode()
def _decode(model: DeepSeekV2, ids: Tensor, cache: Cache, n: int) -> list[float]:
    """Seconds of a step, n times; the cache is as it was."""
    read, seconds = cache.lengths, []
    for _ in range(n):
        seconds += times(lambda: step(model, ids, cache, [1]), 1)
        cache.lengths = read
    return seconds


def slope(points: list[dict[str, Any]]) -> float:
    """Nanoseconds per cached token: least squares of decode_ms over the lengths."""
    n = torch.tensor([p["tokens"] for p in points]).double()
    ms = torch.tensor([p["decode_ms"] for p in points]).double()
    n = n - n.mean()
    return 1e6 * ((n * ms).sum() / (n * n).sum()).item()


def read_rate() -> float:
    """GB/s of a sum of 256 MB."""
    numbers = torch.ones(1 << 26)
    return numbers.nbytes / min(times(numbers.sum, 5)) / 1e9


def run(quick: bool = False, model: str | Path | None = None) -> dict[str, Any]:
    """One JSON-able record, of data/needle by default; half an hour of two cores."""
    folder = Path(model or in_checkout("data/needle"))
    loaded, tokenizer = checkpoint.load(folder, torch.float32), load_tokenizer(
        folder / "tokenizer.json")
    trained = trained_positions(loaded.config)
    longest = 2048 if quick else LONGEST
    loaded = stretched(loaded, (longest + 1) / trained)
    text = haystack(open_corpus("stories").test, tokenizer, longest)
    began, grid = time.perf_counter(), needle.Grid((longest,), DEPTHS, samples=1)
    points, cells = read_through(loaded, text, needle.plans(grid, tokenizer, longest),
                                 2 if quick else 100)
    cache, c = loaded.new_cache(1, 1), loaded.config
    read = len(loaded.blocks) * (2 * c.d_c + c.d_r) * loaded.like.itemsize
    return {"name": "long_context", "quick": quick, **machine(),
            "model": str(model or "data/needle"), "trained_at": trained,
            "yarn_factor": loaded.config.yarn_factor, "piece": PIECE,
            "points": points, "cache_bytes_per_token": cache.nbytes_per_token,
            "read_bytes_per_token": read, "decode_slope_ns": slope(points),
            "slope_gb_per_s": read / slope(points), "read_gb_per_s": read_rate(),
            "needles": cells, "minutes": (time.perf_counter() - began) / 60}

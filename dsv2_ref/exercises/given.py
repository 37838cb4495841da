# SPDX-License-Identifier: MIT
"""What is given to the parts that notebook 30 builds, when they are checked."""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.config import TINY
from dsv2_ref.exercises import parts
from dsv2_ref.files.published import published_entries
from dsv2_ref.model import DeepSeekV2

# small, and no two sizes equal: a wrong axis is seen; a factor as V2's, not the 1 of data/model
C = TINY.with_(vocab=23, d=12, n_layers=3, n_h=3, d_h=6, d_r=8, d_v=7, d_c=10, d_cq=11,
               dense_width=17, expert_width=13, n_routed=8, top_k=3, n_devices=4, max_devices=2,
               routed_scaling_factor=2.5)
T, S = 5, 9


class _Multiplied(torch.overrides.TorchFunctionMode):
    """The numbers of the largest tensor that any call returns."""

    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def numbers(seed: int = 0) -> Callable[..., Tensor]:
    """A function that makes tensors of a shape, the same ones at each call."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)


@lru_cache
def weights() -> dict[str, Tensor]:
    """Random published tensors of a model of the sizes C."""
    made = numbers(1)
    with torch.random.fork_rng():                   # shapes alone are wanted of it
        entries = list(published_entries(DeepSeekV2(C)))
    return {e.name: made(*e.shape) * (e.shape[-1] ** -0.5 if len(e.shape) > 1 else 0.3)
            + (len(e.shape) == 1) for e in entries}


def layer(number: int) -> SimpleNamespace:
    return parts.layer_weights(weights(), number, C)


def turns(first: int, count: int) -> tuple[Tensor, Tensor]:
    return parts.rope_tables(torch.arange(first, first + count), C.d_r, C.rope_theta)


def stream_cases() -> list[tuple[Any, ...]]:
    """h, w, cos, sin."""
    return [(2 * numbers()(2, T, C.d), layer(1), *turns(3, T))]


def table_cases() -> list[tuple[Any, ...]]:
    return [(torch.arange(6), 8, 1e4), (torch.arange(7, 10), 12, 500.0),
            (torch.tensor([100_001, 131_071]), 8, 1e4)]


def rotate_cases() -> list[tuple[Any, ...]]:
    made = numbers()
    return [(made(2, T, C.n_h, C.d_r), *turns(2, T)), (made(2, T, 1, C.d_r).float(), *turns(2, T))]


def published_cases() -> list[tuple[Any, ...]]:
    names = "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"
    return [(*(weights()[f"model.layers.1.self_attn.{name}.weight"] for name in names), C)]


def feed_forward_cases() -> list[tuple[Any, ...]]:
    return [(numbers()(3, 4, C.d), *layer(0).dense)]


def attend_cases(*pairs: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    """q_c, q_r, c_kv, k_r, W_UK, W_UV for T queries and S rows each."""
    made = numbers()
    return [(made(2, t, C.n_h, C.d_h), made(2, t, C.n_h, C.d_r), made(2, s, C.d_c),
             made(2, s, C.d_r), made(C.n_h, C.d_h, C.d_c), made(C.n_h, C.d_v, C.d_c))
            for t, s in pairs]


def expanded_cases() -> list[tuple[Any, ...]]:
    return attend_cases((T, T))


def absorbed_cases() -> list[tuple[Any, ...]]:
    return attend_cases((1, S), (4, S), (T, T))


def rows(count: int = 4) -> tuple[Tensor, Tensor]:
    made = numbers(2)
    return made(2, count, C.d_c), made(2, count, C.d_r)


def attention_cases() -> list[tuple[Any, ...]]:
    h, w, *_ = stream_cases()[0]
    return [(h, w, *turns(0, T), None), (h[:, :1], w, *turns(4, 1), rows()),
            (h[:, :2], w, *turns(4, 2), rows())]


def route_cases() -> list[tuple[Any, ...]]:
    x, E = numbers()(20, C.d), numbers(3)(12, C.d) / 2
    return [(x, E, 3, 3, 2, 16.0), (x, E, 3, 4, 1, 1.0), (x, E, 2, 1, 1, 1.0)]


def mixture_cases() -> list[tuple[Any, ...]]:
    u, w = 3 * numbers()(6, C.d), layer(1)
    x = parts.norm(u, w.norm_ffn)
    return [(u, x, w, *parts.route(x, w.router, 3, 4, 2, C.routed_scaling_factor))]


def block_cases() -> list[tuple[Any, ...]]:
    h = stream_cases()[0][0]
    return [(h, layer(0), *turns(0, T), C, None), (h, layer(1), *turns(0, T), C, None),
            (h[:, :1], layer(2), *turns(4, 1), C, rows())]


def model_cases() -> list[tuple[Any, ...]]:
    tokens = torch.randint(C.vocab, (2, 7), generator=torch.Generator().manual_seed(4))
    w = weights()
    _, caches = parts.model(tokens[:, :4], w, C)
    return [(tokens, w, C, None), (tokens[:, 4:5], w, C, caches), (tokens[:, 4:], w, C, caches)]


class Remembering:
    """Stands for a model: its next token depends on every token that it has read and on the order.

    As caches it gives all these tokens; `fed` are the lengths that it was called with.
    """

    def __init__(self) -> None:
        self.fed: list[int] = []

    def __call__(self, tokens: Tensor, caches: Tensor | None) -> tuple[Tensor, Tensor]:
        self.fed.append(tokens.shape[1])
        read = tokens if caches is None else torch.cat((caches, tokens), 1)
        sums = (read * torch.arange(3, 3 + read.shape[1])).cumsum(1)[:, -tokens.shape[1]:]
        return torch.eye(C.vocab)[sums % C.vocab], read


def generate_cases() -> list[tuple[Any, ...]]:
    return [(Remembering(), torch.tensor([[5, 3, 8, 1], [2, 19, 7, 11]]), 6)]


def reads_each_token_once(function: Callable[..., Tensor]) -> str | None:
    """The prompt in one piece, then one token at a time."""
    remembering, tokens, n = generate_cases()[0]
    function(remembering, tokens, n)
    fed = remembering.fed
    if fed[:1] != [4] or any(count != 1 for count in fed[1:]):
        return (f"right ids, but the model was given {fed} tokens, call by call: expected the "
                "prompt's 4 at once, then 1 a call with the caches")
    return None if n - 1 <= len(fed) - 1 <= n else f"right ids, but in {len(fed)} calls"


def makes_no_keys(function: Callable[..., Tensor]) -> str | None:
    """Keys of all heads are S * n_h * d_h numbers, larger than anything that is needed."""
    made = numbers()
    n_h, d, s = 8, 16, 100
    with _Multiplied() as multiplied:
        function(made(1, 1, n_h, d), made(1, 1, n_h, 4), made(1, s, 24), made(1, s, 4),
                 made(n_h, d, 24), made(n_h, d, 24))
    if multiplied.largest >= s * n_h * d:
        return (f"right numbers, but on the way a tensor of {multiplied.largest:,} is made, as "
                "many as the keys of all heads: W_UK has to meet the query and W_UV the output, "
                "and no latent is copied for each head")
    return None

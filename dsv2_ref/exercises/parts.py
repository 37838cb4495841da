# SPDX-License-Identifier: MIT
"""The parts that notebook 30 builds: the right ones, and each with mistakes that are often made.

`wrong` names the mistake; without one a part is right, which a test compares with the package.

Shapes: B sequences, T new tokens, S = cached + new tokens, N flat tokens, n_h heads.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = tuple[Tensor, Tensor]


def norm(x: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def rope_tables(positions: Tensor, d_r: int, theta: float, wrong: str = "") -> Rows:
    """positions (T,) -> cos and sin (T, d_r/2) in fp64."""
    dtype = torch.float32 if wrong == "fp32" else torch.float64
    exponent = torch.arange(0, d_r, 2, dtype=dtype) / d_r
    exponent = exponent * {"up": -1.0, "half": 0.5, "twice": 2.0, "none": 0.0}.get(wrong, 1.0)
    if wrong == "from 0":
        positions = torch.arange(len(positions))
    angles = (positions + (wrong == "from 1"))[:, None].to(dtype) * theta**-exponent
    cos, sin = angles.cos(), angles.sin()
    if wrong == "wide":
        return cos.repeat(1, 2), sin.repeat(1, 2)
    if wrong == "interleaved":
        return cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)
    return (sin, cos) if wrong == "swapped" else (cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, wrong: str = "") -> Tensor:
    """x (B, T, n_h, d_r), cos and sin (T, d_r/2) -> as x."""
    cos, sin = (t.to(x.dtype)[:, None] for t in (cos, sin))
    if wrong == "back":
        sin = -sin
    if wrong == "not":
        return x
    a, b = x.chunk(2, -1) if wrong.startswith("halves") else (x[..., ::2], x[..., 1::2])
    if wrong == "cos":
        turned = a * cos, b * cos
    elif wrong == "sign":
        turned = a * cos + b * sin, a * sin + b * cos
    else:
        turned = a * cos - b * sin, a * sin + b * cos
    if wrong in ("halves", "apart"):
        return torch.cat(turned, -1)
    return torch.stack(turned, -1).flatten(-2)


def take_apart(q_b: Tensor, kv_a: Tensor, kv_b: Tensor, c: Any, wrong: str = "") -> tuple:
    """The published matrices -> W_UQ, W_QR, W_DKV, W_KR, W_UK, W_UV."""
    n_h, d_h, d_r, d_v, d_c = c.n_h, c.d_h, c.d_r, c.d_v, c.d_c
    if wrong == "not grouped":
        W_UQ, W_QR = q_b[: n_h * d_h], q_b[n_h * d_h:]
        W_UK, W_UV = kv_b[: n_h * d_h], kv_b[n_h * d_h:]
        W_UQ, W_QR = W_UQ.unflatten(0, (n_h, d_h)), W_QR.unflatten(0, (n_h, d_r))
        W_UK, W_UV = W_UK.unflatten(0, (n_h, d_h)), W_UV.unflatten(0, (n_h, d_v))
    else:
        grouped = (-1, n_h) if wrong == "heads last" else (n_h, -1)
        q, kv = q_b.unflatten(0, grouped), kv_b.unflatten(0, grouped)
        if wrong == "heads last":
            q, kv = q.transpose(0, 1), kv.transpose(0, 1)
        W_UQ, W_QR, W_UK, W_UV = q[:, :d_h], q[:, d_h:], kv[:, :d_h], kv[:, d_h:]
    if wrong == "position first":
        W_QR, W_UQ = q[:, :d_r], q[:, d_r:]
    if wrong == "value first":
        W_UV, W_UK = kv[:, :d_v], kv[:, d_v:]
    W_DKV, W_KR = kv_a[:d_c], kv_a[d_c:]
    if wrong == "key first":
        W_KR, W_DKV = kv_a[:d_r], kv_a[d_r:]
    if wrong == "flat":
        W_UQ, W_QR, W_UK, W_UV = (W.flatten(0, 1) for W in (W_UQ, W_QR, W_UK, W_UV))
    return W_UQ, W_QR, W_DKV, W_KR, W_UK, W_UV


def queries(h: Tensor, w: Any, cos: Tensor, sin: Tensor, wrong: str = "") -> Rows:
    """h (B, T, d) -> q_c (B, T, n_h, d_h), q_r (B, T, n_h, d_r)."""
    c_q = (norm(h) if wrong == "again" else h) @ w.W_DQ.T
    if wrong != "no norm":
        c_q = norm(c_q, 1.0 if wrong == "no gain" else w.norm_q)
    q_c = torch.einsum("btq,hdq->bthd", c_q, w.W_UQ)
    q_r = torch.einsum("btq,hdq->bthd", c_q, w.W_QR)
    if wrong == "scaled":
        scale = (q_c.shape[-1] + q_r.shape[-1]) ** -0.5
        q_c, q_r = q_c * scale, q_r * scale
    if wrong != "not turned":
        q_r = rotate(q_r, cos, sin)
    if wrong == "turned twice":
        q_r = rotate(q_r, cos, sin)
    if wrong == "heads":
        q_c, q_r = q_c.transpose(1, 2), q_r.transpose(1, 2)
    return (q_r, q_c) if wrong == "swapped" else (q_c, q_r)


def latents(h: Tensor, w: Any, cos: Tensor, sin: Tensor, wrong: str = "") -> Rows:
    """h (B, T, d) -> what is cached: c_kv (B, T, d_c), k_r (B, T, d_r)."""
    h = norm(h) if wrong == "again" else h
    c_kv, k_r = h @ w.W_DKV.T, h @ w.W_KR.T
    if wrong != "no norm":
        c_kv = norm(c_kv, 1.0 if wrong == "no gain" else w.norm_kv)
    if wrong == "key normed":
        k_r = norm(k_r)
    k_r = k_r[:, :, None]
    if wrong != "not turned":
        k_r = rotate(k_r, cos, sin)
    if wrong == "turned twice":
        k_r = rotate(k_r, cos, sin)
    k_r = k_r if wrong == "head axis" else k_r[:, :, 0]
    return (k_r, c_kv) if wrong == "swapped" else (c_kv, k_r)


def attend(q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor,
           wrong: str = "") -> Tensor:
    """Queries of the last T of S tokens, rows of all S -> o (B, T, n_h, d_v), keys expanded."""
    T, n_h, d_h = q_c.shape[1:]
    S, d_r = c_kv.shape[1], q_r.shape[-1]
    k = torch.einsum("bsc,hdc->bshd", c_kv, W_UK)
    v = torch.einsum("bsc,hvc->bshv", c_kv, W_UV)
    scores = torch.einsum("bthd,bshd->bhts", q_c, k)
    if wrong == "position alone":
        scores = scores * 0
    if wrong != "no position":
        scores = scores + torch.einsum("bthr,bsr->bhts", q_r, k_r)
    scales = {"no scale": 1.0, "head alone": d_h**-0.5, "latent": (c_kv.shape[-1] + d_r) ** -0.5,
              "no root": 1 / (d_h + d_r), "multiplied": (d_h + d_r) ** 0.5}
    scores = scores * scales.get(wrong, (d_h + d_r) ** -0.5)
    keys, mine = torch.arange(S), torch.arange(T)[:, None] + (0 if wrong == "start" else S - T)
    seen = {"self": keys < mine, "ahead": keys <= mine + 1, "future": keys >= mine,
            "no mask": keys >= 0}.get(wrong, keys <= mine)
    if wrong == "after":
        scores = scores.softmax(-1).masked_fill(~seen, 0.0)
    elif wrong == "zero":
        scores = (scores * seen).softmax(-1)
    else:
        scores = scores.masked_fill(~seen, -torch.inf)
        scores = scores.softmax({"over heads": 1, "over queries": 2}.get(wrong, 3))
    v = c_kv[:, :, None].expand(-1, -1, n_h, -1) if wrong == "latent out" else v
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    return o.transpose(1, 2) if wrong == "heads" else o


def attention(h: Tensor, w: Any, cos: Tensor, sin: Tensor, cache: Rows | None = None,
              wrong: str = "") -> tuple[Tensor, Rows]:
    """h (B, T, d), the rows of old tokens -> u (B, T, d), the rows of all."""
    new = latents(h, w, cos, sin)
    order = (new, cache) if wrong == "in front" else (cache, new)
    rows = new if cache is None else tuple(torch.cat(pair, 1) for pair in zip(*order))
    used = new if wrong in ("ignored", "alone") else rows
    used = cache if cache is not None and wrong.startswith("old") else used
    o = attend(*queries(h, w, cos, sin), *used, w.W_UK, w.W_UV)
    o = o.transpose(2, 3) if wrong == "interleaved" else o
    u = o.flatten(2) if wrong == "bare" else o.flatten(2) @ w.W_O.T
    u = h + u if wrong == "residual" else u
    return u, (new if wrong in ("new alone", "alone", "old kept") else rows)


def feed_forward(x: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
                 wrong: str = "") -> Tensor:
    """SwiGLU: x (..., d) -> (..., d)."""
    act = {"sigmoid": torch.sigmoid, "relu": F.relu, "gelu": F.gelu, "no silu": lambda t: t}
    silu = act.get(wrong, F.silu)
    gate, up = x @ W_gate.T, x @ W_up.T
    if wrong == "wrong side":
        gate, up = up, gate
    hidden = {"no gate": F.silu(up), "no up": F.silu(gate), "added": F.silu(gate) + up,
              "after": F.silu(gate * up)}.get(wrong, silu(gate) * up)
    return hidden @ W_down.T


def route(x: Tensor, centroids: Tensor, top_k: int, n_devices: int, max_devices: int,
          factor: float, wrong: str = "") -> tuple[Tensor, Tensor]:
    """x (N, d), centroids (E, d) -> experts and gates of the K slots, (N, K) each."""
    logits = x @ centroids.T
    s = {"sigmoid": logits.sigmoid(), "logits": logits,
         "over tokens": logits.softmax(0)}.get(wrong, logits.softmax(-1))
    groups = s.unflatten(-1, (n_devices, -1))
    best = {"sum": groups.sum(-1), "two": groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1),
            "worst": -groups.amax(-1)}.get(wrong, groups.amax(-1)).topk(max_devices, -1).indices
    allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    if wrong == "strided":
        allowed = allowed[:, None].expand(-1, groups.shape[-1], -1).flatten(1)
    else:
        allowed = allowed[..., None].expand_as(groups).flatten(1)
    masked = s if wrong == "greedy" else s.masked_fill(~allowed, -torch.inf)
    indices = masked.topk(top_k, -1).indices
    gates = s.gather(-1, indices)
    if wrong.startswith("renormalised"):
        gates = gates / gates.sum(-1, keepdim=True)
    factors = {"no factor": 1.0, "twice": factor**2, "renormalised alone": 1.0}
    gates = gates * factors.get(wrong, factor)
    return (gates, indices) if wrong == "swapped" else (indices, gates)


def mixture(u: Tensor, x: Tensor, w: Any, indices: Tensor, gates: Tensor,
            wrong: str = "") -> Tensor:
    """u (N, d) the stream, x its norm -> u + shared experts + gated routed experts, (N, d)."""
    x = u if wrong == "not normed" else x
    gates = {"no gates": torch.ones_like(gates), "reversed": gates.flip(-1),
             "squared": gates**2}.get(wrong, gates)
    K = {"first": 1, "last missing": gates.shape[1] - 1}.get(wrong, gates.shape[1])
    routed = sum((gates * (indices == e))[:, :K].sum(1, keepdim=True) * feed_forward(
                     u if wrong == "routed not normed" else x, *expert)
                 for e, expert in enumerate(w.experts))
    shared = feed_forward(x, *w.shared)
    shared = shared * {"no shared": 0, "shared gated": gates.sum(-1, keepdim=True)}.get(wrong, 1)
    stream = {"no stream": 0, "norm added": x, "stream twice": 2 * u}.get(wrong, u)
    return stream + shared + routed


def block(h: Tensor, w: Any, cos: Tensor, sin: Tensor, c: Any, cache: Rows | None = None,
          wrong: str = "") -> tuple[Tensor, Rows]:
    """One layer: h (B, T, d), the rows of old tokens -> h (B, T, d), the rows of all."""
    read = h if wrong == "no first norm" else norm(h, w.norm_attention, c.norm_eps)
    added, rows = attention(read, w, cos, sin, None if wrong == "cache lost" else cache)
    u = {"no residual": added, "normed stream": read + added}.get(wrong, h + added)
    gain = w.norm_attention if wrong == "one norm" else w.norm_ffn
    x = u if wrong == "no second norm" else norm(h if wrong == "parallel" else u, gain, c.norm_eps)
    if w.dense is not None:
        made = feed_forward(x, *w.dense)
        return (made if wrong == "no second residual" else u + made), rows
    indices, gates = route(x.flatten(0, 1), w.router, c.top_k, c.n_devices, c.max_devices,
                           c.routed_scaling_factor)
    made = mixture(u.flatten(0, 1), x.flatten(0, 1), w, indices, gates).unflatten(0, u.shape[:2])
    return (u + made if wrong == "twice" else made - u * (wrong == "no second residual")), rows


def layer_weights(weights: dict[str, Tensor], layer: int, c: Any) -> SimpleNamespace:
    """The published tensors of one layer under the names of the formulas."""
    start = f"model.layers.{layer}."
    t = {k.removeprefix(start).removesuffix(".weight"): v for k, v in weights.items()
         if k.startswith(start)}

    def three(name: str) -> tuple[Tensor, ...]:
        return tuple(t[f"{name}.{which}_proj"] for which in ("gate", "up", "down"))

    parts = take_apart(*(t[f"self_attn.{name}"] for name in
                         ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")), c)
    routed = "mlp.gate" in t
    return SimpleNamespace(
        **dict(zip(("W_UQ", "W_QR", "W_DKV", "W_KR", "W_UK", "W_UV"), parts)),
        W_DQ=t["self_attn.q_a_proj"], norm_q=t["self_attn.q_a_layernorm"],
        norm_kv=t["self_attn.kv_a_layernorm"], W_O=t["self_attn.o_proj"],
        norm_attention=t["input_layernorm"], norm_ffn=t["post_attention_layernorm"],
        dense=None if routed else three("mlp"), router=t["mlp.gate"] if routed else None,
        shared=three("mlp.shared_experts") if routed else None,
        experts=[three(f"mlp.experts.{e}") for e in range(c.n_routed)] if routed else None)


def model(tokens: Tensor, weights: dict[str, Tensor], c: Any, caches: list | None = None,
          wrong: str = "") -> tuple[Tensor, list]:
    """tokens (B, T), the rows of old tokens -> logits (B, T, vocab), the rows of all, by layer."""
    old = 0 if caches is None or wrong == "from 0" else caches[0][0].shape[1]
    positions = torch.arange(old, old + tokens.shape[1]) + (wrong == "from 1")
    cos, sin = rope_tables(positions, c.d_r, c.rope_theta)
    E = weights["model.embed_tokens.weight"]
    h = E[tokens] * (c.d**0.5 if wrong == "scaled" else 1)
    new = []
    layers = range(c.n_layers)
    layers = {"reversed": layers[::-1], "last missing": layers[:-1]}.get(wrong, layers)
    for i in layers:
        cache = None if caches is None else caches[0 if wrong == "one cache" else i]
        w = layer_weights(weights, 0 if wrong == "layer 0" else i, c)
        h, rows = block(h, w, cos, sin, c, cache)
        new.append(rows)
    h = h if wrong == "no norm" else norm(h, 1.0 if wrong == "no gain"
                                          else weights["model.norm.weight"], c.norm_eps)
    logits = h @ E.T
    if wrong == "softmax":
        logits = logits.softmax(-1)
    return (logits[:, -1] if wrong == "last" else logits), new


def generate(model: Any, tokens: Tensor, n: int, wrong: str = "") -> Tensor:
    """model(tokens, caches) -> (logits, caches); tokens (B, T) -> n new ids, (B, n)."""
    logits, caches = model(tokens, None)
    new = []
    for _ in range(n):
        last = {"first": 0, "before": -2}.get(wrong, -1)
        ids = logits[:, max(last, -logits.shape[1])].argmax(-1, keepdim=True)
        if wrong == "smallest":
            ids = logits[:, -1].argmin(-1, keepdim=True)
        new.append(ids)
        if wrong == "whole":
            logits, caches = model(torch.cat((tokens, *new), 1), caches)
        elif wrong == "stale":
            logits, _ = model(ids, caches)
        else:
            logits, caches = model(ids, None if wrong == "lost" else caches)
    new = new[1:] + [ids] if wrong == "one late" else new
    return torch.cat(([tokens] if wrong == "prompt" else []) + new, 1)

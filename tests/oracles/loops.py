# SPDX-License-Identifier: MIT
"""Slow oracles: the paper's equations token by token and head by head, on Python floats.

Nothing here is shared with the implementation. Vectors are lists of floats, matrices lists of
rows, `tensor.tolist()` makes both, and a sum is a sum. Read an oracle beside the paper; the tests
then compare the implementation with it in fp64.
"""

import cmath
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Vector = list[float]
Matrix = list[Vector]


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomize(module: nn.Module, seed: int, std: float = 0.5) -> nn.Module:
    """fp64, every parameter random; the norms' too, since weights of one hide a missing one."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(1000 * seed + i, *p.shape) * std + (1.0 if p.ndim == 1 else 0.0))
    return module


ONE_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rounded_well(
    got: list[Tensor], exact: Callable[..., list[Tensor]], inputs: list[Tensor],
    dtype: torch.dtype = torch.float32, times: float = 8.0, names: tuple[str, ...] = (),
) -> None:
    """`got`, computed from `inputs` in `dtype`, is as near to `exact(*inputs)` as roundings allow.

    Exact is fp64. Moving every input by one rounding of `dtype`, at random, moves the exact results
    too; an error may be `times` that change (both as root mean squares): in fp32 8 times, as 256
    terms added one after the other are off by about half of √256 roundings; in half precision,
    summed in fp32, at most once. A sum that cancels is judged so by the size of its summands, never
    by the little that is left of them, and the bound does not depend on the order in which some
    library adds on some processor.
    """
    inputs = [x.detach().double() for x in inputs]
    plain, change = exact(*inputs), [0.0] * len(got)
    for draw in range(8):
        moved = [x * (1 + ONE_ROUNDING[dtype] * normal(100 * draw + i, *x.shape).to(x.device))
                 for i, x in enumerate(inputs)]
        for i, (a, b) in enumerate(zip(exact(*moved), plain, strict=True)):
            change[i] += (a - b).square().mean().item() / 8
    for i, (ours, value) in enumerate(zip(got, plain, strict=True)):
        assert ours.shape == value.shape
        error = (ours.double() - value).square().mean().item() ** 0.5
        name, unit = names[i] if names else i, change[i] ** 0.5
        assert error <= times * unit, f"{name}: off by {error:.1e}, one rounding is {unit:.1e}"


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def matvec(W: Matrix, x: Vector) -> Vector:
    return [dot(row, x) for row in W]


def add(*vectors: Vector) -> Vector:
    return [math.fsum(column) for column in zip(*vectors, strict=True)]


def slices(x: Vector, n: int) -> list[Vector]:
    """n equal slices: the paper's [x_1; x_2; ...; x_n]."""
    size = len(x) // n
    return [x[i * size : (i + 1) * size] for i in range(n)]


def softmax(z: Vector) -> Vector:
    top = max(z)
    e = [math.exp(x - top) for x in z]
    return [x / math.fsum(e) for x in e]


def rms_norm(x: Vector, weight: Vector, eps: float = 1e-6) -> Vector:
    root = math.sqrt(dot(x, x) / len(x) + eps)
    return [w * a / root for w, a in zip(weight, x, strict=True)]


def silu(x: float) -> float:
    return x / (1.0 + math.exp(-x))


def frequencies(d_r: int, theta: float = 1e4) -> Vector:
    return [1.0 / theta ** (2 * i / d_r) for i in range(d_r // 2)]


def rope(x: Vector, position: int, freqs: Vector, magnitude: float = 1.0) -> Vector:
    """Each adjacent pair as a complex number, multiplied by magnitude·exp(i·position·frequency)."""
    turned = []
    for i, freq in enumerate(freqs):
        z = complex(x[2 * i], x[2 * i + 1]) * cmath.rect(magnitude, position * freq)
        turned += [z.real, z.imag]
    return turned


def yarn_frequencies(
    d_r: int, theta: float, factor: float, beta_fast: float, beta_slow: float, original: int
) -> Vector:
    """By search instead of logarithms: the last pair that makes >= beta_fast turns in the original
    context, the first that makes <= beta_slow, and a straight line between the two."""

    def turns(pair: int) -> float:
        return original / (2 * math.pi * theta ** (2 * pair / d_r))

    low = max(i for i in range(-99, 99) if turns(i) >= beta_fast)
    high = min(i for i in range(-99, 99) if turns(i) <= beta_slow)
    low, high = max(low, 0), min(high, d_r - 1)
    if low == high:
        high += 0.001
    mixed = []
    for i, freq in enumerate(frequencies(d_r, theta)):
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append((1 - share) * freq + share * freq / factor)
    return mixed


def mha(
    h: Matrix, W_Q: Matrix, W_K: Matrix, W_V: Matrix, W_O: Matrix, n_h: int, n_kv: int,
    freqs: Vector | None = None,
) -> Matrix:
    """(1)-(8) of one sequence; n_h / n_kv query heads share a key and a value."""
    T = len(h)
    q = [slices(matvec(W_Q, x), n_h) for x in h]                        # (1)(4)
    k = [slices(matvec(W_K, x), n_kv) for x in h]                       # (2)(5)
    v = [slices(matvec(W_V, x), n_kv) for x in h]                       # (3)(6)
    if freqs is not None:
        q = [[rope(head, t, freqs) for head in q[t]] for t in range(T)]
        k = [[rope(head, t, freqs) for head in k[t]] for t in range(T)]
    u = []
    for t in range(T):
        o: Vector = []
        for i in range(n_h):
            shared = i // (n_h // n_kv)
            scale = 1 / math.sqrt(len(q[t][i]))
            w = softmax([dot(q[t][i], k[j][shared]) * scale for j in range(t + 1)])
            o += add(*([w[j] * x for x in v[j][shared]] for j in range(t + 1)))     # (7)
        u.append(matvec(W_O, o))                                        # (8)
    return u


def mla(
    h: Matrix, W: dict[str, Matrix], n_h: int, freqs: Vector, scale: float, magnitude: float = 1.0
) -> tuple[Matrix, Matrix]:
    """(37)-(47) of one sequence -> the outputs u, and the rows [c_kv ; k_r] that are cached.

    W holds W_UQ W_QR W_DKV W_UK W_UV W_KR W_O, norm_kv (a vector), and W_DQ and norm_q when the
    query is compressed.
    """
    u, rows, keys, values = [], [], [], []
    for t, x in enumerate(h):
        c_q = rms_norm(matvec(W["W_DQ"], x), W["norm_q"]) if "W_DQ" in W else x        # (37)
        q_c = slices(matvec(W["W_UQ"], c_q), n_h)                                      # (38)
        q_r = [rope(q, t, freqs, magnitude) for q in slices(matvec(W["W_QR"], c_q), n_h)]  # (39)
        q = [q_c[i] + q_r[i] for i in range(n_h)]                                      # (40)
        c_kv = rms_norm(matvec(W["W_DKV"], x), W["norm_kv"])                           # (41)
        k_c = slices(matvec(W["W_UK"], c_kv), n_h)                                     # (42)
        k_r = rope(matvec(W["W_KR"], x), t, freqs, magnitude)                          # (43)
        keys.append([k_c[i] + k_r for i in range(n_h)])                                # (44)
        values.append(slices(matvec(W["W_UV"], c_kv), n_h))                            # (45)
        rows.append(c_kv + k_r)
        o: Vector = []
        for i in range(n_h):
            w = softmax([dot(q[i], keys[j][i]) * scale for j in range(t + 1)])
            o += add(*([w[j] * y for y in values[j][i]] for j in range(t + 1)))        # (46)
        u.append(matvec(W["W_O"], o))                                                  # (47)
    return u, rows


def affinities(u: Vector, centroids: Matrix) -> Vector:
    """(22) of one token."""
    return softmax(matvec(centroids, u))


def top(values: Vector, k: int) -> list[int]:
    """Places of the k largest values, largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def select_device_limited(s: Vector, top_k: int, n_devices: int, max_devices: int) -> list[int]:
    """The top_k experts of one token on the max_devices devices that hold the best single ones."""
    size = len(s) // n_devices
    best = top([max(group) for group in slices(s, n_devices)], max_devices)
    reachable = [i for i in range(len(s)) if i // size in best]
    return sorted(reachable, key=lambda i: -s[i])[:top_k]


def expert_f(chosen: list[list[int]], n_routed: int) -> Vector:
    """(24)."""
    T, K = len(chosen), len(chosen[0])
    f = []
    for i in range(n_routed):
        count = 0
        for t in range(T):
            if i in chosen[t]:
                count += 1
        f.append(n_routed / (K * T) * count)
    return f


def mean_affinity(s: Matrix) -> Vector:
    """(25)."""
    return [math.fsum(s[t][i] for t in range(len(s))) / len(s) for i in range(len(s[0]))]


def expert_loss(s: Matrix, chosen: list[list[int]], alpha: float) -> float:
    """(23)."""
    return alpha * dot(expert_f(chosen, len(s[0])), mean_affinity(s))


def device_loss(s: Matrix, chosen: list[list[int]], alpha: float, n_devices: int) -> float:
    """(26)-(28)."""
    f, P = expert_f(chosen, len(s[0])), mean_affinity(s)
    loss = 0.0
    for group_f, group_P in zip(slices(f, n_devices), slices(P, n_devices), strict=True):
        loss += alpha * (math.fsum(group_f) / len(group_f)) * math.fsum(group_P)
    return loss


def communication_loss(
    s: Matrix, chosen: list[list[int]], alpha: float, n_devices: int, max_devices: int
) -> float:
    """(29)-(31)."""
    size, T = len(s[0]) // n_devices, len(s)
    loss = 0.0
    for device, group_P in enumerate(slices(mean_affinity(s), n_devices)):
        sent = 0
        for t in range(T):
            if any(i // size == device for i in chosen[t]):
                sent += 1
        loss += alpha * n_devices / (max_devices * T) * sent * math.fsum(group_P)
    return loss


def keep_within_budget(
    chosen: list[list[int]], affinity: Matrix, n_routed: int, n_devices: int,
    protected: list[bool] | None = None, capacity: float = 1.0,
) -> list[list[bool]]:
    """Device by device: protected slots first, then by affinity, then in order of appearance."""
    N, K = len(chosen), len(chosen[0])
    budget = math.floor(capacity * N * K / n_devices)
    keep = [[False] * K for _ in range(N)]
    for device in range(n_devices):
        slots = [(n, k) for n in range(N) for k in range(K)
                 if chosen[n][k] // (n_routed // n_devices) == device]
        safe = [(n, k) for n, k in slots if protected is not None and protected[n]]
        others = sorted((s for s in slots if s not in safe), key=lambda s: -affinity[s[0]][s[1]])
        for n, k in safe + others[: max(budget - len(safe), 0)]:
            keep[n][k] = True
    return keep


Expert = tuple[Matrix, Matrix, Matrix]          # W_gate (w, d), W_up (w, d), W_down (d, w)


def expert(x: Vector, weights: Expert) -> Vector:
    """SwiGLU."""
    W_gate, W_up, W_down = weights
    hidden = [silu(a) * b for a, b in zip(matvec(W_gate, x), matvec(W_up, x), strict=True)]
    return matvec(W_down, hidden)


def mixture(
    u: Vector, x: Vector, chosen: list[int], gates: Vector, shared: list[Expert],
    routed: list[Expert], keep: list[bool] | None = None,
) -> Vector:
    """(20) of one token: the residual u, and what the experts make of x."""
    terms = [u] + [expert(x, weights) for weights in shared]
    for k, (i, g) in enumerate(zip(chosen, gates, strict=True)):
        if keep is None or keep[k]:
            terms.append([g * y for y in expert(x, routed[i])])
    return add(*terms)

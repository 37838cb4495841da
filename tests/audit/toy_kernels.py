# SPDX-License-Identifier: MIT
"""Tiny kernels, each wrong in one way that machine_code.py must report, and a good one."""

import triton
import triton.language as tl
from audit.machine_code import Entry


@triton.jit
def product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            precision: tl.constexpr):
    """c (BM, BN) = a (BM, K) @ b (BN, K)ᵀ, K a multiple of BK."""
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    out = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + start + k)
        y = tl.load(b + n[None, :] * K + start + k[:, None])
        out = tl.dot(x, y, out, input_precision=precision)
    tl.store(c + m[:, None] * BN + n, out)


@triton.jit
def chained(q, k, o, S, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """o (BM, D) = (q kᵀ) k without a softmax: two products, one feeding the other."""
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q + m[:, None] * D + d)
    out = tl.zeros((BM, D), tl.float32)
    for start in range(0, S, BN):
        tile = tl.load(k + (start + n[:, None]) * D + d)
        scores = tl.dot(query, tl.trans(tile))
        out = tl.dot(scores.to(tile.dtype), tile, out)
    tl.store(o + m[:, None] * D + d, out)


@triton.jit
def paged(q, k, pages, o, S, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """`chained` where each tile's place is read from a table inside the loop."""
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q + m[:, None] * D + d)
    out = tl.zeros((BM, D), tl.float32)
    for start in range(0, S, BN):
        page = tl.load(pages + start // BN)
        tile = tl.load(k + (page * BN + n[:, None]) * D + d)
        scores = tl.dot(query, tl.trans(tile))
        out = tl.dot(scores.to(tile.dtype), tile, out)
    tl.store(o + m[:, None] * D + d, out)


PRODUCT = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32:16"}
CHAINED = {"q": "*bf16", "k": "*bf16", "o": "*fp32", "S": "i32:16"}


def _product(name: str, BM: int = 128, BN: int = 128, warps: int = 8, signature: dict = PRODUCT,
             precision: str = "ieee", **budget: object) -> Entry:
    sizes = {"BM": BM, "BN": BN, "BK": 64, "precision": precision}
    given = {"num_stages": 3, "instruction": "HGMMA", "flops": 2 * BM * BN * 64} | budget
    return Entry(name, "audit.toy_kernels:product", signature, sizes, warps, **given)


def _chained(name: str, BM: int, BN: int, D: int, kernel: str = "chained", stages: int = 3,
             signature: dict = CHAINED, **budget: object) -> Entry:
    given = {"instruction": "HMMA", "flops": 4 * BM * BN * D} | budget
    return Entry(name, f"audit.toy_kernels:{kernel}", signature, {"BM": BM, "BN": BN, "D": D},
                 4, stages, **given)


ENTRIES = [
    _product("good", ctas=2, buffers=3, plain_loads=0),
    _product("good_ampere", target="sm_80", instruction="HMMA", buffers=2),
    _product("good_amd", target="gfx942", num_stages=2, instruction="MFMA", ctas=2),
    _chained("good_chain", 16, 32, 128, buffers=2),
    _product("spills", 128, 256, 4, num_stages=1),
    _product("spills_amd", 256, 256, 2, target="gfx942", num_stages=1, instruction="MFMA"),
    _chained("repeats", 16, 16, 128),
    _product("no_instruction", signature=PRODUCT | {"a": "*fp32", "b": "*fp32"}, BM=32, BN=32,
             warps=4),
    _product("other_instruction", BM=32, warps=4),
    _product("too_many_blocks", ctas=3),
    _product("too_much_shared", num_stages=5, ctas=1, shared=100_000),
    _product("too_much_shared_amd", BM=256, target="gfx942", num_stages=3,
             instruction="MFMA"),
    _chained("lost_buffers", 16, 32, 128, "paged", 4, CHAINED | {"pages": "*i32"}, buffers=3),
    _product("bypasses", num_stages=1, plain_loads=0, signature=PRODUCT | {"a": "*bf16:1"}),
    _product("few_registers", registers=80),
    _product("narrow", signature=PRODUCT | {"c": "*fp32:1"}, accesses=30, length=300),
    _product("surprise", instruction=None, flops=None),
    _product("wrong_arguments", signature={"a": "*bf16"}),
]

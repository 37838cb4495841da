# SPDX-License-Identifier: MIT
"""Products with FP8 weights against W spelt out in fp64, code by code.

Without a CUDA device the kernels run in Triton's interpreter, and buffers come full of NaN. What
runs on a card alone, the assembly that decodes, is executed here by its definition.
"""

import os
import re
from functools import partial

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from oracles.loops import normal  # noqa: E402
from refusals import refused  # noqa: E402
from torch import Tensor  # noqa: E402

from dsv2_ref.kernels.fp8 import (  # noqa: E402
    Fp8Stack,
    dequantise,
    linear,
    linear_quantised_input,
    quantise,
)
from dsv2_ref.kernels.fp8_products import (  # noqa: E402
    TILES,
    Plan,
    Tile,
    assembly,
    dequantise_fp8,
    linear_fp8,
    linear_fp8_quantised_input,
    plan,
    split,
)

pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
              pytest.mark.filterwarnings("ignore:.*deterministic")]
# M, r, c: ragged blocks of rows and columns, several blocks, one number, both kinds of tiles
SHAPES = [(1, 96, 200), (3, 576, 96), (16, 130, 257), (17, 129, 128), (40, 64, 300), (2, 1, 1)]
shapes = pytest.mark.parametrize(("M", "r", "c"), SHAPES)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nothing was written to is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(before)


def weight(seed: int, r: int, c: int) -> tuple[Tensor, Tensor]:
    """Codes and scales; blocks differ in size."""
    W = normal(seed, r, c)
    size = normal(seed + 1, -(-r // 128), -(-c // 128)).mul(2).exp()
    W *= size.repeat_interleave(128, 0)[:r].repeat_interleave(128, 1)[:, :c]
    return tuple(t.to(DEVICE) for t in quantise(W))


def exact(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x·Wᵀ in fp64, block by block."""
    y = x.new_zeros(len(x), len(codes), dtype=torch.float64)
    for i in range(0, codes.shape[0], 128):
        for k in range(0, codes.shape[1], 128):
            block = codes[i : i + 128, k : k + 128].double() * scale[i // 128, k // 128].double()
            y[:, i : i + 128] += x[:, k : k + 128].double() @ block.T
    return y


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Each block of rows of W by itself, for a large one would hide the others."""
    assert got.shape == expected.shape and got.isfinite().all()
    for a, b in zip(got.double().split(128, 1), expected.split(128, 1), strict=True):
        assert (a - b).norm() < tolerance * b.norm(), (a - b).norm() / b.norm()


@shapes
def test_equals_the_matrix_written_out(M, r, c):
    codes, scale = weight(1, r, c)
    x = normal(3, M, c).float().to(DEVICE)
    y = linear_fp8(x, codes, scale)
    assert y.dtype == x.dtype
    near(y, exact(x, codes, scale))
    near(linear(x, codes, scale), exact(x, codes, scale))
    assert torch.equal(y, linear_fp8(x, codes, scale))


def all_codes() -> tuple[Tensor, Tensor]:
    """(127, 2) of both signs, all but NaN, and a scale of no power of two."""
    codes = torch.arange(127, dtype=torch.uint8)
    codes = torch.stack([codes, codes | 128], 1).view(torch.float8_e4m3fn)
    return codes.to(DEVICE), torch.tensor([[0.3]], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_code_is_read_exactly(dtype):
    """Of a unit vector the product is one number of W, to the bit."""
    codes, scale = all_codes()
    expected = dequantise(codes, scale, dtype)
    y = linear_fp8(torch.eye(2, dtype=dtype, device=DEVICE), codes, scale)
    assert torch.equal(y.T, expected)
    wide = codes.T.contiguous()                                          # (2, 127), "many" rows
    y = linear_fp8(torch.eye(127, dtype=dtype, device=DEVICE), wide, scale)
    assert torch.equal(y, expected)


def bf16(bits: int) -> float:
    return torch.tensor([bits - (bits >> 15 << 16)], dtype=torch.int16).view(torch.bfloat16).item()


def f16(bits: int) -> float:
    return torch.tensor([bits - (bits >> 15 << 16)], dtype=torch.int16).view(torch.float16).item()


def execute(text: str, codes: int) -> list[float]:
    """What the assembly makes of four codes in a register: the five kinds of instructions."""
    registers: dict[str, int] = {"$2": codes}
    found: dict[int, list[float]] = {}
    for line in text.strip("{ }").split(";"):
        name, *words = line.replace(",", " ").split() or [""]
        if name in ("", ".reg"):
            continue
        to, *given = words
        args = [registers[g] if g in registers else int(g, 0) for g in given]
        if name == "mov.b32":
            registers[to] = args[0]
        elif name == "prmt.b32":
            pool = (args[1] << 32 | args[0]).to_bytes(8, "little")
            picks = [args[2] >> 4 * i & 15 for i in range(4)]
            chosen = [255 * (pool[p & 7] >> 7) if p & 8 else pool[p] for p in picks]
            registers[to] = int.from_bytes(bytes(chosen), "little")
        elif name == "shl.b32":
            registers[to] = args[0] << args[1] & 0xFFFFFFFF
        elif name == "and.b32":
            registers[to] = args[0] & args[1]
        else:
            kind = {"fma.rn.bf16x2": bf16, "fma.rn.f16x2": f16}[name]
            halves = [[kind(a >> 16 * i & 0xFFFF) for a in args] for i in range(2)]
            found[int(to[1:])] = [a * b + z for a, b, z in halves]
    return found[0] + found[1]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_assembly_reads_every_code_exactly(half):
    """Also the zeros' signs, and subnormal codes; in every byte of a register."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127]
    numbers = codes.view(torch.float8_e4m3fn).float()
    # in the interpreter `assembly` is a plain function
    text = getattr(assembly, "fn", assembly)(half == torch.bfloat16)
    assert not re.search(r"[^\x20-\x7e]", text)
    for i, number in enumerate(numbers.tolist()):
        four = [int(codes[(i + 61 * j) % 254]) for j in range(4)]
        got = execute(text, int.from_bytes(bytes(four), "little"))
        assert got[0] == number and str(got[0]) == str(number)
        assert got == [numbers[(i + 61 * j) % 254].item() for j in range(4)]


@pytest.mark.parametrize("programs", [1, 6, 100])
def test_blocks_split_among_programs_give_the_same_sum(monkeypatch, programs):
    monkeypatch.setitem(plan.__globals__, "multiprocessors", lambda device: programs)
    codes, scale = weight(5, 40, 700)
    x = normal(6, 5, 700).float().to(DEVICE)
    near(linear_fp8(x, codes, scale), exact(x, codes, scale))


def test_how_blocks_are_split():
    assert split(16, 32, 264) == 2                       # 8 splits of 2: 256 programs
    assert split(16, 300, 264) == 16 and split(1, 1, 264) == 1
    assert split(5, 1, 264) == 1 and split(96, 80, 264) == 32


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter alone takes the tiles of any target")
@pytest.mark.parametrize(("target", "name"), [
    (target, name) for target in TILES if target != "cpu" for name in ("few", "many")])
def test_the_tiles_of_every_target(monkeypatch, target, name):
    how = Plan(Tile(*TILES[target][name]), False, 3)
    monkeypatch.setitem(linear_fp8.__globals__, "plan", lambda *_: how)
    codes, scale = weight(7, 70, 200)
    x = normal(8, 18, 200).float()
    near(linear_fp8(x, codes, scale), exact(x, codes, scale))


@shapes
def test_quantised_input_equals_its_twin(M, r, c):
    codes, scale = weight(9, r, c)
    x = normal(10, M, c).float().to(DEVICE) * normal(11, M, 1).mul(3).exp().float().to(DEVICE)
    y, twin = (f(x, codes, scale) for f in (linear_fp8_quantised_input, linear_quantised_input))
    assert y.dtype == x.dtype
    near(y, twin.double())
    error = (y - linear(x, codes, scale)).norm() / y.norm()
    assert 1e-3 < error < 0.1 or c == 1                  # it is another result, by FP8's steps


@pytest.mark.parametrize("shape", [(576, 96), (130, 257), (1, 1), (3, 140, 70), (2, 3, 129, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantised_is_the_twin_to_the_bit(shape, dtype):
    codes, scale = (t.to(DEVICE) for t in quantise(normal(12, *shape) * 3))
    W = dequantise_fp8(codes, scale, dtype)
    assert W.dtype == dtype and torch.equal(W, dequantise(codes, scale, dtype))


def test_rows_of_any_shape_and_none():
    codes, scale = weight(13, 20, 30)
    x = normal(14, 30, 2, 3).float().to(DEVICE).permute(1, 2, 0)          # not contiguous
    y = linear_fp8(x, codes, scale)
    assert y.shape == (2, 3, 20)
    near(y.flatten(0, 1), exact(x.flatten(0, 1), codes, scale))
    near(linear_fp8(x[0, 0], codes, scale)[None], exact(x[0, :1], codes, scale), 1e-5)
    for f in (linear_fp8, linear_fp8_quantised_input):
        assert f(x[:0], codes, scale).shape == (0, 3, 20)
    near(linear_fp8_quantised_input(x, codes, scale).flatten(0, 1),
         linear_quantised_input(x, codes, scale).flatten(0, 1).double())


def test_half_precision_is_rounded_once():
    """fp16 in and out: at most half a step from exact, for W is never rounded."""
    codes, scale = weight(15, 70, 260)
    scale /= scale.max() * 400
    x = normal(16, 4, 260).half().to(DEVICE)
    y, expected = linear_fp8(x, codes, scale), exact(x, codes, scale)
    assert y.dtype == torch.float16
    step = 2.0**-11 * expected.abs().clamp(min=2.0**-14)
    assert ((y.double() - expected).abs() <= step * 1.01).all()


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "consumer", "gfx942"])
def test_the_plan_of_each_card(monkeypatch, target):
    monkeypatch.setitem(plan.__globals__, "target_of", lambda device: target)
    monkeypatch.setitem(plan.__globals__, "check_device", lambda *_: None)
    monkeypatch.setitem(plan.__globals__, "multiprocessors", lambda device: 132)
    x = torch.empty(3, 64, dtype=torch.bfloat16)
    tile = Tile(*TILES[target]["few"])
    assert plan(x, "few", 64) == Plan(tile, target != "gfx942", 132 * tile.blocks)
    assert plan(x, "many", 64).tile == Tile(*TILES[target]["many"])
    assert plan(x, "many", 64, 60).tile == Tile(*TILES["small"]["many"])
    assert plan(x.float(), "few", 64) == Plan(Tile(*TILES["small"]["few"]), False, 264)


def test_what_is_not_asked_for_is_refused(monkeypatch):
    codes, scale = weight(17, 20, 30)
    x = torch.zeros(3, 30, device=DEVICE)
    for f in (linear_fp8, linear_fp8_quantised_input):
        for given, words in (((x[:, 1:], codes, scale), ("x", "(3, 29)", "(20, 30)")),
                             ((x.double(), codes, scale), ("x", "float64", "bfloat16")),
                             ((x, codes.float(), scale), ("codes and scale", "float32")),
                             ((x, codes, scale[:0]), ("scale", "(0, 1)", "(1, 1)")),
                             ((x[:, :20], codes.T, scale), ("not contiguous",))):
            refused(partial(f, *given), *words)
    stack = Fp8Stack(torch.ones(2, 20, 30))
    refused(lambda: linear_fp8(x, stack.codes, stack.scale), "x", "(2, 20, 30)")
    refused(lambda: dequantise_fp8(codes, scale[:, :0]), "scale", "(1, 0)")
    monkeypatch.setitem(linear_fp8.__globals__, "target_of", lambda device: "sm_80")
    refused(lambda: linear_fp8_quantised_input(x, codes, scale), "sm_80", "sm_90")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    codes, scale = weight(18, 20, 30)
    x = torch.zeros(3, 30)
    refused(lambda: linear_fp8(x.bfloat16(), codes, scale), "x", "bfloat16", "CUDA device")
    for name in ("_linear_kernel", "_quantised_kernel", "_dequantise_kernel"):
        monkeypatch.setitem(linear_fp8.__globals__, name, object.__new__(triton.JITFunction))
    refused(lambda: linear_fp8(x, codes, scale), "x", "cpu", "TRITON_INTERPRET=1")
    refused(lambda: linear_fp8_quantised_input(x, codes, scale), "x", "TRITON_INTERPRET=1")
    refused(lambda: dequantise_fp8(codes, scale), "out", "TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cpu", reason="bf16 products are wrong in the interpreter")
@pytest.mark.parametrize(("M", "r", "c"), [(1, 2048, 2048), (16, 576, 2048), (128, 2048, 10944),
                                           (512, 5120, 1536), (5, 77, 41), (100, 96, 200)])
def test_bf16_on_a_gpu(M, r, c):
    codes, scale = weight(19, r, c)
    x = normal(20, M, c).bfloat16().to(DEVICE)
    near(linear_fp8(x, codes, scale), exact(x, codes, scale), 5e-3)
    eye = torch.eye(2, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(linear_fp8(eye, *all_codes()).T, dequantise(*all_codes(), torch.bfloat16))
    if "fp8" in TILES[plan.__globals__["target_of"](x.device)]:
        near(linear_fp8_quantised_input(x, codes, scale),
             linear_quantised_input(x.float(), codes, scale).double(), 5e-3)

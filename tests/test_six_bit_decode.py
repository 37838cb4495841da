# SPDX-License-Identifier: MIT
"""The kernel on packed rows against its naive twin: in Triton's interpreter, or on a GPU.

Hopper's form has PTX assembly, which the interpreter does not know. `assembly_in_python` runs the
kernel's own assembly text, instruction by instruction, on pairs of 16-bit numbers. On a Hopper GPU
the same tests run the real thing.
"""

import math
import os
import sys

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from dsv2_ref.attention.cache_quant import SixBitCache, attend_packed, lent_bits, quantise
from dsv2_ref.attention.cache_quant import pack as packed
from dsv2_ref.attention.cache_quant import unpack as unpacked
from dsv2_ref.kernels.latent_decode import Tile, combine
from dsv2_ref.kernels.six_bit_decode import attend_six_bit, decode_six_bit, field, tile_for

# triton 3.6's interpreter meets numpy 2 in loops whose bounds are computed
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
KERNEL = sys.modules[decode_six_bit.__module__]
SIZES = [(512, 64), (128, 16), (64, 16), (40, 10), (22, 6), (24, 10), (5, 4)]
F32 = torch.float32
EMPTY = torch.empty


def normal(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def nan_wherever_memory_is_new(monkeypatch):
    def poisoned(*args, **kwargs) -> Tensor:
        new = EMPTY(*args, **kwargs)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", poisoned)


def run(code: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    """PTX instructions on 32-bit registers; `registers` has $1, $2, .. and the result is $0."""
    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for instruction in code.strip("{} ").split(";"):
        opcode, _, rest = instruction.strip().partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        if opcode in ("", ".reg"):
            continue
        x = [value(name) for name in names]
        if opcode == "mov.b32":
            y = x[0]
        elif opcode == "shr.u32":
            y = x[0] >> x[1]
        elif opcode == "lop3.b32":                           # any function of three bits, by table
            y = np.zeros_like(x[0])
            for row in range(8):
                if int(x[3]) >> row & 1:
                    bits = zip(x[:3], (row >> 2 & 1, row >> 1 & 1, row & 1))
                    y = y | np.bitwise_and.reduce(np.broadcast_arrays(
                        *(b if want else ~b for b, want in bits)))
        elif opcode == "sub.rn.f16x2":
            a, b = (halves(np.broadcast_to(b, x[0].shape)).view(np.float16) for b in x)
            y = pairs((a - b).view(np.uint16))
        else:
            raise AssertionError(f"unknown instruction {opcode}")
        registers[target] = y
    return registers["$0"]


def pairs(x: np.ndarray) -> np.ndarray:
    """Neighbouring 16-bit numbers in one register each, the first in its lower half."""
    low, high = x.reshape(-1, 2).astype(np.uint32).T
    return low | high << 16


def halves(x: np.ndarray) -> np.ndarray:
    return np.stack((x & 0xFFFF, x >> 16), -1).astype(np.uint16)


def assembly_in_python(asm, constraints, args, dtype, is_pure, pack):
    asm = getattr(asm, "value", asm)
    assert constraints == "=r,r,r" and pack == 2 and dtype == tl.float16
    words = [a.handle.data.view(np.uint16) for a in args]
    out = run(asm, {f"${1 + k}": pairs(x) for k, x in enumerate(words)})
    data = halves(out).view(np.float16).reshape(words[0].shape)
    handle = type(args[0].handle)(data, tl.float16)
    return tl.tensor(handle, tl.block_type(tl.float16, list(data.shape)))


@pytest.fixture
def hopper(monkeypatch):
    """The form for Hopper, on whatever there is."""
    if DEVICE == "cpu":
        monkeypatch.setattr(tl, "inline_asm_elementwise", assembly_in_python)
    elif not HOPPER:
        pytest.skip("another GPU")
    monkeypatch.setattr(KERNEL, "target_of", lambda device: "sm_90")


def close(got: Tensor, expected: Tensor, at_most: float = 1e-6) -> None:
    """Relative root mean square."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape and got.isfinite().all()
    error = (got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error <= at_most, f"{error:.2e}"


def rows(seed: int, B: int, S: int, d_c: int, d_r: int) -> tuple[Tensor, Tensor]:
    """Packed words and scales of B sequences of S tokens, some larger than others."""
    size = normal(seed + 2, B, S, 1).exp()
    n_c, n_r, scales = quantise(normal(seed, B, S, d_c) * size, normal(seed + 1, B, S, d_r) * 2)
    return packed(n_c, n_r), scales


def inputs(B: int, T: int, S: int, n_h: int = 5, d_h: int = 6, d_r: int = 10, d_v: int = 7,
           d_c: int = 40, dtype: torch.dtype = F32) -> list[Tensor]:
    """q_c, q_r, words, scales, W_UK, W_UV."""
    q = [normal(0, B, T, n_h, d_h, dtype=dtype), normal(1, B, T, n_h, d_r, dtype=dtype)]
    W = [normal(2, n_h, d_h, d_c, dtype=dtype), normal(3, n_h, d_v, d_c, dtype=dtype)]
    return q + list(rows(4, B, S, d_c, d_r)) + W


def twin(tensors: list[Tensor], scale: float, positions: Tensor | None = None) -> Tensor:
    q_c, q_r, words, scales, W_UK, W_UV = tensors
    W_UK, W_UV = W_UK.double(), W_UV.double()
    return attend_packed(q_c.double(), q_r.double(), words, scales, W_UK, W_UV, scale, positions)


def averages(q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, positions: Tensor,
             scale: float) -> Tensor:
    """What `decode_six_bit` gives, query by query; 0 for those that see nothing."""
    q_c, q_r = q_c.double(), q_r.double()
    n_c, n_r = unpacked(words, q_c.shape[-1], q_r.shape[-1])
    c, r = n_c * scales[..., :1].double(), n_r * scales[..., 1:].double()
    o = torch.zeros_like(q_c)
    for b, row in enumerate(positions.tolist()):
        for t, p in enumerate(row):
            if p >= 0:
                scores = q_c[b, t] @ c[b, : p + 1].T + q_r[b, t] @ r[b, : p + 1].T
                o[b, t] = (scores * scale).softmax(-1) @ c[b, : p + 1]
    return o


@triton.jit
def _all_fields(a, b, c, out, HALF: tl.constexpr, SUBTRACT: tl.constexpr, PTX: tl.constexpr,
                ROWS: tl.constexpr):
    first = tl.program_id(0) * ROWS
    at = (first + tl.arange(0, ROWS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = (tl.load(a + at), tl.load(b + at), tl.load(c + at))
    for t in tl.static_range(8):
        tl.store(out + t * 65536 + at, field(words, t, HALF, SUBTRACT, PTX))


@pytest.mark.parametrize("form", ["plain", "hopper"])
@pytest.mark.parametrize("lent", [False, True])
def test_every_word_becomes_its_codes(form, lent, request):
    """All 65,536 words in each of the three planes, beside other random ones."""
    if form == "hopper":
        request.getfixturevalue("hopper")
    g = torch.Generator().manual_seed(1)
    for plane in range(3):
        words = torch.randint(0, 65536, (3, 65536), generator=g)
        words[plane] = torch.arange(65536)
        a, b, c = words.tolist()
        v2 = [x >> 6 & 15 | (z >> 6 & 3) << 4 for x, z in zip(a, c)]
        v5 = [y >> 6 & 15 | (z >> 8 & 3) << 4 for y, z in zip(b, c)]
        if lent:
            v2, v5 = [v & 31 for v in v2], [v & 31 for v in v5]
        codes = [[x & 63 for x in a], [x >> 10 for x in a], v2, [y & 63 for y in b],
                 [y >> 10 for y in b], v5, [z & 63 for z in c], [z >> 10 for z in c]]
        unit = torch.tensor([1, 16, 1, 1, 16, 1, 1, 16])[:, None]
        half = torch.tensor([32, 32, 16 if lent else 32] * 3)[:8, None]
        planes = [x.to(DEVICE, torch.int16) for x in words]
        for subtract in (False, True):
            got = torch.full((8, 65536), torch.nan, dtype=torch.float16, device=DEVICE)
            ROWS = 4096 if DEVICE == "cpu" else 64
            _all_fields[4096 // ROWS,](*planes, got, 16 if lent else 32, subtract,
                                       form == "hopper", ROWS)
            expected = unit * (torch.tensor(codes) - half * subtract) + 1024 * (not subtract)
            assert torch.equal(got.cpu().double(), expected.double())


@pytest.mark.parametrize("S", [1, 31, 32, 33, 97, 130])
@pytest.mark.parametrize("T", [1, 3])
def test_equals_the_twin(T, S):
    tensors = inputs(2, min(T, S), S)
    close(attend_six_bit(*tensors, 0.03), twin(tensors, 0.03))


@pytest.mark.parametrize("d_c, d_r", SIZES)
def test_any_sizes(d_c, d_r):
    tensors = inputs(2, 1, 37, 3, d_r=d_r, d_c=d_c)
    close(attend_six_bit(*tensors, 0.03), twin(tensors, 0.03))


@pytest.mark.parametrize("d_c, d_r", SIZES)
def test_the_form_for_hopper(d_c, d_r, hopper):
    tensors = inputs(2, 2, 70, 3, d_h=d_c, d_r=d_r, d_c=d_c, dtype=torch.float16)[:4]
    positions = torch.tensor([[68, 69], [7, 8]], device=DEVICE)
    close(decode_six_bit(*tensors, positions, 0.02), averages(*tensors, positions, 0.02), 1e-3)


def test_a_flat_average_does_not_drown_in_offsets(hopper):
    """Weights all alike: what is left of 300 numbers is far smaller than an offset of 1024."""
    tensors = inputs(1, 1, 300, 3, d_h=128, d_r=16, d_c=128, dtype=torch.float16)[:4]
    positions = torch.tensor([[299]], device=DEVICE)
    close(decode_six_bit(*tensors, positions, 1e-6), averages(*tensors, positions, 1e-6), 1e-3)


@pytest.mark.parametrize("form", ["plain", "hopper"])
def test_weights_and_outputs_are_summed_in_fp32(form, request):
    """64 keys of weight 1, then many of 2⁻¹², which would not move a sum kept in fp16 at all.

    fp16 holds these weights exactly, so an output is off by one rounding of fp16 (2⁻¹¹ of it) and
    by what 1200 sums in fp32 are.
    """
    if form == "hopper":
        request.getfixturevalue("hopper")
    q_c, q_r = inputs(1, 1, 1, d_h=64, d_r=16, dtype=torch.float16)[:2]
    height = 12 * (torch.arange(1200, device=DEVICE) < 64)
    n_c = (normal(7, 1, 1200, 64) * 5).round().clamp(-15, 15).int() * 2  # even: bits may be lent
    n_r = torch.zeros(1, 1200, 16, dtype=torch.int32, device=DEVICE)
    q_c[:], q_r[:], n_r[0, :, 0] = 0, 1, height
    scales = torch.ones(1, 1200, 2, dtype=torch.bfloat16, device=DEVICE)
    positions = torch.tensor([[1199]], device=DEVICE)
    got = decode_six_bit(q_c, q_r, packed(n_c, n_r), scales, positions, math.log(2), splits=2)
    w, c = 2.0 ** height.double(), n_c[0].double()
    exact, size = ((w / w.sum()) @ x for x in (c, c.abs()))
    bound = 2.0**-11 * exact.abs() + 2 * 1200 * 2.0**-24 * size
    assert ((got[0, 0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6])
@pytest.mark.parametrize("form", ["plain", "hopper"])
def test_weights_stay_in_the_range_of_half_precision(form, size, request, monkeypatch):
    """Latents, and so their scales, of any size: some rows far larger than others, and one zero."""
    if form == "hopper":
        request.getfixturevalue("hopper")
    q_c, q_r = inputs(1, 1, 40, 3, d_h=64, d_r=16, d_c=64, dtype=torch.float16)[:2]
    c, r = normal(4, 1, 40, 64, dtype=torch.float64) * size, normal(5, 1, 40, 16)
    c[0, 3], c[0, 7], c[0, 8] = 0, c[0, 7] * 1e-4, c[0, 8] * 1e4
    n_c, n_r, scales = quantise(c, r)
    tensors, positions = [q_c, q_r, packed(n_c, n_r), scales], torch.tensor([[39]], device=DEVICE)
    scale = 0.02 / max(size, 1) * 1e-4
    expected = averages(*tensors, positions, scale)
    got = decode_six_bit(q_c.float(), q_r.float(), *tensors[2:], positions, scale)
    close(got, expected, 3e-6)                               # exponents to 100: 2^-18 in a weight
    if form == "hopper":
        monkeypatch.setattr(KERNEL, "combine", lambda o, lse, dtype: combine(o, lse, F32))
        close(decode_six_bit(*tensors, positions, scale, splits=2), expected, 1e-3)


@pytest.mark.parametrize("n_h", [1, 16, 17, 40])
@pytest.mark.parametrize("BH", [16, 32])
def test_any_number_of_heads(n_h, BH):
    tensors = inputs(2, 2, 37, n_h, d_h=40)[:4]
    positions = torch.tensor([[35, 36], [3, 4]], device=DEVICE)
    got = decode_six_bit(*tensors, positions, 0.02, tile=Tile(BH, 32, 4, 1, 1))
    close(got, averages(*tensors, positions, 0.02))


def ragged(T: int = 1) -> tuple[list[Tensor], Tensor]:
    """Sequences of 0, 1, 31, 32, 70 and 33 keys; behind them any words, and scales of NaN."""
    tensors = inputs(6, T, 70, 3, d_h=40)[:4]
    positions = torch.tensor([-1, 0, 30, 31, 69, 32], device=DEVICE)[:, None]
    positions = (positions + torch.arange(1 - T, 1, device=DEVICE)).clamp(min=-1)
    for b, last in enumerate(positions[:, -1].tolist()):
        tensors[3][b, last + 1 :] = torch.nan
    return tensors, positions


@pytest.mark.parametrize("splits", [None, 1, 2, 5])
@pytest.mark.parametrize("T", [1, 3])
def test_ragged_and_empty_sequences_in_any_number_of_pieces(splits, T):
    tensors, positions = ragged(T)
    got = decode_six_bit(*tensors, positions, 0.02, splits=splits)
    close(got, averages(*tensors, positions, 0.02))
    assert (got[0] == 0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_pages_in_any_order(splits):
    page, lengths = 64, [0, 1, 63, 64, 65, 187]
    q_c, q_r, words, scales = inputs(6, 1, 3 * page, 3, d_h=40)[:4]
    positions = torch.tensor(lengths, device=DEVICE)[:, None] - 1
    pools = [torch.full((20, page, words.shape[-1]), 12345, dtype=torch.int16, device=DEVICE),
             torch.full((20, page, 2), torch.nan, dtype=torch.bfloat16, device=DEVICE)]
    table = torch.full((6, 3), 19, dtype=torch.int32, device=DEVICE)
    free = iter(torch.randperm(19, generator=torch.Generator().manual_seed(3)).tolist())
    for b, length in enumerate(lengths):
        for p in range(-(-length // page)):
            table[b, p] = slot = next(free)
            here = slice(p * page, min((p + 1) * page, length))
            for pool, part in zip(pools, (words, scales)):
                pool[slot, : here.stop - here.start] = part[b, here]
    got = decode_six_bit(q_c, q_r, *pools, positions, 0.02, table, splits)
    close(got, averages(q_c, q_r, words, scales, positions, 0.02))


@pytest.mark.parametrize("d_c, d_r, room", [(64, 16, 41), (40, 10, 44), (128, 16, 50)])
def test_views_of_a_cache(d_c, d_r, room):
    """As the model calls it, layer 1 of 2; strides that are and are not multiples of 16 bytes."""
    q_c, q_r, _, _, W_UK, W_UV = inputs(3, 2, 1, d_r=d_r, d_c=d_c)
    cache = SixBitCache(2, 3, room, d_c, d_r, device=DEVICE)
    cache.scales.fill_(torch.nan)
    cache.write(1, normal(8, 3, 40, d_c), normal(9, 3, 40, d_r))
    words, scales = cache.rows(1)
    tensors = [q_c.mT.contiguous().mT, q_r, words, scales, W_UK, W_UV]
    close(attend_six_bit(*tensors, 0.1), twin(tensors, 0.1))
    tensors[2:4] = words.mT.contiguous().mT, scales.mT.contiguous().mT
    close(attend_six_bit(*tensors, 0.1), twin(tensors, 0.1))


def test_positions_as_the_twin_takes_them():
    tensors = inputs(2, 3, 20)
    for positions in (torch.tensor([[4, 5, 6], [17, 18, 19]]), torch.tensor([[9, 2, 15]])):
        positions = positions.to(DEVICE)
        close(attend_six_bit(*tensors, 0.03, positions), twin(tensors, 0.03, positions))


def test_large_scores_do_not_overflow():
    tensors = inputs(1, 1, 70, d_h=40)[:4]
    positions = torch.tensor([[69]], device=DEVICE)
    for splits in (1, 3):
        got = decode_six_bit(tensors[0] * 100, tensors[1], *tensors[2:], positions, 1.0,
                             splits=splits)
        close(got, averages(tensors[0] * 100, tensors[1], *tensors[2:], positions, 1.0), 1e-5)


def test_tiles():
    assert tile_for(16, torch.bfloat16, "sm_90").blocks == 2
    assert tile_for(128, torch.bfloat16, "sm_90").BH == 32
    for target in ("sm_90", "sm_80", "consumer", "gfx942", "cpu"):
        for dtype in (torch.bfloat16, F32):
            for n in (1, 16, 33, 128):
                assert 64 % tile_for(n, dtype, target).BN == 0               # divides a page


def test_refusals():
    q_c, q_r, words, scales, W_UK, W_UV = inputs(2, 1, 20, d_h=40)
    positions = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    refused(lambda: decode_six_bit(q_c.double(), q_r, words, scales, positions, 1.0), "float64")
    refused(lambda: decode_six_bit(q_c, q_r, words.int(), scales, positions, 1.0), "int16")
    refused(lambda: decode_six_bit(q_c, q_r, words[..., :9], scales, positions, 1.0), 9, 21)
    refused(lambda: decode_six_bit(q_c, q_r, words, scales.float(), positions, 1.0), "bfloat16")
    refused(lambda: decode_six_bit(q_c, q_r, words, scales[:, :3], positions, 1.0), "(2, 3, 2)")
    refused(lambda: decode_six_bit(q_c, q_r, words, scales, positions, 1.0, table), "page", 20)
    refused(lambda: attend_six_bit(q_c.requires_grad_(), q_r, words, scales, W_UK, W_UV, 1.0),
            "attend_six_bit", "gradient")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_what_needs_a_card_is_refused(monkeypatch):
    tensors = inputs(2, 1, 20, d_h=40)
    half = [x.bfloat16() if x.dtype == F32 else x for x in tensors]
    refused(lambda: attend_six_bit(*half, 1.0), "q_c", "bfloat16 on cpu")
    monkeypatch.setattr(KERNEL, "six_bit_kernel", object.__new__(triton.JITFunction))
    refused(lambda: attend_six_bit(*tensors, 1.0), "q_c: on cpu", "TRITON_INTERPRET=1")


def test_bits_lent_are_those_of_the_cache(monkeypatch):
    """The one number that is written down twice."""
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args[21])

    monkeypatch.setattr(KERNEL, "six_bit_kernel", Recorder())
    for d_c, d_r in SIZES:
        decode_six_bit(*inputs(1, 1, 3, 2, d_h=d_c, d_r=d_r, d_c=d_c)[:4],
                       torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1.0, splits=1)
    assert seen == [lent_bits(*sizes) for sizes in SIZES]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("n_h, B, S", [(16, 3, 4097), (16, 1, 30_000), (128, 2, 1030)])
def test_real_sizes_in_bf16(n_h, B, S):
    tensors = inputs(B, 1, S, n_h, 128, 64, 128, 512, torch.bfloat16)
    tensors[4] *= 512**-0.5
    tensors[5] *= 512**-0.5
    close(attend_six_bit(*tensors, 192**-0.5), twin(tensors, 192**-0.5), 5e-3)

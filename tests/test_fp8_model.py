# SPDX-License-Identifier: MIT
"""FP8 in files and in a whole model: what is quantised, what it weighs, what is refused."""

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import loops
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsv2_ref import checkpoint
from dsv2_ref.config import LITE, TINY, Config
from dsv2_ref.config_json import FP8
from dsv2_ref.inference.fp8_model import quantise_model, stored_bytes
from dsv2_ref.inference.generate import generate
from dsv2_ref.kernels.fp8 import Fp8Linear, Fp8Stack, dequantise, quantise
from dsv2_ref.model import DeepSeekV2

# no dimension fits 128; kv_a has 157 rows and kv_b 3·(70 + 45), cut into blocks across heads
ODD = TINY.with_(vocab=131, d=136, n_h=3, d_h=70, d_r=6, d_v=45, d_c=151, d_cq=130, dense_width=150,
                 expert_width=50, n_shared=3, tie_embeddings=False)
TOKENS = torch.arange(24).view(2, 12)


def model(config: Config = ODD, seed: int = 1, dtype: torch.dtype = torch.float32) -> DeepSeekV2:
    return loops.randomize(DeepSeekV2(config), seed).to(dtype).eval()


def published(m: DeepSeekV2) -> dict[str, Tensor]:
    return {entry.name: entry.read() for entry in checkpoint.published_entries(m)}


def files(path: Path) -> dict[str, Tensor]:
    return {name: t for f in path.glob("*.safetensors") for name, t in load_file(f).items()}


def refused(act: Callable[[], object], *words: object) -> None:
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(model(), tmp_path / "m", fp8=True)
    return tmp_path / "m"


def change(path: Path, **tensors: Tensor | None) -> None:
    """Replace or (None) remove tensors of a saved model, names with __ for dots."""
    whole = load_file(path / "model.safetensors")
    for name, t in tensors.items():
        name = name.replace("__", ".")
        whole.pop(name) if t is None else whole.update({name: t})
    save_file(whole, path / "model.safetensors")


# ---- files

def test_names_shapes_and_dtypes_are_v3s(saved: Path) -> None:
    tensors, c = files(saved), ODD
    prefix = "model.layers.1.self_attn."
    for name, shape in ((prefix + "kv_b_proj", (3 * 115, 151)), (prefix + "o_proj", (136, 135)),
                        (prefix + "kv_a_proj_with_mqa", (157, 136)),
                        (prefix + "q_a_proj", (130, 136)), (prefix + "q_b_proj", (228, 130)),
                        ("model.layers.0.mlp.down_proj", (136, 150)),
                        ("model.layers.2.mlp.experts.7.gate_proj", (50, 136)),
                        ("model.layers.2.mlp.shared_experts.up_proj", (150, 136))):
        codes, scale = tensors[name + ".weight"], tensors[name + ".weight_scale_inv"]
        assert codes.dtype == torch.float8_e4m3fn and tuple(codes.shape) == shape
        blocks = tuple(math.ceil(n / 128) for n in shape)
        assert scale.dtype == torch.float32 and tuple(scale.shape) == blocks
    for name, t in tensors.items():                      # everything else is as it was
        if not name.endswith("_scale_inv"):
            in_fp8 = t.dtype == torch.float8_e4m3fn
            assert in_fp8 == (name + "_scale_inv" in tensors) == ("_proj" in name), name
            if not in_fp8:
                assert torch.equal(t, published(model())[name]), name
    assert {"model.layers.1.mlp.gate.weight", "model.layers.0.input_layernorm.weight",
            "model.embed_tokens.weight", "lm_head.weight"} <= tensors.keys()
    assert len(tensors) == len(published(model())) + sum("_proj" in n for n in published(model()))
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic"}
    assert config["torch_dtype"] == "float32" and Config.from_hf(saved) == c


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("changes", [{}, dict(d_cq=None, tie_embeddings=True)])
def test_loaded_is_dequantised(tmp_path, dtype, shard_bytes, changes) -> None:
    """Blocks are those of the published rows: per head [W_UK ; W_UV], not ours."""
    m = model(ODD.with_(**changes), dtype=dtype)
    checkpoint.save(m, tmp_path / "m", shard_bytes=shard_bytes, fp8=True)
    back = checkpoint.load(tmp_path / "m")
    assert back.config == m.config and not back.training
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1 or shard_bytes == 10**9
    expected, got = published(m), published(back)
    assert expected.keys() == got.keys()
    for name, W in expected.items():
        if "_proj" in name:
            W = dequantise(*quantise(W)).to(dtype)
        assert torch.equal(got[name], W), name
    assert len(back(TOKENS)) == 2


def test_a_second_save_changes_no_bit(saved: Path, tmp_path) -> None:
    checkpoint.save(checkpoint.load(saved), tmp_path / "again", fp8=True)
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_dtype_asked_for_is_rounded_once(saved: Path) -> None:
    exact, half = checkpoint.load(saved), checkpoint.load(saved, dtype=torch.bfloat16)
    for a, b in zip(exact.parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("shard_bytes", [60_000, 20_000, 1])
def test_shards_hold_what_the_index_says(tmp_path, shard_bytes) -> None:
    checkpoint.save(model(), tmp_path / "m", shard_bytes=shard_bytes, fp8=True)
    index = json.loads((tmp_path / "m" / checkpoint.INDEX).read_text())
    total = 0
    for file in (tmp_path / "m").glob("*.safetensors"):
        tensors = load_file(file)
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(tensors)
        nbytes = sum(t.nbytes for t in tensors.values())
        weights = [n for n in tensors if not n.endswith("_scale_inv")]
        assert nbytes <= shard_bytes or len(weights) == 1
        total += nbytes
    assert total == index["metadata"]["total_size"]


def test_scales_may_lie_in_another_file(saved: Path) -> None:
    """As sharding by others may have it."""
    expected = published(checkpoint.load(saved))
    whole = load_file(saved / "model.safetensors")
    parts = {"a.safetensors": {n: t for n, t in whole.items() if n.endswith("_scale_inv")},
             "b.safetensors": {n: t for n, t in whole.items() if not n.endswith("_scale_inv")}}
    for file, tensors in parts.items():
        save_file(tensors, saved / file)
    (saved / "model.safetensors").unlink()
    where = {name: file for file, tensors in parts.items() for name in tensors}
    (saved / checkpoint.INDEX).write_text(json.dumps({"weight_map": where}))
    got = published(checkpoint.load(saved))
    assert all(torch.equal(got[name], W) for name, W in expected.items())


K = "model__layers__1__self_attn__kv_b_proj__weight"
GATE = "model__layers__1__mlp__gate__weight"


@pytest.mark.parametrize("changes, words", [
    ({K + "_scale_inv": None}, [K + "_scale_inv", "missing"]),
    ({K: None}, [K, "missing"]),
    ({K + "_scale_inv": torch.ones(2, 3)}, [K + "_scale_inv", "(2, 3)", "expected (3, 2)"]),
    ({K + "_scale_inv": torch.ones(6)}, [K + "_scale_inv", "(6,)", "expected (3, 2)"]),
    ({K + "_scale_inv": torch.ones(3, 2).bfloat16()}, [K + "_scale_inv", "bfloat16", "float32"]),
    ({K + "_scale_inv": torch.full((3, 2), math.nan)}, [K + ":", "NaN"]),
    ({K: torch.zeros(345, 151)}, [K, "float32", "expected torch.float8_e4m3fn"]),
    ({K: torch.zeros(345, 151).to(torch.float8_e5m2)}, [K, "e5m2", "expected torch.float8_e4m3fn"]),
    ({K: torch.zeros(151, 345).to(torch.float8_e4m3fn)}, [K, "(151, 345)", "expected (345, 151)"]),
    ({GATE + "_scale_inv": torch.ones(1, 2)}, [GATE + "_scale_inv", "not part of the model"]),
    ({GATE: torch.zeros(8, 136).to(torch.float8_e4m3fn)}, [GATE, "float8", "16-bit floats"]),
    ({"x__weight_scale_inv": torch.ones(1, 2)}, ["x.weight_scale_inv", "not part of the model"]),
])
def test_wrong_scales_and_codes_are_named(saved: Path, changes, words) -> None:
    change(saved, **changes)
    refused(lambda: checkpoint.load(saved), *(word.replace("__", ".") for word in words))


def test_the_config_and_the_tensors_must_agree(saved: Path, tmp_path) -> None:
    content = json.loads((saved / "config.json").read_text())
    for none in (content | {"quantization_config": None},
                 {k: v for k, v in content.items() if k != "quantization_config"}):
        (saved / "config.json").write_text(json.dumps(none))
        refused(lambda: checkpoint.load(saved), "_scale_inv", "not part of the model")
    checkpoint.save(model(), tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "kept.json")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(content))
    refused(lambda: checkpoint.load(tmp_path / "plain"), "_scale_inv", "missing")


@pytest.mark.parametrize("changes", [
    dict(quant_method="gptq"), dict(fmt="e5m2"), dict(weight_block_size=[64, 64]),
    dict(weight_block_size=None), dict(activation_scheme="static"), dict(bits=8),
    dict(modules_to_not_convert=["lm_head"]),
])
def test_another_quantisation_is_refused(changes) -> None:
    quantization = {k: v for k, v in (FP8 | changes).items() if v is not None}
    content = TINY.to_hf() | {"quantization_config": quantization}
    refused(lambda: Config.from_hf(content), "quantization_config", "unknown key or value", FP8)
    assert Config.from_hf(TINY.to_hf() | {"quantization_config": dict(FP8)}) == TINY


@pytest.mark.parametrize("name", ["W_UV", "W_DKV"])
def test_a_model_with_nan_is_not_saved(tmp_path, name) -> None:
    m = model()
    with torch.no_grad():
        getattr(m.blocks[2].attention, name).weight[7, 3] = math.nan
    word = {"W_UV": "layers.2.self_attn.kv_b_proj", "W_DKV": "kv_a_proj_with_mqa"}[name]
    refused(lambda: checkpoint.save(m, tmp_path / "m", fp8=True), word, "NaN")
    assert not list(tmp_path.iterdir())


def test_the_file_is_half_of_bf16(tmp_path) -> None:
    m = model(ODD.with_(vocab=4, d=256, bos=0, eos=1), dtype=torch.bfloat16)
    sizes = {}
    for fp8 in (False, True):
        checkpoint.save(m, tmp_path / str(fp8), fp8=fp8)
        sizes[fp8] = (tmp_path / str(fp8) / "model.safetensors").stat().st_size
    assert 0.5 < sizes[True] / sizes[False] < 0.54


# ---- in memory

def dequantised(m: DeepSeekV2) -> DeepSeekV2:
    """Every linear and expert of a plain model rounded to FP8 and back, and frozen as FP8 is.

    Frozen, because torch multiplies other shapes where a weight wants a gradient, and the bits of
    a product depend on its shapes.
    """
    with torch.no_grad():
        for name, W in m.blocks.named_parameters():
            if W.ndim > 1 and "router" not in name:
                W.copy_(dequantise(*quantise(W)))
    return m.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1], torch.arange(120).view(4, 30)],
                         ids=["24", "1", "120"])
@pytest.mark.parametrize("changes", [{}, dict(d_cq=None), dict(d=144, expert_width=64)])
def test_the_quantised_model_is_the_dequantised_one(dtype, tokens, changes) -> None:
    """All forms of the experts and both of attention, to the last bit."""
    config = ODD.with_(**changes)
    plain = dequantised(model(config, dtype=dtype))
    small = quantise_model(model(config, dtype=dtype))
    with torch.no_grad():
        logits = small(tokens)
        assert logits.dtype == dtype and torch.equal(logits, plain(tokens))
        caches = [m.new_cache(len(tokens), 64) for m in (small, plain)]
        for chunk in (tokens[:, :-1], tokens[:, -1:]):
            if chunk.numel():
                assert torch.equal(small(chunk, caches[0]), plain(chunk, caches[1]))
    assert not torch.equal(logits, model(config, dtype=dtype)(tokens))
    assert small.losses(tokens, tokens).language == plain.losses(tokens, tokens).language


def test_few_tokens_dequantise_few_experts(monkeypatch) -> None:
    """One token needs its 3 of 8 experts; the loop takes expert 0 along."""
    small, read = quantise_model(model()), []
    get = Fp8Stack.__getitem__
    monkeypatch.setattr(Fp8Stack, "__getitem__", lambda self, e: read.append(e) or get(self, e))
    routing = small.losses(TOKENS[:1, :1], TOKENS[:1, 1:2], with_load=True).load
    assert len(routing) == 2
    expected = [e for load in routing
                for e in sorted({0, *load.routing.indices.flatten().tolist()}) for _ in range(3)]
    assert read == expected and len(read) <= 2 * 3 * 4


def test_a_weight_is_freed_before_the_next_is_quantised(monkeypatch) -> None:
    m, freed = model(), []
    first, init = weakref.ref(m.blocks[0].ffn.W_gate.weight), Fp8Stack.__init__

    def watched(self, W: Tensor) -> None:
        freed.append(first() is None)
        init(self, W)

    monkeypatch.setattr(Fp8Stack, "__init__", watched)
    quantise_model(m)
    assert freed == [True] * 6


def test_quantising_twice_is_quantising_once() -> None:
    once, twice = quantise_model(model()), quantise_model(quantise_model(model()))
    assert torch.equal(once(TOKENS), twice(TOKENS))
    assert stored_bytes(once) == stored_bytes(twice)


def test_generating_works_as_before() -> None:
    plain, small = dequantised(model()), quantise_model(model())
    assert generate(small, [[0, 5, 9]], 8) == generate(plain, [[0, 5, 9]], 8)


def test_what_is_quantised_and_what_is_left() -> None:
    m = quantise_model(model())
    assert not m.training
    for name, module in m.named_modules():
        assert not isinstance(module, torch.nn.Linear) or name == "head", name
    for name, p in m.named_parameters():
        if p.dtype != torch.float8_e4m3fn:
            words = ("norm", "router", "embedding", "head", "scale")
            assert p.dtype == torch.float32 and any(word in name for word in words), name
    kinds = [type(module) for module in m.modules()]
    assert kinds.count(Fp8Linear) == 3 * 8 + 3 + 2 * 3 and kinds.count(Fp8Stack) == 2 * 3


def test_memory_is_half_of_bf16() -> None:
    m = model(dtype=torch.bfloat16)
    before = stored_bytes(m)
    inside = sum(p.nbytes for n, p in m.blocks.named_parameters()
                 if p.ndim > 1 and "router" not in n)
    after = stored_bytes(quantise_model(m))
    assert before.keys() == {"bfloat16"}
    assert after["float8_e4m3fn"] == inside // 2
    assert after["bfloat16"] == before["bfloat16"] - inside
    assert 0 < after["float32"] < inside // 2 // 1000 * 4           # ragged: few numbers a block
    assert sum(after.values()) == sum({p.data_ptr(): p.nbytes for p in m.parameters()}.values())


def test_lite_would_weigh_51_percent() -> None:
    with torch.device("meta"):
        m = DeepSeekV2(LITE.with_(n_layers=2))
    scales = codes = rest = 0
    for name, p in m.named_parameters():
        if p.ndim > 1 and name.startswith("blocks") and "router" not in name:
            repeat = 26 if name.startswith("blocks.1") else 1
            codes += repeat * p.numel()
            scales += repeat * math.prod(p.shape[:-2]) * math.prod(-(-n // 128) for n in
                                                                  p.shape[-2:])
        else:
            rest += p.numel() * (26 if name.startswith("blocks.1") else 1)
    assert codes + rest == 15_706_484_224
    assert round((codes + 4 * scales + 2 * rest) / (2 * (codes + rest)), 3) == 0.514


def test_a_tied_matrix_is_counted_once() -> None:
    assert stored_bytes(model(TINY)) == {"float32": 4 * sum(p.numel() for p in
                                                           DeepSeekV2(TINY).parameters())}


def test_moves_and_casts_of_the_whole_model() -> None:
    m = quantise_model(model())
    logits = m(TOKENS)
    assert torch.equal(m.bfloat16().float()(TOKENS), dequantised_casts(model())(TOKENS))
    assert logits.dtype == torch.float32


def dequantised_casts(m: DeepSeekV2) -> DeepSeekV2:
    """What is not in FP8 went through bf16 and back; codes and scales did not."""
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.ndim > 1 and name.startswith("blocks") and "router" not in name:
                p.copy_(dequantise(*quantise(p)))
            else:
                p.copy_(p.bfloat16())
    return m.requires_grad_(False)


def test_a_quantised_model_is_saved_and_described(tmp_path) -> None:
    m = quantise_model(model(ODD.with_(d_h=128, d_v=128, d_c=256, d_cq=None, d_r=128)))
    checkpoint.save(m, tmp_path / "plain")
    back = checkpoint.load(tmp_path / "plain")
    assert torch.equal(back(TOKENS), m(TOKENS))
    # where blocks of ours and of the published rows are the same, the same codes are written
    checkpoint.save(m, tmp_path / "fp8", fp8=True)
    assert torch.equal(checkpoint.load(tmp_path / "fp8")(TOKENS), m(TOKENS))
    assert "float32" in m.describe()


def test_a_model_with_nan_is_refused_and_left_alone() -> None:
    m = model()
    with torch.no_grad():
        m.blocks[2].experts.W_down[1, 2, 3] = math.inf
    refused(lambda: quantise_model(m), "blocks.2.ffn.experts.W_down", "infinite")
    assert {type(x) for x in m.modules()}.isdisjoint({Fp8Linear, Fp8Stack})


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["bias", "hook", "code"])
def test_what_codes_and_scales_cannot_hold_is_refused(kind) -> None:
    """A bias or a layer's own code would be gone without a word."""
    m = model()
    attention = m.blocks[1].attention
    r, c = attention.W_O.weight.shape
    if kind == "hook":
        attention.W_O.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        attention.W_O = nn.Linear(c, r) if kind == "bias" else Twice(c, r, bias=False)
    refused(lambda: quantise_model(m), "blocks.1.attention.W_O", "its weight alone")
    assert {type(x) for x in m.modules()}.isdisjoint({Fp8Linear, Fp8Stack})


@pytest.mark.gpu
def test_the_quantised_model_on_a_gpu() -> None:
    plain = dequantised(model(dtype=torch.bfloat16)).cuda()
    small = quantise_model(model(dtype=torch.bfloat16)).cuda()
    with torch.no_grad():
        assert torch.equal(small(TOKENS.cuda()), plain(TOKENS.cuda()))


# ---- the measurement

def test_quality_is_measured() -> None:
    from dsv2_ref.bench import fp8_quality

    record = fp8_quality.run(quick=True)
    assert json.loads(json.dumps(record)) == record and record["torch"] == torch.__version__
    bf16 = record["variants"].pop("bf16")
    assert bf16["kl"] == 0 and bf16["same_experts"] == 1 and bf16["change_percent"] == 0
    assert len(record["variants"]) == 5
    for name, values in record["variants"].items():
        assert abs(values["change_percent"]) < 10 and 0 < values["kl"] < 0.1, name
        assert 0.8 < values["same_experts"] <= 1, name

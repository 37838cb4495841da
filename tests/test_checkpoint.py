# SPDX-License-Identifier: MIT
"""Checkpoints: the same logits and gradients as transformers, and files that survive accidents."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.config import TINY
from dsv2_ref.files import whole
from dsv2_ref.model import DeepSeekV2

B, T = 8, 29
# Published keys, so that no mapping of ours takes part in making the other side's model. No two
# dimensions of any tensor are equal; the ranks are even because transformers needs that.
COMPRESSED = dict(
    vocab_size=101, hidden_size=56, intermediate_size=58, num_hidden_layers=3,
    num_attention_heads=7, num_key_value_heads=7, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14, kv_lora_rank=20, q_lora_rank=22, first_k_dense_replace=1, n_shared_experts=3,
    n_routed_experts=12, num_experts_per_tok=5, moe_intermediate_size=18, n_group=4, topk_group=2,
    topk_method="group_limited_greedy", routed_scaling_factor=2.5, rms_norm_eps=1e-5,
    max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False, bos_token_id=0,
    eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 300.0},
)
PLAIN = COMPRESSED | dict(q_lora_rank=None)
GREEDY = dict(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)


def _yarn(mscale: float, mscale_all_dim: float, factor: float = 4.0) -> dict:
    return dict(rope_parameters={
        "rope_type": "yarn", "rope_theta": 300.0, "factor": factor, "beta_fast": 8.0,
        "beta_slow": 0.5, "original_max_position_embeddings": 16, "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    })


CONFIGS = {
    "compressed-limited": COMPRESSED,
    "compressed-greedy": COMPRESSED | GREEDY,
    "plain-limited": PLAIN,
    "plain-greedy": PLAIN | GREEDY,
    "compressed-limited-yarn": COMPRESSED | _yarn(0.707, 0.707),
    "plain-greedy-yarn": PLAIN | GREEDY | _yarn(0.707, 0.707, 40.0),
    "compressed-greedy-two-mscales": COMPRESSED | GREEDY | _yarn(0.9, 0.4),
    "plain-limited-two-mscales": PLAIN | _yarn(0.5, 1.1),
    "no-dense-layer": COMPRESSED | dict(first_k_dense_replace=0),
    "two-dense-layers": PLAIN | _yarn(1.0, 1.0) | dict(first_k_dense_replace=2),
    "tied": COMPRESSED | GREEDY | dict(tie_word_embeddings=True, initializer_range=0.1),
    "one-group-of-four": COMPRESSED | dict(topk_group=1, num_experts_per_tok=2),
    "scaled-sixteen-times": PLAIN | GREEDY | dict(routed_scaling_factor=16.0),
    "greedy-in-groups": PLAIN | GREEDY | dict(n_group=3, topk_group=2),
    "every-expert": COMPRESSED | dict(topk_group=4, num_experts_per_tok=12, n_shared_experts=1),
}


@pytest.fixture(scope="module")
def transformers() -> Iterator:
    """The library without its progress bars and advice."""
    library = pytest.importorskip("transformers")
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield library
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def _their_model(transformers, published: dict, seed: int = 0):
    """A random model of theirs, whose norms are not ones either."""
    torch.manual_seed(seed)
    model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**published)).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    return model


def _from_disk(transformers, path: Path):
    model = transformers.DeepseekV2ForCausalLM.from_pretrained(path).eval()
    model.set_experts_implementation("eager")
    return model


def _tokens(vocab: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def _far(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_transformers(transformers, tmp_path, name: str) -> None:
    published = CONFIGS[name]
    theirs = _their_model(transformers, published)
    # every third in several files, so that the index is read as well
    several = list(CONFIGS).index(name) % 3 == 0
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if several else {}))
    assert (tmp_path / checkpoint.INDEX).exists() == several
    ours = checkpoint.load(tmp_path)
    tokens = _tokens(published["vocab_size"])

    out = theirs(tokens, labels=tokens)
    logits = ours(tokens)
    assert out.logits.std() > 0.3, "logits too small to show a difference"
    assert _far(logits, out.logits) < 1e-5

    routers = {load.layer: load for load in ours.losses(tokens, tokens, with_load=True).load}
    assert set(routers) == set(range(published["first_k_dense_replace"], 3))
    for load in routers.values():
        assert (load.experts > 0).sum() >= 3 and load.routing.scores.std() > 0.01

    out.loss.backward()
    losses = ours.losses(tokens[:, :-1], tokens[:, 1:])
    losses.total.backward()
    assert abs(losses.language.item() - out.loss.item()) < 1e-5 * out.loss.item()
    expected = _their_gradients(theirs)
    got = _our_gradients(ours)
    assert set(got) == set(expected)
    for key, gradient in expected.items():
        if gradient.abs().max() == 0:        # an expert that got no token
            assert got[key].abs().max() == 0, key
        else:
            assert _far(got[key], gradient) < 1e-4, key


def _our_gradients(model: DeepSeekV2) -> dict[str, Tensor]:
    """Published name -> our gradient in the published layout."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for weight, source in zip(holder.parameters(), model.parameters(), strict=True):
            weight.copy_(source.grad)
    return {entry.name: entry.read() for entry in checkpoint.published_entries(holder)}


def _their_gradients(model) -> dict[str, Tensor]:
    """Published name -> their gradient; their stacked experts taken apart."""
    gradients = {}
    for name, weight in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, both in enumerate(weight.grad):
                gate, up = both.chunk(2)
                gradients[f"{stem}.{e}.gate_proj.weight"] = gate
                gradients[f"{stem}.{e}.up_proj.weight"] = up
        elif stem.endswith(".experts"):
            gradients |= {f"{stem}.{e}.{kind}.weight": g for e, g in enumerate(weight.grad)}
        else:
            gradients[name] = weight.grad
    return gradients


@pytest.mark.parametrize("name", ["compressed-limited-yarn", "plain-greedy", "tied"])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_transformers_loads_what_we_save(
    transformers, tmp_path, name: str, shard_bytes: int
) -> None:
    theirs = _their_model(transformers, CONFIGS[name], seed=3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load(tmp_path / "theirs")
    checkpoint.save(ours, tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / checkpoint.INDEX).exists() == (shard_bytes == 30_000)
    again = _from_disk(transformers, tmp_path / "ours")
    tokens = _tokens(CONFIGS[name]["vocab_size"])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
        assert torch.equal(checkpoint.load(tmp_path / "ours")(tokens), ours(tokens))
    written = _all_tensors(tmp_path / "ours")
    original = _all_tensors(tmp_path / "theirs")
    if ours.config.tie_embeddings:                       # which they store once
        original["lm_head.weight"] = original["model.embed_tokens.weight"]
    assert set(written) == set(original)
    assert all(torch.equal(written[key], original[key]) for key in original)


def test_presets_mean_the_same_to_transformers(transformers, tmp_path) -> None:
    """A model born here, with our config.json: every mechanism of V2, dropping and losses idle."""
    torch.manual_seed(0)
    ours = DeepSeekV2(TINY.with_(init_std=0.2)).eval()
    checkpoint.save(ours, tmp_path / "model")
    theirs = _from_disk(transformers, tmp_path / "model")
    tokens = _tokens(TINY.vocab)
    with torch.no_grad():
        assert _far(ours(tokens), theirs(tokens).logits) < 1e-5


def test_both_spellings_of_rope_give_one_model(transformers, tmp_path) -> None:
    theirs = _their_model(transformers, CONFIGS["plain-limited-two-mscales"])
    theirs.save_pretrained(tmp_path)
    newer = checkpoint.load(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert "rope_parameters" in config and "rope_scaling" not in config
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    file.write_text(json.dumps(config))
    older = checkpoint.load(tmp_path)
    assert older.config == newer.config and older.config.yarn_mscale == 0.5
    tokens = _tokens(101)
    assert torch.equal(older(tokens), newer(tokens))


def test_bf16_files_load_as_bf16_and_agree(transformers, tmp_path) -> None:
    theirs = _their_model(transformers, CONFIGS["compressed-limited-yarn"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    state = _all_tensors(tmp_path)
    for entry in checkpoint.published_entries(ours):
        assert torch.equal(entry.read(), state[entry.name])


# Everything below needs no transformers.

SMALL = TINY.with_(d=40, n_h=5, vocab=67, expert_width=18, dense_width=58, d_cq=22, d_c=20, d_v=14,
                   d_h=10, d_r=6)


def _model(**changes) -> DeepSeekV2:
    torch.manual_seed(0)
    return DeepSeekV2(SMALL.with_(**changes)).eval()


def _all_tensors(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _listing(path: Path) -> dict[str, bytes]:
    """Every file below `path`, hidden ones too, with its content."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_names_and_rows_of_the_published_layout() -> None:
    """Two heads by eye: per head [UQ; QR], [UK; UV], and [DKV; KR] below each other."""
    model = _model(n_h=2, tie_embeddings=False, n_layers=2)
    tensors = {e.name: e.read() for e in checkpoint.published_entries(model)}
    a, c = model.blocks[1].attention, model.config
    prefix = "model.layers.1.self_attn."
    rows = [a.W_UQ.weight[: c.d_h], a.W_QR.weight[: c.d_r],
            a.W_UQ.weight[c.d_h :], a.W_QR.weight[c.d_r :]]
    assert torch.equal(tensors[prefix + "q_b_proj.weight"], torch.cat(rows))
    rows = [a.W_UK.weight[: c.d_h], a.W_UV.weight[: c.d_v],
            a.W_UK.weight[c.d_h :], a.W_UV.weight[c.d_v :]]
    assert torch.equal(tensors[prefix + "kv_b_proj.weight"], torch.cat(rows))
    rows = [a.W_DKV.weight, a.W_KR.weight]
    assert torch.equal(tensors[prefix + "kv_a_proj_with_mqa.weight"], torch.cat(rows))
    expert = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(expert, model.blocks[1].experts.W_down[3])
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=False, d_cq=None)])
@pytest.mark.parametrize("shard_bytes", [10**9, 5_000])
def test_saved_and_loaded_is_bit_equal(
    tmp_path, dtype: torch.dtype, changes: dict, shard_bytes: int
) -> None:
    model = _model(**changes).to(dtype)
    checkpoint.save(model, tmp_path / "m", shard_bytes=shard_bytes)
    back = checkpoint.load(tmp_path / "m")
    assert back.config == model.config and not back.training
    assert (back.head.weight is back.embedding.weight) == model.config.tie_embeddings
    state = model.state_dict()
    assert set(back.state_dict()) == set(state)
    for name, weight in back.state_dict().items():
        assert weight.dtype == dtype and torch.equal(weight, state[name]), name
    assert all(p.requires_grad and not p.is_meta for p in back.parameters())
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(back(tokens), model(tokens))
    sizes = [f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors")]
    assert (len(sizes) > 3) == (shard_bytes == 5_000)


def test_shards_hold_what_the_index_says(tmp_path) -> None:
    checkpoint.save(_model(), tmp_path / "m", shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / checkpoint.INDEX).read_text())
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    total = 0
    for file in files:
        with safe_open(file, "pt") as reader:
            assert set(reader.keys()) == {n for n, f in index["weight_map"].items()
                                          if f == file.name}
            nbytes = sum(reader.get_tensor(name).nbytes for name in reader.keys())
        assert nbytes <= 20_000 or len(load_file(file)) == 1
        total += nbytes
    assert total == index["metadata"]["total_size"]
    assert {f.name for f in files} == set(index["weight_map"].values())


@pytest.mark.parametrize("stored, asked", [
    (torch.float32, torch.float64), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
])
def test_dtype_is_what_is_asked_for(tmp_path, stored: torch.dtype, asked: torch.dtype) -> None:
    model = _model().to(stored)
    checkpoint.save(model, tmp_path / "m")
    back = checkpoint.load(tmp_path / "m", dtype=asked, device="cpu")
    assert {p.dtype for p in back.parameters()} == {asked}
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(asked)), name


@pytest.mark.parametrize("asked", ["float64", "float32", "bfloat16", "float16"])
def test_a_dtype_may_be_named(saved: Path, asked: str) -> None:
    back = checkpoint.load(saved, asked)
    assert {p.dtype for p in back.parameters()} == {getattr(torch, asked)}


@pytest.mark.parametrize("dtype", ["cuda", "bf16", "int8", torch.int8, torch.complex64, "nn", 16])
def test_another_dtype_is_refused(saved: Path, dtype) -> None:
    refused(lambda: checkpoint.load(saved, dtype=dtype), f"dtype: {dtype!r}", "bfloat16")


@pytest.mark.parametrize("device", ["graphics", "cuda:99", "float32", torch.float32])
def test_another_device_is_refused(saved: Path, device) -> None:
    refused(lambda: checkpoint.load(saved, device=device), f"device: {device!r}", "expected")


def _save_mixed(path: Path, kinds: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """A bf16 model, some of whose tensors are of other dtypes; what is stored."""
    checkpoint.save(_model(init_std=0.5).bfloat16(), path)
    tensors = load_file(path / "model.safetensors")
    g = torch.Generator().manual_seed(3)
    for name, dtype in kinds.items():
        tensors[name] = torch.randn(tensors[name].shape, generator=g).to(dtype)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()       # tied
    save_file(tensors, path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("kinds, expected", [
    ({"norm": torch.float16}, torch.float32), ({"embed_tokens": torch.float16}, torch.float32),
    ({"norm": torch.float32}, torch.float32), ({"embed_tokens": torch.float64}, torch.float64),
    ({"norm": torch.bfloat16}, torch.bfloat16),
])
def test_files_of_several_dtypes_lose_nothing(tmp_path, kinds: dict, expected) -> None:
    """bf16 beside fp16: neither holds the other."""
    stored = _save_mixed(tmp_path / "m", {f"model.{k}.weight": v for k, v in kinds.items()})
    back = checkpoint.load(tmp_path / "m")
    assert {p.dtype for p in back.parameters()} == {expected}
    for entry in checkpoint.published_entries(back):
        assert torch.equal(entry.read(), stored[entry.name].to(expected)), entry.name


def test_a_model_of_several_dtypes_is_saved_exactly(tmp_path) -> None:
    model = _model(init_std=0.5).bfloat16()
    a = model.blocks[1].attention
    g = torch.Generator().manual_seed(3)
    for linear, dtype in ((a.W_UV, torch.float16), (a.W_O, torch.float32)):
        value = torch.randn(linear.weight.shape, generator=g).to(dtype)
        linear.weight = torch.nn.Parameter(value)
    for shard_bytes in (10**9, 20_000):
        path = tmp_path / str(shard_bytes)
        checkpoint.save(model, path, shard_bytes=shard_bytes)
        back = checkpoint.load(path).state_dict()
        assert all(torch.equal(back[n], w.float()) for n, w in model.state_dict().items())
        if shard_bytes == 20_000:
            index = json.loads((path / checkpoint.INDEX).read_text())
            tensors = _all_tensors(path)
            assert sum(t.nbytes for t in tensors.values()) == index["metadata"]["total_size"]


def test_numbers_outside_the_dtype_are_named(tmp_path) -> None:
    """bf16 reaches 3e38, fp16 65504; an infinity in the file stays one."""
    model = _model().bfloat16()
    with torch.no_grad():
        model.blocks[1].attention.W_UV.weight[3, 4] = 65504 * 1.1
        model.norm.weight[0] = torch.inf
    checkpoint.save(model, tmp_path / "m")
    refused(lambda: checkpoint.load(tmp_path / "m", "float16"),
            "layers.1.self_attn.kv_b_proj", "torch.float16", "torch.bfloat16")
    with torch.no_grad():
        model.blocks[1].attention.W_UV.weight[3, 4] = 60000
    checkpoint.save(model, tmp_path / "m", overwrite=True)
    assert checkpoint.load(tmp_path / "m", "float16").norm.weight[0] == torch.inf


def test_the_default_device_does_not_matter(saved: Path) -> None:
    expected = checkpoint.load(saved)
    torch.set_default_device("meta")
    try:
        back = checkpoint.load(saved)
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in back.parameters()} == {"cpu"}
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_a_tied_matrix_may_be_stored_twice(saved: Path) -> None:
    expected = checkpoint.load(saved)
    name = "model.embed_tokens.weight"
    _rewrite(saved, lambda t: t.update({"lm_head.weight": t[name].clone()}))
    back = checkpoint.load(saved)
    assert back.head.weight is back.embedding.weight
    assert torch.equal(back.head.weight, expected.head.weight)
    _rewrite(saved, lambda t: t["lm_head.weight"][5, 7].add_(1e-3))
    refused(lambda: checkpoint.load(saved), "lm_head.weight: differs", name, "tie_word_embeddings")
    _rewrite(saved, lambda t: t.update({"lm_head.weight": torch.zeros(3, 4)}))
    refused(lambda: checkpoint.load(saved), "lm_head.weight: shape (3, 4)", "(67, 40)")


def test_two_spellings_of_rope_in_one_file(transformers, tmp_path) -> None:
    """rope_parameters "default" beside rope_scaling "yarn": transformers takes the yarn."""
    _their_model(transformers, CONFIGS["plain-greedy-yarn"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    yarn = config["rope_parameters"]
    config |= {"rope_scaling": yarn, "rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 300.0}}
    file.write_text(json.dumps(config))
    theirs, ours = _from_disk(transformers, tmp_path), checkpoint.load(tmp_path)
    assert ours.config.yarn_factor == 40.0
    tokens = _tokens(101)
    with torch.no_grad():
        assert _far(ours(tokens), theirs(tokens).logits) < 1e-5


def test_ends_in_generation_config(transformers, tmp_path) -> None:
    theirs = _their_model(transformers, CONFIGS["plain-greedy"])
    theirs.generation_config.eos_token_id = [7, 9]
    theirs.save_pretrained(tmp_path)
    assert checkpoint.load(tmp_path).config.stops == (7, 9)


def test_further_files_are_written_beside_the_model(tmp_path) -> None:
    checkpoint.save(_model(), tmp_path / "m", files={"tokenizer.json": "{\"a\": \"ä\"}"})
    assert (tmp_path / "m" / "tokenizer.json").read_text(encoding="utf-8") == "{\"a\": \"ä\"}"
    checkpoint.load(tmp_path / "m")


# ---- what `load` refuses

Q = "model.layers.1.self_attn.q_b_proj.weight"


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoint.save(_model(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    checkpoint.save(_model(), tmp_path / "m", shard_bytes=20_000)
    return tmp_path / "m"


def _rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_tensor(saved: Path) -> None:
    _rewrite(saved, lambda t: t.pop(Q))
    refused(lambda: checkpoint.load(saved), Q, "missing", saved)


def test_extra_tensor(saved: Path) -> None:
    name = "model.layers.3.self_attn.q_b_proj.weight"
    _rewrite(saved, lambda t: t.update({name: torch.zeros(2)}))
    refused(lambda: checkpoint.load(saved), name, "not part of the model", "config.json")


def test_old_frequency_buffers_are_ignored(saved: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(saved, lambda t: t.update({name: torch.zeros(2)}))
    assert torch.equal(checkpoint.load(saved).norm.weight, torch.ones(SMALL.d))


def test_misshapen_tensor(saved: Path) -> None:
    _rewrite(saved, lambda t: t.update({Q: t[Q].mT.contiguous()}))
    refused(lambda: checkpoint.load(saved), Q, "shape (22, 80)", "expected (80, 22)",
             "model.safetensors")


def test_config_of_another_model(saved: Path) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 4}))
    refused(lambda: checkpoint.load(saved), "model.layers.3.", "missing")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
                                   torch.uint16, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("names", [["model.embed_tokens.weight"], [Q], []])
def test_quantised_weights(saved: Path, dtype: torch.dtype, names: list[str]) -> None:
    """Codes without their scales are not weights, be it one tensor or all of them."""
    _rewrite(saved, lambda t: t.update({n: t[n].to(dtype) for n in names or list(t)}))
    refused(lambda: checkpoint.load(saved), *names, str(dtype), "expected", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_truncated_file(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: checkpoint.load(saved), file, "damaged")


def test_missing_files(saved: Path, tmp_path) -> None:
    refused(lambda: checkpoint.load(tmp_path / "nowhere"), "nowhere", "no such file")
    (saved / "model.safetensors").unlink()
    refused(lambda: checkpoint.load(saved), saved / "model.safetensors", "no such file")
    (saved / "config.json").unlink()
    refused(lambda: checkpoint.load(saved), saved / "config.json", "no such file")


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refused(lambda: checkpoint.load(sharded), gone, "no such file")


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "null", '{"weight_map": 3}', '{"weight_map": ["a"]}', b"\xff\xfe{}",
])
def test_damaged_index(sharded: Path, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (sharded / checkpoint.INDEX).write_bytes(raw)
    refused(lambda: checkpoint.load(sharded), sharded / checkpoint.INDEX, "damaged")


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    file = sharded / checkpoint.INDEX
    index = json.loads(file.read_text())
    others = set(index["weight_map"].values()) - {index["weight_map"][Q]}
    index["weight_map"][Q] = min(others)
    file.write_text(json.dumps(index))
    refused(lambda: checkpoint.load(sharded), Q, min(others))


def test_index_without_a_tensor(sharded: Path) -> None:
    file = sharded / checkpoint.INDEX
    index = json.loads(file.read_text())
    del index["weight_map"][Q]
    file.write_text(json.dumps(index))
    refused(lambda: checkpoint.load(sharded), Q, "missing")


@pytest.mark.parametrize("changes, words", [
    (dict(scoring_func="sigmoid"), ["scoring_func", "'sigmoid'", "'softmax'"]),
    (dict(hidden_size=None), ["hidden_size", "missing"]),
    (dict(mystery=1), ["mystery", "unknown key"]),
    (dict(qk_rope_head_dim=7), ["d_r", "7", "even"]),
])
def test_bad_config(saved: Path, changes: dict, words: list[str]) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(lambda: checkpoint.load(saved), *words)


# ---- what `save` promises

def test_save_accepts_an_empty_directory_and_new_parents(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint.save(_model(), tmp_path / "empty")
    checkpoint.save(_model(), str(tmp_path / "new" / "deeper"))
    assert _listing(tmp_path / "empty") == _listing(tmp_path / "new" / "deeper")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new"]


def test_save_refuses_what_is_not_empty_and_replaces_when_told(saved: Path) -> None:
    before = _listing(saved.parent)
    refused(lambda: checkpoint.save(_model(), saved), saved, "not empty", "expected")
    assert _listing(saved.parent) == before
    for shard_bytes in (20_000, 50_000, 10**9):          # from one file to many and back
        other = _model(n_layers=2, init_std=shard_bytes / 10**9)
        checkpoint.save(other, saved, {"a.txt": "a"}, overwrite=True, shard_bytes=shard_bytes)
        assert torch.equal(checkpoint.load(saved).norm.weight, other.norm.weight)
        assert torch.equal(checkpoint.load(saved).head.weight, other.head.weight)
        assert (saved / checkpoint.INDEX).exists() == (saved / "model.safetensors").exists() ^ True
    checkpoint.save(other, saved, overwrite=True)
    assert set(_listing(saved)) == {"config.json", "model.safetensors", "manifest.json"}
    assert os.listdir(saved.parent) == [saved.name]


def test_the_place_is_known_before_the_work() -> None:
    refused(lambda: checkpoint.check_place(""), "path: ''", "expected")
    refused(lambda: checkpoint.save(_model(), "", overwrite=True), "path: ''", "expected")
    refused(lambda: checkpoint.check_place("x" * 300), "x" * 300, "cannot be read")


@pytest.mark.parametrize("there", [True, False])
def test_save_through_a_link(tmp_path, there: bool) -> None:
    """What the link leads to is replaced; the link stays."""
    if there:
        checkpoint.save(_model(), tmp_path / "far" / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "disk")
    other = _model(n_layers=2)
    checkpoint.save(other, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "far" / "disk").is_symlink()
    assert checkpoint.load(tmp_path / "far" / "disk").config == other.config
    assert sorted(os.listdir(tmp_path)) == ["far", "link"]
    assert os.listdir(tmp_path / "far") == ["disk"]


def test_save_onto_links_in_a_circle(tmp_path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(lambda: checkpoint.save(_model(), tmp_path / "a"), tmp_path / "a", "cannot be")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_save_onto_a_mount_point(saved: Path, monkeypatch) -> None:
    before = _listing(saved.parent)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == saved)
    refused(lambda: checkpoint.save(_model(), saved, overwrite=True), saved, "a mount point")
    monkeypatch.undo()

    def busy(self: Path, target: Path) -> None:         # a mount that `ismount` does not see
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    refused(lambda: checkpoint.save(_model(), saved, overwrite=True), saved, "resource busy")
    assert _listing(saved.parent) == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json",
                                  checkpoint.INDEX, "../up.txt", "a/b.txt"])
def test_further_files_do_not_take_the_models_names(tmp_path, name: str) -> None:
    refused(lambda: checkpoint.save(_model(), tmp_path / "m", {name: "x"}), "files", repr(name))
    assert not list(tmp_path.iterdir())


def test_a_saved_model_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch) -> None:
    flushed = []
    monkeypatch.setattr(whole, "flush", lambda path: flushed.append((path, path.exists())))
    checkpoint.save(_model(), tmp_path / "m", shard_bytes=20_000)
    assert {path.name for path, _ in flushed[:-2]} == set(os.listdir(tmp_path / "m"))
    assert flushed[-2][0].suffix == ".tmp" and flushed[-1][0] == tmp_path
    assert all(there for _, there in flushed)


def test_save_refuses_a_file_as_directory_or_parent(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(lambda: checkpoint.save(_model(), tmp_path / "file"), tmp_path / "file", "expected")
    refused(lambda: checkpoint.save(_model(), tmp_path / "file", overwrite=True), "expected")
    refused(lambda: checkpoint.save(_model(), tmp_path / "file" / "m"), tmp_path / "file" / "m",
             "cannot be written")
    refused(lambda: checkpoint.save(_model(), tmp_path / "file" / "m" / "n"), "cannot be written")
    assert _listing(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("accident", [RuntimeError("disk"), OSError("disk"), KeyboardInterrupt(),
                                      SafetensorError("disk is full")])
@pytest.mark.parametrize("at", ["first shard", "second shard", "config"])
def test_interrupted_save_leaves_what_was_there(
    saved: Path, monkeypatch, accident: BaseException, at: str
) -> None:
    before = _listing(saved.parent)
    calls = []

    def failing_save(tensors, file, **rest):
        calls.append(file)
        if at == "first shard" or (at == "second shard" and len(calls) == 2):
            Path(file).write_bytes(b"half a file")
            raise accident
        save_file(tensors, file, **rest)

    def failing_config(_):
        raise accident

    # what the disk says is told in one line, whoever heard it
    disk = OSError if at == "config" else OSError | SafetensorError
    kind = ValueError if isinstance(accident, disk) else type(accident)

    monkeypatch.setattr(checkpoint, "save_file", failing_save)
    if at == "config":
        monkeypatch.setattr(type(SMALL), "to_hf", failing_config)
    for path, overwrite in ((saved, True), (saved.parent / "new", False)):
        calls.clear()
        with pytest.raises(kind, match="disk|^$"):
            checkpoint.save(_model(), path, overwrite=overwrite, shard_bytes=20_000)
        assert calls
        assert _listing(saved.parent) == before
        assert os.listdir(saved.parent) == [saved.name]


def test_failed_exchange_puts_the_old_directory_back(saved: Path, monkeypatch) -> None:
    """The new directory is complete, the old one moved away, and the last rename fails."""
    before = _listing(saved.parent)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == saved and self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    refused(lambda: checkpoint.save(_model(n_layers=2), saved, overwrite=True), saved, "no")
    assert _listing(saved.parent) == before


KILLED = """
import os, sys
from pathlib import Path
from dsv2_ref import checkpoint

def dying_save(tensors, file, **_):
    Path(file).write_bytes(b"half a file")
    os._exit(7)

model = checkpoint.load(sys.argv[1])
checkpoint.save_file = dying_save
checkpoint.save(model, sys.argv[1], overwrite=True)
"""


def test_killed_save_leaves_what_was_there(saved: Path) -> None:
    """A process that dies in the middle cannot tidy up, but the model itself is untouched."""
    before = _listing(saved)
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved)], timeout=120)
    assert done.returncode == 7
    assert _listing(saved) == before
    checkpoint.save(_model(), saved, overwrite=True)
    assert _listing(saved) == before


def test_nothing_is_unpickled() -> None:
    package = Path(checkpoint.__file__).parent
    for file in package.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        for word in ("torch.load(", "import pickle", "from pickle", "trust_remote_code=True"):
            assert word not in source, f"{word} in {file.relative_to(package)}"

# SPDX-License-Identifier: MIT
"""Config: the published config.json in and out, and a clear refusal of everything else."""

import copy
import dataclasses
import json

import pytest
from refusals import refused

from dsv2_ref.config import LITE, PRESETS, TINY, V2, Config

# The two published files, written out from the paper's tables and the released settings.
PUBLISHED = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_layer_freq": 1, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 102400,
}
PUBLISHED_V2 = PUBLISHED | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy",
}
PUBLISHED_LITE = PUBLISHED | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "topk_group": 1, "topk_method": "greedy",
}


def test_published_v2_is_the_preset() -> None:
    # what the paper trained with and the released file does not say, or says otherwise
    training = dict(alpha_expert=0.001, alpha_device=0.0, alpha_comm=0.0, drop_capacity=None,
                    init_std=0.02)
    assert Config.from_hf(PUBLISHED_V2) == V2.with_(**training)


def test_published_lite_is_the_preset() -> None:
    config = Config.from_hf(PUBLISHED_LITE)
    assert config == LITE.with_(init_std=0.02)
    assert config.d_cq is None and config.max_devices is None


def test_presets_are_the_papers_table() -> None:
    sizes = "n_layers d n_h d_h d_r d_v d_c d_cq dense_width n_shared n_routed top_k expert_width"
    of = {name: tuple(getattr(PRESETS[name], f) for f in sizes.split()) for name in PRESETS}
    assert of["v2"] == (60, 5120, 128, 128, 64, 128, 512, 1536, 12288, 2, 160, 6, 1536)
    assert of["lite"] == (27, 2048, 16, 128, 64, 128, 512, None, 10944, 2, 64, 6, 1408)
    assert (V2.n_devices, V2.max_devices, V2.reach) == (8, 3, 3)
    assert (LITE.n_devices, LITE.max_devices, LITE.reach) == (1, None, 1)
    assert (V2.alpha_expert, V2.alpha_device, V2.alpha_comm) == (0.003, 0.05, 0.02)
    assert (LITE.alpha_expert, LITE.alpha_device, LITE.alpha_comm) == (0.001, 0.0, 0.0)
    assert (V2.routed_scaling_factor, LITE.routed_scaling_factor) == (16.0, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_presets(name: str) -> None:
    config = PRESETS[name]
    assert Config.from_hf(config.to_hf()) == config
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_every_field_survives_the_round_trip() -> None:
    """Each field changed to a value that is not the default, one at a time."""
    base = TINY.with_(yarn_factor=4.0, yarn_mscale=0.5, yarn_mscale_all_dim=0.6)
    changes = dict(
        vocab=513, d=68, n_layers=5, n_h=5, d_h=18, d_r=10, d_v=14, d_c=34, d_cq=None, n_dense=2,
        dense_width=99, n_shared=3, n_routed=12, top_k=2, expert_width=7, n_devices=2,
        max_devices=None, routed_scaling_factor=2.5, alpha_expert=0.5, alpha_device=0.6,
        alpha_comm=0.7, drop_capacity=1.5, norm_eps=1e-5, rope_theta=5e5, yarn_factor=8.0,
        yarn_original_positions=77, yarn_beta_fast=16.0, yarn_beta_slow=2.0, yarn_mscale=0.9,
        yarn_mscale_all_dim=None, max_positions=333, init_std=0.1, tie_embeddings=False, bos=5,
        eos=6, trained_positions=99,
    )
    assert set(changes) == {f.name for f in dataclasses.fields(Config)}
    for name, value in changes.items():
        of = TINY if name == "trained_positions" else base    # YaRN says it in its own way
        config = of.with_(**{name: value})
        assert getattr(config, name) == value != getattr(base, name)
        assert Config.from_hf(config.to_hf()) == config, name


def test_newer_spelling_of_rope() -> None:
    for published in (PUBLISHED_V2, PUBLISHED_LITE):
        newer = dict(published)
        scaling = newer.pop("rope_scaling") | {"rope_theta": newer.pop("rope_theta")}
        scaling["rope_type"] = scaling.pop("type")
        assert Config.from_hf(newer | {"rope_parameters": scaling}) == Config.from_hf(published)
    plain = {k: v for k, v in PUBLISHED_LITE.items() if k not in ("rope_scaling", "rope_theta")}
    config = Config.from_hf(plain | {"rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 5e5}})
    assert config.yarn_factor is None and config.rope_theta == 5e5


def test_rope_is_read_as_transformers_reads_it() -> None:
    """rope_scaling before rope_parameters; the theta inside before the one outside; null is none"""
    yarn = {"type": "yarn", "factor": 4, "truncate": True, "attention_factor": None}
    base = PUBLISHED_LITE | {"rope_scaling": None, "rope_theta": 7e3}

    def read(**keys) -> tuple[float, float | None]:
        config = Config.from_hf(base | keys)
        return config.rope_theta, config.yarn_factor

    default = {"rope_type": "default", "rope_theta": 5e5}
    assert read(rope_parameters=default) == (5e5, None)
    assert read(rope_parameters=default, rope_scaling={}) == (5e5, None)
    assert read(rope_parameters=default, rope_scaling=yarn) == (7e3, 4.0)
    assert read(rope_scaling=yarn | {"rope_theta": 9e3}) == (9e3, 4.0)
    assert read(rope_parameters=yarn, rope_theta=None) == (1e4, 4.0)
    assert read(rope_parameters={"rope_theta": 3e3}) == (3e3, None)


def test_absent_keys_have_the_formats_defaults() -> None:
    defaults = dict(
        q_lora_rank=1536, first_k_dense_replace=0, rms_norm_eps=1e-6, initializer_range=0.02,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        routed_scaling_factor=1.0,
    )
    for key, value in defaults.items():
        base = PUBLISHED_LITE | {"rope_scaling": None}
        absent = {k: v for k, v in base.items() if k != key}
        assert Config.from_hf(absent) == Config.from_hf(base | {key: value}), key


@pytest.mark.parametrize("published, ours, stops", [
    (5, 5, (5,)), (None, None, ()), ([5], (5,), (5,)), ([5, 0, 7], (5, 0, 7), (5, 0, 7)),
])
def test_ends_of_a_document(published, ours, stops) -> None:
    config = Config.from_hf(PUBLISHED_V2 | {"eos_token_id": published, "bos_token_id": None})
    assert config.eos == ours and config.stops == stops and config.bos is None
    assert config.to_hf()["eos_token_id"] == published and config.to_hf()["bos_token_id"] is None
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(Config.from_hf(config.to_hf()))


@pytest.mark.parametrize("content, eos", [
    ({"eos_token_id": [3, 4], "temperature": 0.7}, (3, 4)), ({"eos_token_id": None}, None),
    ({"temperature": 0.3}, 100001), ({"bos_token_id": 5}, 100001),
])
def test_ends_that_the_generation_config_names(tmp_path, content: dict, eos) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_LITE))
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    expected = LITE.with_(init_std=0.02, eos=eos)
    assert Config.from_hf(tmp_path) == Config.from_hf(tmp_path / "config.json") == expected
    (tmp_path / "generation_config.json").write_text("{")
    refused(lambda: Config.from_hf(tmp_path), "generation_config.json", "not valid JSON")


@pytest.mark.parametrize("foreign", [
    {"tokenizer_class": "LlamaTokenizerFast"}, {"is_decoder": True}, {"unsloth_fixed": True},
    {"unsloth_version": "2025.1"}, {"task_specific_params": {"a": 1}}, {"_commit_hash": "ab"},
    {"transformers.js_config": {}}, {"temperature": 0.3, "top_k": 50}, {"num_labels": 2},
    {"head_dim": 64, "qk_head_dim": 192, "num_experts": 64}, {"rope_parameters": None},
])
def test_foreign_keys_that_change_nothing(foreign: dict) -> None:
    assert Config.from_hf(PUBLISHED_LITE | foreign) == Config.from_hf(PUBLISHED_LITE)


def test_every_key_that_transformers_may_write_is_known() -> None:
    library = pytest.importorskip("transformers")
    base = library.PretrainedConfig().to_dict() | {"model_type": "deepseek_v2"}
    base |= library.GenerationConfig._get_default_generation_params()
    assert len(base) > 40
    assert Config.from_hf(base | PUBLISHED_V2) == Config.from_hf(PUBLISHED_V2)
    theirs = copy.deepcopy(PUBLISHED_V2) | {"torch_dtype": None}       # they write into it
    saved = library.DeepseekV2Config(**theirs).to_dict()
    assert Config.from_hf(saved).with_(alpha_expert=0.001) == Config.from_hf(PUBLISHED_V2)


def test_from_a_file_and_from_its_directory(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_LITE))
    assert Config.from_hf(tmp_path) == Config.from_hf(str(tmp_path / "config.json"))
    assert Config.from_hf(tmp_path) == Config.from_hf(PUBLISHED_LITE)


@pytest.mark.parametrize("content, words", [
    (None, ["no such file", "config.json"]),
    ("{", ["config.json", "not valid JSON"]),
    ("", ["config.json", "not valid JSON"]),
    (b"\xff\xfe\x00", ["config.json", "not valid JSON"]),
    ("[1, 2]", ["config.json", "list", "expected a JSON object"]),
    ("{}", ["vocab_size", "missing"]),
])
def test_bad_files(tmp_path, content: str | bytes | None, words: list[str]) -> None:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(raw)
    refused(lambda: Config.from_hf(tmp_path), *words)


@pytest.mark.parametrize("changes, words", [
    (dict(n_hash_layers=3), ["n_hash_layers", "unknown key"]),
    (dict(quantization_config={"bits": 4}), ["quantization_config", "unknown key"]),
    (dict(model_type="llama"), ["model_type", "'llama'", "'deepseek_v2'"]),
    (dict(hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
    (dict(attention_bias=True), ["attention_bias", "True", "False"]),
    (dict(attention_dropout=0.1), ["attention_dropout", "0.1", "0.0"]),
    (dict(scoring_func="sigmoid"), ["scoring_func", "'sigmoid'", "'softmax'"]),
    (dict(norm_topk_prob=True), ["norm_topk_prob", "True", "False"]),
    (dict(moe_layer_freq=2), ["moe_layer_freq", "2", "1"]),
    (dict(num_key_value_heads=8), ["num_key_value_heads", "8", "128"]),
    (dict(topk_method="noaux_tc"), ["topk_method", "'noaux_tc'", "group_limited_greedy"]),
    (dict(topk_method=None), ["topk_method: None", "greedy"]),
    (dict(topk_method=""), ["topk_method: ''", "greedy"]),
    (dict(n_group=None), ["topk_method", "n_group"]),
    (dict(topk_group=None), ["topk_method", "topk_group"]),
    (dict(hidden_size=None), ["hidden_size: missing", "null", "expected a value"]),
    (dict(n_routed_experts=None), ["n_routed_experts: missing", "null"]),
    (dict(rms_norm_eps=None), ["rms_norm_eps: missing", "null"]),
    (dict(hidden_size="5120"), ["'5120'", "int"]),
    (dict(hidden_size=5120.0), ["5120.0", "int"]),
    (dict(num_hidden_layers=True), ["True", "int"]),
    (dict(tie_word_embeddings=1), ["1", "bool"]),
    (dict(routed_scaling_factor="16"), ["routed_scaling_factor", "'16'", "float"]),
    (dict(eos_token_id="100001"), ["eos", "'100001'", "int"]),
    (dict(eos_token_id=[100001, 102400]), ["eos", "102400", "102400"]),
    (dict(eos_token_id=[100001, True]), ["eos", "True", "token id"]),
    (dict(eos_token_id=[]), ["eos", "()", "None"]),
    (dict(bos_token_id=[100000]), ["bos", "[100000]", "int"]),
    (dict(use_qk_norm=True), ["use_qk_norm", "unknown key"]),
    (dict(per_layer_config={}), ["per_layer_config", "unknown key"]),
    (dict(original_max_position_embeddings=9), ["original_max_position_embeddings", "unknown key"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5", "1.0"]),
    (dict(is_encoder_decoder=True), ["is_encoder_decoder", "True", "False"]),
    (dict(num_experts=64), ["num_experts: 64", "n_routed_experts = 160"]),
    (dict(qk_head_dim=128), ["qk_head_dim: 128", "192"]),
    (dict(topk_group=9), ["max_devices", "9", "8"]),
    (dict(n_group=7), ["n_devices", "7", "160"]),
    (dict(num_experts_per_tok=61), ["top_k", "61", "60"]),
    (dict(first_k_dense_replace=61), ["n_dense", "61", "60"]),
    (dict(qk_rope_head_dim=63), ["d_r", "63", "even"]),
    (dict(rope_scaling={"type": "linear", "factor": 4.0}), ["rope_scaling", "linear", "yarn"]),
    (dict(rope_scaling={"type": "yarn"}), ["rope_scaling", "factor"]),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0, "magic": 1}), ["magic", "unknown"]),
    (dict(rope_scaling={"type": "yarn", "factor": "4"}), ["yarn_factor", "'4'", "float"]),
    (dict(rope_scaling={"type": "yarn", "factor": 0.5}), ["yarn_factor", "0.5", ">= 1"]),
    (dict(rope_scaling={"factor": 4.0}), ["rope_scaling", "type"]),
    (dict(rope_scaling={"type": "yarn", "factor": None}), ["rope_scaling", "no factor"]),
    (dict(rope_scaling={"type": "yarn", "rope_type": "default", "factor": 4.0}),
     ["rope_scaling", "'yarn'", "'default'"]),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0, "truncate": False}), ["truncate", "False"]),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 1.0}),
     ["attention_factor", "unknown"]),
    (dict(rope_scaling={"type": "default", "partial_rotary_factor": 0.5}),
     ["partial_rotary_factor", "0.5"]),
    (dict(rope_theta=0), ["rope_theta: 0", "> 0"]),
    (dict(rope_scaling={"type": "default", "rope_theta": 0.0}), ["rope_theta: 0", "> 0"]),
    (dict(rope_theta=1), ["rope_theta: 1", "> 1"]),
    (dict(rope_theta=10**400), ["rope_theta: 1000", "finite"]),
    (dict(rope_scaling="yarn"), ["rope_scaling", "'yarn'"]),
    (dict(rope_scaling=4), ["rope_scaling", "4"]),
    (dict(rope_scaling={"type": ["yarn"], "factor": 4.0}), ["rope_scaling", "yarn"]),
    (dict(rope_theta="ten thousand"), ["rope_theta", "ten thousand"]),
    (dict(rope_theta=[1e4]), ["rope_theta", "10000.0"]),
    (dict(rope_theta=-1.0), ["rope_theta", "-1.0", "> 0"]),
    (dict(rope_theta=float("nan")), ["rope_theta", "nan"]),
])
def test_refuses_published_files_it_cannot_honour(changes: dict, words: list[str]) -> None:
    refused(lambda: Config.from_hf(PUBLISHED_V2 | changes), *words)


@pytest.mark.parametrize("changes, words", [
    (dict(vocab=0), ["vocab: 0", "positive"]),
    (dict(d=-4), ["d: -4", "positive"]),
    (dict(d=64.0), ["d: 64.0", "int"]),
    (dict(n_layers=True), ["n_layers: True", "int"]),
    (dict(d_cq=0), ["d_cq: 0", "positive", "None"]),
    (dict(d_r=7), ["d_r: 7", "even"]),
    (dict(n_dense=4), ["n_dense: 4", "0 to 3"]),
    (dict(n_dense=-1), ["n_dense: -1", "0 to 3"]),
    (dict(n_devices=3), ["n_devices: 3", "divisor", "8"]),
    (dict(max_devices=0), ["max_devices: 0", "1 to"]),
    (dict(max_devices=5), ["max_devices: 5", "4"]),
    (dict(top_k=5), ["top_k: 5", "at most 4"]),
    (dict(alpha_expert=-0.1), ["alpha_expert: -0.1", ">= 0"]),
    (dict(alpha_device=-0.1), ["alpha_device: -0.1", ">= 0"]),
    (dict(alpha_comm=float("nan")), ["alpha_comm: nan", ">= 0"]),
    (dict(drop_capacity=0.0), ["drop_capacity: 0.0", "> 0"]),
    (dict(routed_scaling_factor=0.0), ["routed_scaling_factor: 0.0", "> 0"]),
    (dict(norm_eps=0.0), ["norm_eps: 0.0", "> 0"]),
    (dict(yarn_factor=0.9), ["yarn_factor: 0.9", ">= 1"]),
    (dict(yarn_factor=4.0, yarn_beta_slow=0.0), ["yarn_beta_slow: 0.0", "> 0"]),
    (dict(yarn_factor=4.0, yarn_beta_fast=0.0), ["yarn_beta_fast: 0.0", "> 0"]),
    (dict(yarn_mscale=0.0), ["yarn_mscale: 0.0", "> 0"]),
    (dict(yarn_mscale_all_dim=-0.1), ["yarn_mscale_all_dim: -0.1", ">= 0"]),
    (dict(bos=512), ["bos: 512", "512"]),
    (dict(eos=-1), ["eos: -1", "512"]),
    (dict(tie_embeddings="yes"), ["tie_embeddings: 'yes'", "bool"]),
])
def test_refuses_contradictory_values(changes: dict, words: list[str]) -> None:
    refused(lambda: TINY.with_(**changes), *words)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), 10**400])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)
                                  if "float" in str(f.type)])
def test_no_number_is_infinite(name: str, value: float) -> None:
    refused(lambda: TINY.with_(**{name: value}), f"{name}: {value}", "expected")


def test_with_changes_a_copy_and_refuses_unknown_fields() -> None:
    assert TINY.with_(d=128).d == 128 and TINY.d == 64
    assert TINY.with_() == TINY
    refused(lambda: TINY.with_(hidden_size=128), "hidden_size", "no such field")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.d = 128


def test_which_layers_have_experts() -> None:
    assert [TINY.with_(n_dense=2).is_moe(i) for i in range(3)] == [False, False, True]
    assert TINY.with_(n_dense=3).is_moe(2) is False


def test_own_keys_say_what_other_programs_would_take_otherwise() -> None:
    """With greedy routing n_group limits the groups elsewhere; a length is what is read."""
    greedy = TINY.with_(max_devices=None)
    said = greedy.to_hf()
    assert (said["n_group"], said["topk_group"], said["n_devices"]) == (1, 1, 4)
    assert Config.from_hf(said) == greedy
    older = {k: v for k, v in said.items() if k != "n_devices"} | {"n_group": 4, "topk_group": 4}
    assert Config.from_hf(older) == greedy                   # as it was written before
    assert "n_devices" not in TINY.to_hf() | LITE.to_hf()
    short = TINY.with_(trained_positions=100)
    said = short.to_hf()
    assert (said["max_position_embeddings"], said["readable_positions"]) == (100, 512)
    assert "readable_positions" not in TINY.to_hf() | V2.to_hf()
    for bad in (TINY.to_hf() | {"n_devices": 2}, older | {"n_devices": 2}):
        refused(lambda bad=bad: Config.from_hf(bad), "n_devices: 2", "greedy")
    for bad in (0, 512, 513):
        refused(lambda bad=bad: TINY.with_(trained_positions=bad), f"trained_positions: {bad}")
    refused(lambda: V2.with_(trained_positions=4096), "trained_positions: 4096", "no YaRN")

# SPDX-License-Identifier: MIT
"""The published config.json <-> the fields of `Config`. Only this file knows the published keys.

A key is read as transformers 5 reads it, or refused in one line; none is replaced in silence.
Absent is not null: an absent key has the format's default (`_DEFAULTS`), and null says "none" where
there can be none (`_NULLABLE`).

Two of our fields have a key of ours, since other programs take the format's own for more than it
says here. They read a text as far as max_position_embeddings: where a model was trained at fewer
positions than it can read, that is the trained length, and readable_positions has ours. And with
greedy routing n_group means nothing, but some of them limit the groups by it: it is 1, and
n_devices has ours.

Keys that we do not use are of two kinds. Those that transformers' own base class, its generation
or a tool leaves in the file say nothing about the mathematics and are passed over. Any other may
mean a model that is computed differently (`use_qk_norm`, `index_topk`), so it is refused.
"""

from typing import Any

# ours -> published, where the meaning is the same
_KEYS = {
    "vocab": "vocab_size", "d": "hidden_size", "n_layers": "num_hidden_layers",
    "n_h": "num_attention_heads", "d_h": "qk_nope_head_dim", "d_r": "qk_rope_head_dim",
    "d_v": "v_head_dim", "d_c": "kv_lora_rank", "d_cq": "q_lora_rank",
    "n_dense": "first_k_dense_replace", "dense_width": "intermediate_size",
    "n_shared": "n_shared_experts", "n_routed": "n_routed_experts",
    "top_k": "num_experts_per_tok", "expert_width": "moe_intermediate_size",
    "n_devices": "n_group", "routed_scaling_factor": "routed_scaling_factor",
    "alpha_expert": "aux_loss_alpha", "alpha_device": "device_loss_alpha",
    "alpha_comm": "communication_loss_alpha", "drop_capacity": "drop_capacity",
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
    "init_std": "initializer_range", "tie_embeddings": "tie_word_embeddings",
    "bos": "bos_token_id", "eos": "eos_token_id",
}
# what an absent key means in the format; those that are not here are required
_DEFAULTS: dict[str, Any] = {
    "d_cq": 1536, "n_dense": 0, "n_devices": 1, "routed_scaling_factor": 1.0, "alpha_expert": 0.0,
    "alpha_device": 0.0, "alpha_comm": 0.0, "drop_capacity": None, "norm_eps": 1e-6,
    "max_positions": 2048, "trained_positions": None,
    "init_std": 0.02, "tie_embeddings": False, "bos": 1, "eos": 2,
}
_NULLABLE = {"d_cq": None, "n_devices": 1, "drop_capacity": None, "bos": None, "eos": None}
_YARN_KEYS = {
    "yarn_factor": "factor", "yarn_original_positions": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale", "yarn_mscale_all_dim": "mscale_all_dim",
}
# what this implementation takes for granted; any other value is refused, not ignored
_FIXED = {
    "model_type": "deepseek_v2", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "scoring_func": "softmax", "norm_topk_prob": False,
    "moe_layer_freq": 1,
}
# the same, for keys that we do not write
_NEUTRAL = {"is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {},
            "partial_rotary_factor": 1.0}
_NEUTRAL_ROPE = {"truncate": True, "partial_rotary_factor": 1.0}
# the only quantised files that are read and written, block-scaled FP8 as V3 published it
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
       "activation_scheme": "dynamic"}
# keys that say nothing about the mathematics: of the format, of transformers' base class (old
# releases too), of generation
_IGNORED = set(
    "architectures auto_map torch_dtype dtype transformers_version use_cache pretraining_tp "
    "ep_size pad_token_id seq_aux output_router_logits head_dim "
    "name_or_path return_dict output_attentions output_hidden_states chunk_size_feed_forward "
    "id2label label2id num_labels problem_type task_specific_params tokenizer_class "
    "processor_class is_decoder finetuning_task torchscript tf_legacy_loss use_bfloat16 prefix "
    "sep_token_id decoder_start_token_id cross_attention_hidden_size tie_encoder_decoder "
    "attn_implementation experts_implementation gradient_checkpointing tie_last_hidden_states "
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p "
    "typical_p".split()
)
_MARKS = ("_", "unsloth", "transformers.")          # how keys of tools begin


def to_published(values: dict[str, Any]) -> dict[str, Any]:
    """Our field values -> the content of a config.json; `from_published` gives them back."""
    hf = {theirs: values[ours] for ours, theirs in _KEYS.items()}
    if isinstance(values["eos"], tuple):
        hf["eos_token_id"] = list(values["eos"])
    if values["trained_positions"] is not None:
        hf |= {"max_position_embeddings": values["trained_positions"],
               "readable_positions": values["max_positions"]}
    greedy = values["max_devices"] is None
    if greedy and values["n_devices"] > 1:
        hf |= {"n_group": 1, "n_devices": values["n_devices"]}
    hf |= _FIXED | {
        "architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": values["n_h"],
        "topk_method": "greedy" if greedy else "group_limited_greedy",
        "topk_group": 1 if greedy else values["max_devices"], "seq_aux": True,
        "rope_theta": values["rope_theta"], "rope_scaling": None,
    }
    if values["yarn_factor"] is not None:
        scaling = {theirs: values[ours] for ours, theirs in _YARN_KEYS.items()}
        scaling = {key: value for key, value in scaling.items() if value is not None}
        hf["rope_scaling"] = {"type": "yarn", **scaling}
    return hf


def from_published(hf: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json -> our field values. ValueError names the key."""
    _check_keys(hf)
    values: dict[str, Any] = {}
    for ours, theirs in _KEYS.items():
        if theirs not in hf and ours in _DEFAULTS:
            values[ours] = _DEFAULTS[ours]
        elif hf.get(theirs) is not None:
            values[ours] = hf[theirs]
        elif theirs in hf and ours in _NULLABLE:
            values[ours] = _NULLABLE[ours]
        else:
            null = " (it is null)" if theirs in hf else ""
            raise ValueError(f"{theirs}: missing from config.json{null}, expected a value")
    if isinstance(values["eos"], list):
        values["eos"] = tuple(values["eos"])
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method: {method!r}, expected 'greedy' or 'group_limited_greedy'")
    if method == "group_limited_greedy":
        if hf.get("n_group") is None or hf.get("topk_group") is None:
            raise ValueError("topk_method: 'group_limited_greedy', expected n_group and topk_group")
        values["max_devices"] = hf["topk_group"]
    _read_our_keys(hf, values)
    return values | _rope(hf, values["max_positions"])


def _read_our_keys(hf: dict[str, Any], values: dict[str, Any]) -> None:
    if hf.get("readable_positions") is not None:
        values |= {"trained_positions": values["max_positions"],
                   "max_positions": hf["readable_positions"]}
    if hf.get("n_devices") is not None:
        if values["n_devices"] != 1 or "max_devices" in values:
            raise ValueError(f"n_devices: {hf['n_devices']!r}, expected none but with greedy "
                             "routing and n_group = 1")
        values["n_devices"] = hf["n_devices"]


def _check_keys(hf: dict[str, Any]) -> None:
    known = set(_KEYS.values()) | set(_FIXED) | set(_NEUTRAL) | _IGNORED | {
        "num_key_value_heads", "num_experts", "qk_head_dim", "topk_method", "topk_group",
        "rope_theta", "rope_scaling", "rope_parameters", "quantization_config",
        "n_devices", "readable_positions",
    }
    for key in hf:
        if key not in known and not key.startswith(_MARKS):
            raise ValueError(f"{key}: unknown key of a deepseek_v2 config.json, expected none that "
                             "may change the computation")
    for key, only in (_FIXED | _NEUTRAL).items():
        if hf.get(key) not in (only, None):
            raise ValueError(f"{key}: {hf[key]!r}, expected {only!r}, all that is implemented")
    if hf.get("quantization_config") not in (FP8, None):
        raise ValueError(f"quantization_config: {hf['quantization_config']!r}, unknown key or "
                         f"value, expected {FP8!r}")
    sizes = [hf.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    same = {"num_key_value_heads": (hf.get("num_attention_heads"), "num_attention_heads"),
            "num_experts": (hf.get("n_routed_experts"), "n_routed_experts")}
    if all(type(size) is int for size in sizes):
        same["qk_head_dim"] = (sum(sizes), "qk_nope_head_dim + qk_rope_head_dim")
    for key, (value, words) in same.items():
        if hf.get(key) not in (value, None):
            raise ValueError(f"{key}: {hf[key]!r}, expected {words} = {value!r}")


def _rope(hf: dict[str, Any], max_positions: Any) -> dict[str, Any]:
    """rope_theta + rope_scaling, or the newer rope_parameters which holds both.

    Where a file has both, transformers takes rope_scaling and so do we.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key}: {rope!r}, expected an object or null")
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", hf.get("rope_theta"))
    if theta is None:
        theta = 1e4
    values = {"rope_theta": float(theta) if type(theta) is int and abs(theta) < 2**63 else theta}
    for name, only in _NEUTRAL_ROPE.items():
        if (value := rope.pop(name, only)) != only:
            raise ValueError(f"{key}.{name}: {value!r}, expected {only!r}, all that is implemented")
    kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope]
    if any(kind not in ("yarn", "default") for kind in kinds) or (rope and not kinds):
        raise ValueError(f"{key}: type {kinds[0] if kinds else None!r}, expected 'yarn' or "
                         "'default'")
    if len(set(kinds)) > 1:
        raise ValueError(f"{key}: rope_type {kinds[0]!r} and type {kinds[1]!r}, expected one")
    if "yarn" not in kinds:
        return values
    if "factor" not in rope:
        raise ValueError(f"{key}: no factor, expected one for type 'yarn'")
    rope.setdefault("original_max_position_embeddings", max_positions)
    for ours, theirs in _YARN_KEYS.items():
        if theirs in rope:
            values[ours] = rope.pop(theirs)
    if rope:
        raise ValueError(f"{key}.{sorted(rope)[0]}: unknown key, expected those of YaRN")
    return values

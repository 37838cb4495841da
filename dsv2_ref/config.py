# SPDX-License-Identifier: MIT
"""One flat description of a model, the presets, and the published config.json <-> ours.

The field comments give the paper's symbol, the meaning, and the published key. Only this file
knows the published keys.
"""

import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and constants of a DeepSeek-V2. Contradictory values raise ValueError."""

    vocab: int                               # tokens in the vocabulary            vocab_size
    d: int                                   # d      hidden size                  hidden_size
    n_layers: int                            # l      layers                       num_hidden_layers
    n_h: int                                 # n_h    heads                      num_attention_heads
    d_h: int                                 # d_h    head size without RoPE       qk_nope_head_dim
    d_r: int                                 # d_h^R  decoupled RoPE size          qk_rope_head_dim
    d_v: int                                 # d_h    value head size              v_head_dim
    d_c: int                                 # d_c    key-value latent size        kv_lora_rank
    d_cq: int | None = None                  # d'_c   query latent, None: plain W^Q    q_lora_rank
    n_dense: int = 1                         # first layers with a dense FFN  first_k_dense_replace
    dense_width: int                         # width of that dense FFN            intermediate_size
    n_shared: int                            # N_s    shared experts               n_shared_experts
    n_routed: int                            # N_r    routed experts               n_routed_experts
    top_k: int                               # K_r    routed experts a token    num_experts_per_tok
    expert_width: int                        # width of one expert            moe_intermediate_size
    n_devices: int = 1                       # D      devices (expert groups)      n_group
    max_devices: int | None = None           # M      devices a token, None: greedy     topk_group
    routed_scaling_factor: float = 1.0       # on the gates, (21) leaves it out   (the same)
    alpha_expert: float = 0.0                # alpha1 expert balance               aux_loss_alpha
    alpha_device: float = 0.0                # alpha2 device balance               (ours)
    alpha_comm: float = 0.0                  # alpha3 communication balance        (ours)
    drop_capacity: float | None = None       # token dropping, None: off           (ours)
    norm_eps: float = 1e-6                   # of the RMSNorms on the stream       rms_norm_eps
    rope_theta: float = 1e4                  # theta                               (the same)
    yarn_factor: float | None = None         # s      None: plain RoPE    rope_scaling.factor, and
    yarn_original_positions: int = 4096      #        ....original_max_position_embeddings
    yarn_beta_fast: float = 32.0             # beta   turns above which a pair is kept
    yarn_beta_slow: float = 1.0              # alpha  turns below which it is interpolated
    yarn_mscale: float | None = None         # on cos and sin, see attention/rope.py
    yarn_mscale_all_dim: float | None = None  # on cos and sin, and squared on the softmax scale
    max_positions: int = 4096                # longest context             max_position_embeddings
    init_std: float = 0.006                  # of the weights' normal init       initializer_range
    tie_embeddings: bool = False             # one matrix in and out           tie_word_embeddings
    bos: int = 0                             # begin-of-document id                bos_token_id
    eos: int = 1                             # end-of-document id                  eos_token_id

    def __post_init__(self) -> None:
        for f in fields(self):
            kinds = get_args(f.type) or (f.type,)
            value = getattr(self, f.name)
            fits = type(value) in kinds or (type(value) is int and float in kinds)
            self._expect(f.name, fits, f"of type {' or '.join(_plain_name(k) for k in kinds)}")
        positive = ("vocab d n_layers n_h d_h d_r d_v d_c dense_width n_shared n_routed top_k "
                    "expert_width n_devices max_positions yarn_original_positions").split()
        for name in positive:
            self._expect(name, getattr(self, name) > 0, "a positive integer")
        self._expect("d_cq", self.d_cq is None or self.d_cq > 0, "a positive integer or None")
        self._expect("d_r", self.d_r % 2 == 0, "an even number (RoPE turns pairs)")
        self._expect("n_dense", 0 <= self.n_dense <= self.n_layers, f"0 to {self.n_layers} layers")
        self._expect("n_devices", self.n_routed % self.n_devices == 0,
                     f"a divisor of n_routed = {self.n_routed}")
        reach = self.n_routed
        if self.max_devices is not None:
            self._expect("max_devices", 1 <= self.max_devices <= self.n_devices,
                         f"1 to n_devices = {self.n_devices}, or None for greedy routing")
            reach = self.n_routed // self.n_devices * self.max_devices
        self._expect("top_k", self.top_k <= reach, f"at most {reach}, what a token can reach")
        for name in ("alpha_expert", "alpha_device", "alpha_comm", "init_std"):
            self._expect(name, getattr(self, name) >= 0, "a number >= 0")
        for name in ("routed_scaling_factor", "norm_eps", "rope_theta"):
            self._expect(name, getattr(self, name) > 0, "a number > 0")
        self._expect("drop_capacity", self.drop_capacity is None or self.drop_capacity > 0,
                     "a number > 0, or None for no dropping")
        self._expect("yarn_factor", self.yarn_factor is None or self.yarn_factor >= 1,
                     "a number >= 1, or None for plain RoPE")
        for name in ("bos", "eos"):
            self._expect(name, 0 <= getattr(self, name) < self.vocab,
                         f"a token id below vocab = {self.vocab}")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: {getattr(self, name)!r}, expected {expected}")

    def with_(self, **changes: Any) -> "Config":
        """A copy with some fields changed; an unknown field raises ValueError."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]}: no such field of Config")
        return replace(self, **changes)

    def is_moe(self, layer: int) -> bool:
        """Whether layer i has experts (the first n_dense layers have a dense FFN)."""
        return layer >= self.n_dense

    @property
    def reach(self) -> int:
        """M: how many devices a token may be sent to."""
        return self.n_devices if self.max_devices is None else self.max_devices

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | Path) -> "Config":
        """From a published config.json: its content, its path, or the directory it lies in."""
        if isinstance(source, dict):
            return _from_hf(source)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file, expected a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {type(content).__name__}, expected a JSON object")
        return _from_hf(content)

    def to_hf(self) -> dict[str, Any]:
        """The published config.json as a dictionary; `from_hf` gives an equal Config back."""
        hf = {theirs: getattr(self, ours) for ours, theirs in _KEYS.items()}
        greedy = self.max_devices is None
        hf |= _FIXED | {
            "architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": self.n_h,
            "topk_method": "greedy" if greedy else "group_limited_greedy",
            "topk_group": self.n_devices if greedy else self.max_devices, "seq_aux": True,
            "rope_theta": self.rope_theta, "rope_scaling": None,
        }
        if self.yarn_factor is not None:
            scaling = {theirs: getattr(self, ours) for ours, theirs in _YARN_KEYS.items()}
            scaling = {key: value for key, value in scaling.items() if value is not None}
            hf["rope_scaling"] = {"type": "yarn", **scaling}
        return hf


def _plain_name(kind: type) -> str:
    return "None" if kind is type(None) else kind.__name__


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
# the only quantised files that are read and written, block-scaled FP8 as V3 published it
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
       "activation_scheme": "dynamic"}
# keys that say nothing about the mathematics
_IGNORED = set(
    "architectures auto_map torch_dtype dtype transformers_version use_cache pretraining_tp "
    "ep_size pad_token_id seq_aux output_router_logits num_experts _name_or_path head_dim "
    "qk_head_dim return_dict output_attentions output_hidden_states chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type".split()
)


def _from_hf(hf: dict[str, Any]) -> Config:
    known = set(_KEYS.values()) | set(_FIXED) | _IGNORED | {
        "num_key_value_heads", "topk_method", "topk_group", "rope_theta", "rope_scaling",
        "rope_parameters", "quantization_config",
    }
    for key in hf:
        if key not in known:
            raise ValueError(f"{key}: unknown key of a deepseek_v2 config.json")
    for key, only in _FIXED.items():
        if hf.get(key) not in (only, None):
            raise ValueError(f"{key}: {hf[key]!r}, expected {only!r}, all that is implemented")
    if hf.get("quantization_config") not in (FP8, None):
        raise ValueError(f"quantization_config: {hf['quantization_config']!r}, unknown key or "
                         f"value, expected {FP8!r}")
    if hf.get("num_key_value_heads") not in (hf.get("num_attention_heads"), None):
        raise ValueError(f"num_key_value_heads: {hf['num_key_value_heads']!r}, expected "
                         f"num_attention_heads = {hf.get('num_attention_heads')!r}, as MLA has it")
    required = {f.name for f in fields(Config) if f.default is MISSING}
    values: dict[str, Any] = {}
    for ours, theirs in _KEYS.items():
        if hf.get(theirs) is not None:
            values[ours] = hf[theirs]
        elif ours in required:
            raise ValueError(f"{theirs}: missing from config.json")
    values.setdefault("n_dense", 0)          # the format's default, not ours
    method = hf.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method: {method!r}, expected 'greedy' or 'group_limited_greedy'")
    if method == "group_limited_greedy":
        if hf.get("n_group") is None or hf.get("topk_group") is None:
            raise ValueError("topk_method: 'group_limited_greedy', expected n_group and topk_group")
        values["max_devices"] = hf["topk_group"]
    return Config(**values, **_rope_from_hf(hf))


def _rope_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta + rope_scaling, or the newer rope_parameters which holds both."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling: {rope!r}, expected an object or null")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 1e4
    values = {"rope_theta": float(theta) if type(theta) is int else theta}
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    if any(kind not in ("yarn", "default") for kind in kinds) or (rope and not kinds):
        raise ValueError(f"rope_scaling: type {kinds[0] if kinds else None!r}, expected 'yarn' or "
                         "'default'")
    if "yarn" not in kinds:
        rope = {}
    elif "factor" not in rope:
        raise ValueError("rope_scaling: no factor, expected one for type 'yarn'")
    if rope and hf.get("max_position_embeddings") is not None:
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    for ours, theirs in _YARN_KEYS.items():
        if (value := rope.pop(theirs, None)) is not None:
            values[ours] = value
    if rope:
        raise ValueError(f"rope_scaling.{sorted(rope)[0]}: unknown key")
    return values


_PUBLISHED = dict(
    vocab=102400, d_h=128, d_r=64, d_v=128, d_c=512, n_shared=2, top_k=6, bos=100000, eos=100001,
    yarn_factor=40.0, yarn_mscale=0.707, yarn_mscale_all_dim=0.707, max_positions=163840,
)
V2 = Config(
    **_PUBLISHED, n_layers=60, d=5120, n_h=128, d_cq=1536, dense_width=12288, n_routed=160,
    expert_width=1536, n_devices=8, max_devices=3, routed_scaling_factor=16.0,
    alpha_expert=0.003, alpha_device=0.05, alpha_comm=0.02, drop_capacity=1.0,
)
LITE = Config(
    **_PUBLISHED, n_layers=27, d=2048, n_h=16, dense_width=10944, n_routed=64, expert_width=1408,
    alpha_expert=0.001,
)
# Small models that keep every mechanism of V2: query compression, device-limited routing, the
# three losses, dropping. Plain RoPE; a full-size vocabulary would be most of them, so they tie it.
TINY = Config(
    vocab=512, d=64, n_layers=3, n_h=4, d_h=16, d_r=8, d_v=16, d_c=32, d_cq=48, dense_width=176,
    n_shared=1, n_routed=8, top_k=3, expert_width=48, n_devices=4, max_devices=2,
    alpha_expert=0.003, alpha_device=0.05, alpha_comm=0.02, drop_capacity=1.0,
    max_positions=512, init_std=0.02, tie_embeddings=True,
)
MINI = TINY.with_(      # the committed checkpoint, data/model
    vocab=1024, d=96, d_h=24, d_r=16, d_v=24, d_c=64, d_cq=72, dense_width=256, expert_width=64,
    max_positions=1024,
)
SMALL = TINY.with_(     # the main job
    vocab=4096, d=128, d_h=32, d_r=16, d_v=32, d_c=128, d_cq=96, dense_width=384, n_shared=2,
    n_routed=16, top_k=4, expert_width=64, max_positions=2048,
)
# The ladder, by activated parameters as `cost` counts them, the tied head among them. In V2's
# proportions: d_c = 4 d_h, d_r = d_h / 2, 2 + 6 experts a token, a dense FFN as wide as those,
# M = 3 of D = 8; the gates of an even router sum to 0.6, as 16·6/160 is.
M10 = TINY.with_(
    vocab=16384, d=256, n_layers=7, n_h=8, d_h=32, d_r=16, d_v=32, d_c=128, d_cq=192,
    dense_width=768, n_shared=2, n_routed=32, top_k=6, expert_width=96, n_devices=8, max_devices=3,
    routed_scaling_factor=3.2, max_positions=4096,
)
M50 = M10.with_(
    d=512, n_layers=12, d_h=64, d_r=32, d_v=64, d_c=256, d_cq=384, dense_width=1536, n_routed=64,
    expert_width=192, routed_scaling_factor=6.4,
)
M150 = M50.with_(d=768, n_layers=18, n_h=12, d_cq=512, dense_width=2304, expert_width=288)
PRESETS = {"v2": V2, "lite": LITE, "150m": M150, "50m": M50, "10m": M10, "small": SMALL,
           "mini": MINI, "tiny": TINY}

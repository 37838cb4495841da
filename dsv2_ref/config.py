# SPDX-License-Identifier: MIT
"""One flat description of a model, and the presets.

The field comments give the paper's symbol, the meaning, and the published key; config_json.py
translates.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from dsv2_ref.config_json import from_published, to_published


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
    trained_positions: int | None = None     # trained at fewer: then this is that key, and the
    #                                          longest context             readable_positions (ours)
    init_std: float = 0.006                  # of the weights' normal init       initializer_range
    tie_embeddings: bool = False             # one matrix in and out           tie_word_embeddings
    bos: int | None = 0                      # begin-of-document id                bos_token_id
    eos: int | tuple[int, ...] | None = 1    # end-of-document id or ids           eos_token_id

    def __post_init__(self) -> None:
        for f in fields(self):
            kinds = [get_origin(kind) or kind for kind in get_args(f.type) or (f.type,)]
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
        for name in ("routed_scaling_factor", "norm_eps", "rope_theta", "yarn_beta_fast",
                     "yarn_beta_slow"):
            self._expect(name, getattr(self, name) > 0, "a number > 0")
        self._expect("drop_capacity", self.drop_capacity is None or self.drop_capacity > 0,
                     "a number > 0, or None for no dropping")
        self._expect("yarn_factor", self.yarn_factor is None or self.yarn_factor >= 1,
                     "a number >= 1, or None for plain RoPE")
        if self.yarn_factor is not None:      # a pair's turns are counted in powers of theta
            self._expect("rope_theta", self.rope_theta > 1, "a number > 1 under YaRN")
        self._expect("trained_positions", self.trained_positions is None
                     or self.yarn_factor is None
                     and 0 < self.trained_positions < self.max_positions,
                     f"less than max_positions = {self.max_positions} and no YaRN, or None")
        self._expect("yarn_mscale", self.yarn_mscale is None or self.yarn_mscale > 0,
                     "a number > 0 or None")
        self._expect("yarn_mscale_all_dim", (self.yarn_mscale_all_dim or 0) >= 0,
                     "a number >= 0 or None")
        for name in ("bos", "eos"):
            ids = self._ids(name)
            holds = all(type(i) is int and 0 <= i < self.vocab for i in ids)
            self._expect(name, holds and ids != () or getattr(self, name) is None,
                         f"a token id below vocab = {self.vocab}, or None")
        for f in fields(self):
            value = getattr(self, f.name)     # last: a bound that is told above says more
            if isinstance(value, int | float):
                self._expect(f.name, abs(value) <= sys.float_info.max, "a finite number")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: {getattr(self, name)!r}, expected {expected}")

    def _ids(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else () if value is None else (value,)

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

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a document: none, one or several."""
        return self._ids("eos")

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | Path) -> "Config":
        """From a published config.json: its content, its path, or the directory it lies in.

        A generation_config.json that lies beside the file may name other ids that end a document.
        """
        if isinstance(source, dict):
            return cls(**from_published(source))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        content = _read_object(path)
        generation = path.with_name("generation_config.json")
        if generation.exists() and "eos_token_id" in (said := _read_object(generation)):
            content["eos_token_id"] = said["eos_token_id"]
        return cls(**from_published(content))

    def to_hf(self) -> dict[str, Any]:
        """The published config.json as a dictionary; `from_hf` gives an equal Config back."""
        return to_published(asdict(self))


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, expected a config.json") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {type(content).__name__}, expected a JSON object")
    return content


def _plain_name(kind: type) -> str:
    return "None" if kind is type(None) else kind.__name__


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
MINI = TINY.with_(      # the committed checkpoint, data/model; d_h + d_r = 48 suits other programs
    vocab=1024, d=96, d_h=32, d_r=16, d_v=32, d_c=64, d_cq=72, dense_width=256, expert_width=64,
    max_positions=1024,
)
SMALL = TINY.with_(     # the main job takes two of its layers
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

"""What a draft looks like: shapes, layer type, and the target it was trained for.

Two kinds of ``config.json`` are understood: the published flat ones (``model_type`` ``llava`` or
``qwen2_vl``) and this project's own (``model_type`` ``msd``).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_msd.errors import ConfigError

FORMAT_VERSION = 1
LAYER_TYPES = ("llama", "qwen2")
DTYPES = ("float32", "float16", "bfloat16")
# A damaged number must not make readers list the weights of 10**30 layers.
MAX_LAYERS = 256
OPTIONAL_FIELDS = ("tree_depth", "tree_top_k", "draft_vocab_size", "msd_acceptance")

# What the published layouts imply without saying it: the decoder layer's type, the q/k/v bias, the
# input norm of layer 0, and the rotary base when the file names none.
PUBLISHED_LAYOUTS: dict[str, dict[str, Any]] = {
    "llava": {
        "layer_type": "llama",
        "attention_bias": False,
        "input_norm": False,
        "rope_theta": 10000.0,
    },
    "qwen2_vl": {
        "layer_type": "qwen2",
        "attention_bias": True,
        "input_norm": True,
        "rope_theta": 1000000.0,
    },
}

# Both leave a draft's rotation as it is: M-RoPE is given the same number on all axes.
_PLAIN_ROPE_TYPES = ("default", "mrope")


@dataclass(frozen=True)
class TargetInfo:
    """The target a draft was trained for. ``None`` means that the checkpoint does not say.

    ``name_or_path`` is a hub name, an absolute path, or a path relative to the draft's folder.
    """

    name_or_path: str | None = None
    architecture: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("name_or_path", "architecture"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"target.{name}: got {value!r}, expected a name or null.")
        for name in ("hidden_size", "vocab_size"):
            value = getattr(self, name)
            if value is not None:
                _positive_int(f"target.{name}", value)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any] | None) -> "TargetInfo":
        """Read the ``target`` table of a config; unknown entries are ignored."""
        if d is None:
            return cls()
        if not isinstance(d, Mapping):
            raise ConfigError(f"target: got {type(d).__name__}, expected a table (JSON object).")
        return cls(**{f.name: d.get(f.name) for f in fields(cls)})


@dataclass(frozen=True)
class MSDDraftConfig:
    """Shapes and conventions of one MSD draft.

    ``input_norm`` and ``attention_bias`` tell the two published layer types apart: Llama-type
    drafts have neither, Qwen2-type drafts have both. Later layers of a deeper draft always have an
    input norm. ``num_speculative_tokens``, ``tree_depth`` and ``tree_top_k`` are the defaults the
    draft is served with; without the last two it drafts chains. ``draft_vocab_size`` tokens are all
    that the draft proposes, those of its map ``d2t``; None is the target's whole vocabulary.
    ``msd_acceptance`` is what an evaluation found the target to accept
    (`vllm_msd.budget.AcceptancePrior`). Raises `ConfigError` when a value is impossible.
    """

    layer_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    max_position_embeddings: int
    attention_bias: bool
    input_norm: bool
    hidden_act: str = "silu"
    fc_bias: bool = True
    torch_dtype: str = "float32"
    num_speculative_tokens: int = 5
    tree_depth: int | None = None
    tree_top_k: int | None = None
    draft_vocab_size: int | None = None
    msd_acceptance: Mapping[str, Any] | None = None
    target: TargetInfo = TargetInfo()

    def __post_init__(self) -> None:
        if self.layer_type not in LAYER_TYPES:
            raise ConfigError(
                f"layer_type: got {self.layer_type!r}, expected one of {LAYER_TYPES}."
            )
        for name in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "num_hidden_layers", "vocab_size", "max_position_embeddings",
            "num_speculative_tokens",
        ):  # fmt: skip
            _positive_int(name, getattr(self, name))
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(
                f"num_hidden_layers: got {self.num_hidden_layers}, expected at most {MAX_LAYERS}. "
                "Is this the folder of an MSD draft? Most have one layer."
            )
        for name in ("tree_depth", "tree_top_k", "draft_vocab_size"):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value!r}, expected a positive number.")
        for name in ("attention_bias", "input_norm", "fc_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected true or false.")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act: got {self.hidden_act!r}, only 'silu' is supported.")
        if self.torch_dtype not in DTYPES:
            raise ConfigError(f"torch_dtype: got {self.torch_dtype!r}, expected one of {DTYPES}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads: got {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: got {self.head_dim}, expected an even number (rotary embedding)."
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.num_token_ids:
            raise ConfigError(
                f"draft_vocab_size: got {self.draft_vocab_size}, expected at most "
                f"{self.num_token_ids}, the target's vocabulary."
            )

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "MSDDraftConfig":
        """Read a ``config.json``, published or our own; a `ConfigError` says what is wrong."""
        if not isinstance(d, Mapping):
            raise ConfigError(f"config: got {type(d).__name__}, expected a table (JSON object).")
        model_type = layout_of(d)
        if model_type == "msd":
            return cls._from_own(d)
        if isinstance(model_type, str) and model_type in PUBLISHED_LAYOUTS:
            return cls._from_published(d, model_type)
        known = ("msd", *PUBLISHED_LAYOUTS)
        raise ConfigError(
            f"model_type: got {model_type!r}, expected one of {known}. "
            "Is this the folder of an MSD draft, not of its target?"
        )

    @classmethod
    def _from_own(cls, d: Mapping[str, Any]) -> "MSDDraftConfig":
        version = d.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version: got {version!r}, this release reads {FORMAT_VERSION}. "
                "Update vllm-msd, or convert the original checkpoint again."
            )
        # transformers renames torch_dtype to dtype when it rewrites a config.
        d = {"torch_dtype": d.get("dtype"), **d}
        names = [f.name for f in fields(cls) if f.name != "target"]
        _require(d, [n for n in names if n not in OPTIONAL_FIELDS])
        values: dict[str, Any] = {n: d.get(n) for n in names}
        return cls(**values, target=TargetInfo.from_dict(d.get("target")))

    @classmethod
    def _from_published(cls, d: Mapping[str, Any], model_type: str) -> "MSDDraftConfig":
        implied = PUBLISHED_LAYOUTS[model_type]
        _require(
            d,
            ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
             "rms_norm_eps", "vocab_size", "max_position_embeddings"],
        )  # fmt: skip
        hidden, heads = d["hidden_size"], d["num_attention_heads"]
        _positive_int("hidden_size", hidden)
        _positive_int("num_attention_heads", heads)
        if d.get("head_dim") is None and hidden % heads:
            raise ConfigError(
                f"hidden_size: got {hidden}, expected a multiple of num_attention_heads ({heads}) "
                "when head_dim is not given."
            )
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"rope_scaling: got {rope!r}, expected a table or null.")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in _PLAIN_ROPE_TYPES:
            raise ConfigError(
                f"rope_scaling: got type {rope_type!r}, a draft supports {_PLAIN_ROPE_TYPES} only."
            )
        if d.get("use_sliding_window"):
            raise ConfigError("use_sliding_window: got true, a draft supports full attention only.")
        return cls(
            layer_type=implied["layer_type"],
            hidden_size=hidden,
            intermediate_size=d["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=d.get("num_key_value_heads") or heads,
            head_dim=d.get("head_dim") or hidden // heads,
            num_hidden_layers=d["num_hidden_layers"],
            rms_norm_eps=d["rms_norm_eps"],
            rope_theta=d.get("rope_theta") or rope.get("rope_theta") or implied["rope_theta"],
            vocab_size=d["vocab_size"],
            max_position_embeddings=d["max_position_embeddings"],
            attention_bias=implied["attention_bias"],
            input_norm=implied["input_norm"],
            # Of the fusion layer; the published training reads it by this name.
            fc_bias=True if d.get("bias") is None else d["bias"],
            hidden_act=d.get("hidden_act", "silu"),
            torch_dtype=d.get("torch_dtype") or d.get("dtype") or "float32",
            draft_vocab_size=d.get("draft_vocab_size"),
        )

    @property
    def num_token_ids(self) -> int:
        """Tokens of the target, as far as the config knows: a published draft may list fewer."""
        return max(self.vocab_size, self.target.vocab_size or 0)

    def to_dict(self) -> dict[str, Any]:
        """The config in our own format; ``from_dict(c.to_dict()) == c``."""
        return {
            "model_type": "msd",
            "format_version": FORMAT_VERSION,
            "architectures": ["MSDDraftModel"],
            **asdict(self),
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight the draft has, without the optional embedding table."""
        h, f = self.hidden_size, self.intermediate_size
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (h, 2 * h)}
        if self.fc_bias:
            shapes["fc.bias"] = (h,)
        for i in range(self.num_hidden_layers):
            layer = f"layers.{i}."
            for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                shapes[f"{layer}self_attn.{name}.weight"] = (rows, h)
                if self.attention_bias:
                    shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
            shapes[f"{layer}self_attn.o_proj.weight"] = (h, q)
            shapes[f"{layer}mlp.gate_proj.weight"] = (f, h)
            shapes[f"{layer}mlp.up_proj.weight"] = (f, h)
            shapes[f"{layer}mlp.down_proj.weight"] = (h, f)
            if i > 0 or self.input_norm:
                shapes[f"{layer}input_layernorm.weight"] = (h,)
            shapes[f"{layer}post_attention_layernorm.weight"] = (h,)
        return shapes

    def embedding_shape(self) -> tuple[int, int]:
        """Shape of ``embed_tokens.weight``, where a checkpoint holds it."""
        return self.vocab_size, self.hidden_size


def layout_of(d: Mapping[str, Any]) -> Any:
    """Which layout a ``config.json`` has; the speculators library's tools may drop our key."""
    return d.get("model_type", d.get("speculators_model_type"))


def _positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r}, expected a positive whole number.")


def _require(d: Mapping[str, Any], names: list[str]) -> None:
    missing = [n for n in names if d.get(n) is None]
    if missing:
        raise ConfigError(
            f"config: fields missing: {', '.join(missing)}. Expected a complete config.json with "
            "these fields at its top level; fetch the checkpoint again."
        )

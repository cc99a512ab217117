"""Function-preserving widening: a small pair's exact functions at a larger model's cost.

A model of a few million parameters is all overhead, so its speed says nothing about speculation.
Widening gives target and draft a real shape while every logit stays what it was:

* The residual stream is zero-padded from ``H`` to ``H'``. What writes into it (embeddings, output
  projections, projector, ``fc``) gets zero rows, so the padding stays zero.
* RMSNorm divides by ``sqrt(mean(x^2) + eps)`` and the mean now runs over ``H'`` entries: weights
  are scaled by ``sqrt(H / H')`` and eps by ``H / H'``.
* Added heads and MLP columns read with random weights and write with zero weights.
* Added layers are random but for ``o_proj`` and ``down_proj``, which are zero: they add zero.

Acceptance is therefore the small pair's, and cost the large shape's. The vision tower stays as it
is. Where the result lies is the caller's choice: see ``vllm_msd.demo.paths``.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_msd.checkpoint import load_draft, save_draft
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError, ConfigError

ALGORITHM_VERSION = 1
DEPTH = 24  # what real models of 0.3 to 1 billion parameters have, about
_RANDOM_STD = 0.02
_WIDTHS = (512, 1024, 2048, 4096)
_LAYER = re.compile(r"^(?P<prefix>.*\blayers\.)(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder: the numbers a widening changes, and the head size, which it keeps."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read from the text part of a Hugging Face config."""
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    def parameters(self, vocab_size: int) -> int:
        """Parameters of the decoder with embedding and head, norms left out."""
        return self.num_hidden_layers * self.layer_parameters + 2 * vocab_size * self.hidden_size


def parse_parameters(text: str) -> int:
    """``"350M"`` to 350,000,000; ``K``, ``M`` and ``B`` are understood, and plain numbers."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if match is None or not float(match[1]):
        raise ConfigError(
            f"size: got {text!r}, expected a number of parameters such as 350M or 1B."
        )
    return round(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]])


def choose_shape(base: Shape, parameters: int, vocab_size: int) -> Shape:
    """The shape of about ``parameters`` parameters whose depth is nearest to a real model's."""

    def at_width(hidden: int) -> Shape:
        heads = hidden // base.head_dim
        wide = Shape(
            hidden,
            max(round(hidden * 8 / 3 / 256) * 256, base.intermediate_size),
            1,
            heads,
            max(1, heads * base.num_key_value_heads // base.num_attention_heads),
            base.head_dim,
        )
        layers = (parameters - 2 * vocab_size * hidden) / wide.layer_parameters
        return replace(wide, num_hidden_layers=max(round(layers), 0))

    shapes = [at_width(h) for h in _WIDTHS if h >= base.hidden_size]
    shapes = [s for s in shapes if s.num_hidden_layers >= base.num_hidden_layers]
    if not shapes:
        smallest = at_width(min(h for h in _WIDTHS if h >= base.hidden_size))
        smallest = replace(smallest, num_hidden_layers=base.num_hidden_layers)
        raise ConfigError(
            f"size: got {parameters:,} parameters, too few to hold the pair; expected at "
            f"least {smallest.parameters(vocab_size):,}."
        )
    return min(shapes, key=lambda s: abs(math.log(s.num_hidden_layers / DEPTH)))


def check_widens(base: Shape, wide: Shape) -> None:
    """Raise `ConfigError` unless ``wide`` can hold ``base`` without changing its function."""
    for name, small in asdict(base).items():
        large = getattr(wide, name)
        if large < small or (name == "head_dim" and large != small):
            wanted = "the same" if name == "head_dim" else "at least that"
            raise ConfigError(f"{name}: got {large} to widen {small}, expected {wanted}.")
    # Query head i reads key head i // group: added heads must not shift the old ones' keys.
    groups = [s.num_attention_heads / s.num_key_value_heads for s in (base, wide)]
    if groups[0] != groups[1]:
        raise ConfigError(
            f"heads per key-value head: got {groups[1]:g}, expected {groups[0]:g} as before."
        )


class Widener:
    """Widens one decoder's weights; random values come from one generator, in call order."""

    def __init__(self, base: Shape, wide: Shape, dtype: torch.dtype, seed: int) -> None:
        check_widens(base, wide)
        self.base, self.wide, self.dtype = base, wide, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul_(_RANDOM_STD).to(self.dtype)

    def read(self, weight: Tensor, rows: int) -> Tensor:
        """A matrix that reads the residual stream: added rows and columns are random.

        Added columns meet the zero padding; added rows feed only what writes with zero weights.
        ``weight`` ``[out, H]`` or a bias ``[out]``; returns ``[rows, H']`` or ``[rows]``.
        """
        if weight.ndim == 1:
            out = self._random(rows)
            out[: weight.shape[0]] = weight
            return out
        out = self._random(rows, self.wide.hidden_size)
        out[: weight.shape[0], : weight.shape[1]] = weight
        return out

    def write(self, weight: Tensor, columns: int) -> Tensor:
        """A matrix that writes into the residual stream: everything added is zero.

        ``weight`` ``[H, in]``; returns ``[H', columns]``.
        """
        out = torch.zeros(self.wide.hidden_size, columns, dtype=self.dtype)
        out[: weight.shape[0], : weight.shape[1]] = weight
        return out

    def norm(self, weight: Tensor) -> Tensor:
        """An RMSNorm weight ``[H]`` to ``[H']``; its eps changes too (`scaled_eps`)."""
        out = torch.ones(self.wide.hidden_size)
        out[: weight.shape[0]] = weight.float()
        return (out * math.sqrt(self.base.hidden_size / self.wide.hidden_size)).to(self.dtype)

    def scaled_eps(self, eps: float) -> float:
        """The eps that goes with `norm`."""
        return eps * self.base.hidden_size / self.wide.hidden_size

    def stream(self, weight: Tensor) -> Tensor:
        """A table whose last axis is the residual stream (embedding, head): zero-padded."""
        out = torch.zeros(*weight.shape[:-1], self.wide.hidden_size, dtype=self.dtype)
        out[..., : weight.shape[-1]] = weight
        return out

    def layer_part(self, name: str) -> Callable[[Tensor], Tensor]:
        """What to do with a layer's weight of this name (``self_attn.q_proj.weight``)."""
        wide = self.wide
        q = wide.num_attention_heads * wide.head_dim
        kv = wide.num_key_value_heads * wide.head_dim
        module = name.split(".")[-2]
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        rows |= dict.fromkeys(("gate_proj", "up_proj"), wide.intermediate_size)
        if module in rows:
            return lambda w: self.read(w, rows[module])
        columns = {"o_proj": q, "down_proj": wide.intermediate_size}
        if module in columns and name.endswith(".weight"):
            return lambda w: self.write(w, columns[module])
        if module in ("input_layernorm", "post_attention_layernorm"):
            return self.norm
        raise CheckpointError(f"layer weight {name!r}: not known from Llama-type layers.")

    def added_layer(self, parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """A layer that adds zero, with the weights a present layer has: ``(name, weight)``."""
        layer = {}
        for name, weight in parts:
            # An empty old block leaves everything random where read, zero where written.
            empty = weight[tuple(slice(0, 0) for _ in weight.shape)]
            layer[name] = self.layer_part(name)(empty)
        return layer


def widen_target_state(state: dict[str, Tensor], widener: Widener) -> dict[str, Tensor]:
    """Widen the weights of a ``LlavaForConditionalGeneration`` with a Llama-type decoder.

    Key names are kept, whichever of transformers' namings they follow; the vision tower is only
    cast. Raises `CheckpointError` on a weight it does not know.
    """
    out: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    prefix = ""
    for name, weight in state.items():
        if "vision_tower." in name:
            out[name] = weight.to(widener.dtype)
        elif "multi_modal_projector." in name:
            out[name] = _widen_projector(name, weight, widener)
        elif match := _LAYER.match(name):
            out[name] = widener.layer_part(match["rest"])(weight)
            prefix = match["prefix"]
            if int(match["index"]) == widener.base.num_hidden_layers - 1:
                last[match["rest"]] = weight
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            out[name] = widener.stream(weight)
        elif name.endswith(".norm.weight"):
            out[name] = widener.norm(weight)
        else:
            raise CheckpointError(f"weight {name!r}: not known from a LLaVA with a Llama decoder.")
    for index in range(widener.base.num_hidden_layers, widener.wide.num_hidden_layers):
        layer = widener.added_layer(sorted(last.items()))
        out.update({f"{prefix}{index}.{rest}": weight for rest, weight in layer.items()})
    return out


def _widen_projector(name: str, weight: Tensor, widener: Widener) -> Tensor:
    hidden = widener.wide.hidden_size
    if name.endswith("linear_1.weight"):  # reads the vision tower, whose width stays
        out = widener._random(hidden, weight.shape[1])
        out[: weight.shape[0]] = weight
        return out
    if name.endswith("linear_1.bias"):
        return widener.read(weight, hidden)
    if name.endswith("linear_2.weight"):
        return widener.write(weight, hidden)
    if name.endswith("linear_2.bias"):
        return widener.stream(weight)
    raise CheckpointError(f"weight {name!r}: not known from LLaVA's projector.")


def widen_draft_state(state: dict[str, Tensor], widener: Widener) -> dict[str, Tensor]:
    """Widen a draft's weights (`MSDDraftConfig.weight_shapes` names); its depth stays."""
    out: dict[str, Tensor] = {}
    hidden, wide_hidden = widener.base.hidden_size, widener.wide.hidden_size
    for name, weight in state.items():
        if name == "fc.weight":  # [embedding ; hidden state], each half padded by itself
            halves = [widener.write(half, wide_hidden) for half in weight.split(hidden, 1)]
            out[name] = torch.cat(halves, 1)
        elif name in ("fc.bias", "embed_tokens.weight"):
            out[name] = widener.stream(weight)
        elif match := _LAYER.match(name):
            out[name] = widener.layer_part(match["rest"])(weight)
        else:
            raise CheckpointError(f"weight {name!r}: not known from an MSD draft.")
    return out


def widen_draft_config(config: MSDDraftConfig, widener: Widener) -> MSDDraftConfig:
    """The config that goes with `widen_draft_state`."""
    wide = widener.wide
    return replace(
        config,
        hidden_size=wide.hidden_size,
        intermediate_size=wide.intermediate_size,
        num_attention_heads=wide.num_attention_heads,
        num_key_value_heads=wide.num_key_value_heads,
        rms_norm_eps=widener.scaled_eps(config.rms_norm_eps),
        torch_dtype=str(widener.dtype).removeprefix("torch."),
    )


def widen_target(source: Path, destination: Path, shape: Shape, dtype: torch.dtype, seed: int):
    """Write the widened target folder: weights, config, and the other files as they are.

    Raises `CheckpointError` when ``source`` is not a LLaVA with a Llama decoder, `ConfigError` when
    the shape cannot hold it.
    """
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", {})
    if config.get("model_type") != "llava" or text.get("model_type") != "llama":
        raise CheckpointError(
            f"{source}: got a {config.get('model_type')!r} model, expected a LLaVA with a Llama "
            "decoder."
        )
    widener = Widener(Shape.of(text), shape, dtype, seed)
    name = str(dtype).removeprefix("torch.")
    text |= asdict(shape)
    text["rms_norm_eps"] = widener.scaled_eps(text.get("rms_norm_eps", 1e-6))
    for table in (config, text, config["vision_config"]):
        table.pop("torch_dtype", None)
        table["dtype"] = name
    destination.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "provenance.json":
            shutil.copyfile(file, destination / file.name)
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = widen_target_state(load_file(source / "model.safetensors"), widener)
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})


def widen_draft(source: Path, destination: Path, shape: Shape, dtype: torch.dtype, seed: int):
    """Write the widened draft folder, for a target widened to the same shape beside it."""
    config, state = load_draft(source)
    base = Shape.of(asdict(config))
    wide = replace(shape, num_hidden_layers=base.num_hidden_layers)
    widener = Widener(base, wide, dtype, seed)
    target = replace(config.target, name_or_path="../target", hidden_size=wide.hidden_size)
    wide_config = widen_draft_config(replace(config, target=target), widener)
    save_draft(destination, wide_config, widen_draft_state(state, widener), target)

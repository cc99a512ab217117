"""The shape of a draft for a target, and the weights that training starts from."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vllm_msd.checkpoint import load_draft
from vllm_msd.checkpoint.weights import EMBEDDING
from vllm_msd.draft import MSDDraft, MSDDraftConfig, TargetInfo
from vllm_msd.draft.vocabulary import OFFSETS
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.training.start import Sample, fit_fusion, open_heads_for_images, quiet_branches
from vllm_msd.training.targets import Target
from vllm_msd.training.units import Units

# What a draft's layer takes over from the target's language model.
_SHAPES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_BEHIND_INPUT_NORM = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def draft_config(
    target: Target, name: str = "", layers: int = 1, layer_type: str = "auto"
) -> MSDDraftConfig:
    """A draft with the target's own layer shapes, in the published conventions of its type.

    Args:
        target: what it is to draft for.
        name: what the config names as its target; the target's own name if empty.
        layers: decoder layers.
        layer_type: ``llama``, ``qwen2``, or ``auto`` for what suits the target.

    Raises:
        CheckpointError: the target's language model is of another build.
    """
    text = target.text
    missing = [name for name in _SHAPES if getattr(text, name, None) is None]
    if missing:
        raise CheckpointError(
            f"target {target.name}: its language model ({text.model_type}) has no "
            f"{', '.join(missing)}. Drafts are layers of the Llama or Qwen2 type, for targets of "
            "such layers."
        )
    layer_type = target.layer_type if layer_type == "auto" else layer_type
    is_qwen = layer_type == "qwen2"
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    architecture = (target.config.architectures or [type(target.model).__name__])[0]
    return MSDDraftConfig(
        layer_type=layer_type,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        num_hidden_layers=layers,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        attention_bias=is_qwen,
        input_norm=is_qwen,
        torch_dtype="bfloat16",
        target=TargetInfo(
            name or _absolute(target.name), architecture, text.hidden_size, text.vocab_size
        ),
    )


def initial_draft(
    target: Target, config: MSDDraftConfig, init: str, seed: int, units: Units, sample: Sample
) -> MSDDraft:
    """A draft in float32 in the given units, where the sample lies.

    Args:
        target: what it is to draft for.
        config: its shapes.
        init: ``target``: the fusion layer is fitted to the sample, and the first layer starts as a
            copy of the target's last one that adds little to it. ``random``: PyTorch's own start.
            Else the folder of a draft to go on from.
        seed: of what is random.
        units: that it is trained in.
        sample: measured on the target's first records.

    Raises:
        ConfigError: the draft to go on from has other shapes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = MSDDraft(units.config(config))
        if init not in ("target", "random"):
            state = units.unfold(_weights_of(config, init), config)
            draft.load_state_dict({**draft.state_dict(), **state})
        elif init == "target":
            _copy_last_layer(draft, target)
            if not config.input_norm:
                open_heads_for_images(draft, sample)
        draft.to(sample.inputs.device)
        if init == "target":
            fit_fusion(draft, sample, target.head.float() * units.hidden)
            quiet_branches(draft, sample)
    return draft


def _weights_of(config: MSDDraftConfig, folder: str) -> dict[str, Tensor]:
    other, weights = load_draft(folder)
    if other.weight_shapes() != config.weight_shapes():
        raise ConfigError(
            f"init: the draft {folder} has other shapes than one for this target. Give another "
            "draft, or start from the target (--init target)."
        )
    state = in_float(weights)
    state.pop(OFFSETS, None)  # which tokens it proposes is the run's setting
    return state


def in_float(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded draft's weights in float32 without its embedding table; ids stay what they are."""
    return {
        name: x.float() if x.is_floating_point() else x
        for name, x in weights.items()
        if name != EMBEDDING
    }


def _copy_last_layer(draft: MSDDraft, target: Target) -> None:
    """The target's last decoder layer, as far as the draft's first one has such weights.

    Where the draft has no input norm, its weight goes into the projections behind it.
    """
    last = target.last_layer.state_dict()
    state = draft.state_dict()
    for name in state:
        source = last.get(name.removeprefix("layers.0."))
        if source is not None and source.shape == state[name].shape:
            state[name] = source.float().cpu().clone()
            if not draft.config.input_norm and name.endswith(_BEHIND_INPUT_NORM):
                state[name] *= last["input_layernorm.weight"].float().cpu()
        elif name.endswith("_proj.bias"):
            state[name] = torch.zeros_like(state[name])
    draft.load_state_dict(state)


def _absolute(name: str) -> str:
    """A folder's full path; a hub name as it is."""
    return os.fspath(Path(name).resolve()) if Path(name).is_dir() else name

"""The shape of a draft for a target, and the weights that training starts from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vllm_msd.checkpoint import load_draft
from vllm_msd.checkpoint.weights import EMBEDDING
from vllm_msd.draft import MSDDraft, MSDDraftConfig, TargetInfo
from vllm_msd.draft.layers import DecoderLayer
from vllm_msd.draft.vocabulary import OFFSETS
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.training.targets import Target

# What a draft's layer takes over from the target's language model.
_SHAPES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
# How much larger than text rows visual rows are taken to be.
VISUAL_SCALE = 8.0
# The copied layer was made for the target's residual stream, which is many times larger than the
# normed hidden states that the draft reads and writes.
RESIDUAL_SCALE = 0.01


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


def initial_draft(target: Target, config: MSDDraftConfig, init: str, seed: int) -> MSDDraft:
    """A draft in float32 on the CPU.

    Args:
        target: what it is to draft for.
        config: its shapes.
        init: ``target``: the fusion layer passes the hidden state on, and the first layer starts as
            a copy of the target's last one that adds little to it. ``random``: PyTorch's own start.
            Else the folder of a draft to go on from.
        seed: of what is random.

    Raises:
        ConfigError: the draft to go on from has other shapes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = MSDDraft(config)
        if init == "random":
            return draft
        if init != "target":
            return _loaded(draft, init)
        last = target.last_layer.state_dict()
        state = draft.state_dict()
        for name in state:
            source = last.get(name.removeprefix("layers.0."))
            if source is not None and source.shape == state[name].shape:
                state[name] = source.float().cpu().clone()
            elif name.endswith("_proj.bias"):
                state[name] = torch.zeros_like(state[name])
        draft.load_state_dict(state)
        with torch.no_grad():
            draft.fc.weight[:, config.hidden_size :] += torch.eye(config.hidden_size)
            first = first_layer(draft)
            for output in (first.self_attn.o_proj, first.mlp.down_proj):
                output.weight *= RESIDUAL_SCALE
            if not config.input_norm:
                open_heads_for_images(draft)
    return draft


def _loaded(draft: MSDDraft, folder: str) -> MSDDraft:
    config, weights = load_draft(folder)
    state = in_float(weights)
    state.pop(OFFSETS, None)  # which tokens it proposes is the run's setting
    if config.weight_shapes() != draft.config.weight_shapes():
        raise ConfigError(
            f"init: the draft {folder} has other shapes than one for this target. Give another "
            "draft, or start from the target (--init target)."
        )
    draft.load_state_dict({**draft.state_dict(), **state})
    return draft


def in_float(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded draft's weights in float32 without its embedding table; ids stay what they are."""
    return {
        name: x.float() if x.is_floating_point() else x
        for name, x in weights.items()
        if name != EMBEDDING
    }


def open_heads_for_images(draft: MSDDraft) -> None:
    """Start the second half of the first layer's heads anew, with small keys and values.

    Visual rows enter raw and, without an input norm, many times larger than text rows (ten times
    in the demo pair). With copied weights their attention logits are huge, the first steps shut
    them out, and a soft-max that gives them nothing never lets them back in.
    """
    attention = first_layer(draft).self_attn
    half = attention.q_proj.out_features // 2
    if half % attention.head_dim or attention.k_proj.out_features != 2 * half:
        return  # grouped keys belong to copied heads as well
    std = attention.q_proj.in_features**-0.5
    attention.q_proj.weight[half:].normal_(0.0, std)
    attention.k_proj.weight[half:].normal_(0.0, std / VISUAL_SCALE)
    attention.v_proj.weight[half:].normal_(0.0, std / VISUAL_SCALE)
    attention.o_proj.weight[:, half:].normal_(0.0, 0.5 * std)


def first_layer(draft: MSDDraft) -> DecoderLayer:
    """The draft's first decoder layer."""
    return cast(DecoderLayer, draft.layers[0])


def _absolute(name: str) -> str:
    """A folder's full path; a hub name as it is."""
    return os.fspath(Path(name).resolve()) if Path(name).is_dir() else name

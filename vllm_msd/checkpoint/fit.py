"""Whether a draft fits a target."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Targets by architecture and model type, to the family whose drafts fit them.
_FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaLlamaForCausalLM": "llava",
    "llava": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "llava_next": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "llava_onevision": "llava_onevision",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "qwen2_vl": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "qwen3_vl": "qwen3_vl",
}
_FAMILY_OF_LAYER = {"llama": "llava", "qwen2": "qwen2_vl"}


def check_draft_fits_target(
    config: MSDDraftConfig, target_hf_config: "PreTrainedConfig | Mapping[str, Any]"
) -> None:
    """Raise unless the draft can serve the target.

    The target's embedding table and head serve both. So the hidden sizes must be equal, and the
    draft must not know more tokens than the target; a target with more rows is fine (LLaVA-1.5 as
    published for transformers has 32064, its draft 32000).

    Args:
        config: of the draft.
        target_hf_config: the target's transformers config, or the content of its ``config.json``.

    Raises:
        CheckpointError: it does not fit; the message says in what.
    """
    target = _as_hf_config(target_hf_config)
    named = target.architectures[0] if target.architectures else target.model_type
    family = _FAMILIES.get(named) or _FAMILIES.get(target.model_type)
    if family is None:
        raise CheckpointError(
            f"target architecture: got {named}, expected one of "
            f"{', '.join(n for n in _FAMILIES if n.endswith('ForConditionalGeneration'))}. Drafts "
            "exist for these only."
        )
    draft_family = _FAMILIES.get(
        config.target.architecture or "", _FAMILY_OF_LAYER[config.layer_type]
    )
    if draft_family != family:
        raise CheckpointError(
            f"the draft was made for targets of the family {draft_family}, got "
            f"{named} (family {family}). Use a draft that was trained for "
            "this target."
        )
    check_draft_sizes(config, text_config(target))


def check_draft_sizes(config: MSDDraftConfig, text: "PreTrainedConfig") -> None:
    """Raise CheckpointError unless the draft's sizes fit a target's language model.

    Args:
        config: of the draft.
        text: the part of the target's config that describes its language model.
    """
    if config.hidden_size != text.hidden_size:
        raise CheckpointError(
            f"hidden size: got {config.hidden_size} in the draft, expected the target's "
            f"{text.hidden_size}. Use a draft that was trained for this target."
        )
    if config.vocab_size > text.vocab_size:
        raise CheckpointError(
            f"vocabulary: got {config.vocab_size} tokens in the draft, expected at most the "
            f"target's {text.vocab_size}, whose embedding table and head serve both. Use a draft "
            "that was trained for this target."
        )
    if config.draft_vocab_size is not None and config.num_token_ids > text.vocab_size:
        raise CheckpointError(
            f"draft vocabulary: it was chosen among {config.num_token_ids} tokens, and the target "
            f"has {text.vocab_size}. Use the target that it was chosen for, or trim the draft "
            "again: vllm-msd trim --help"
        )


def text_config(hf_config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The part of a target's config that describes its language model."""
    return hf_config.get_text_config(decoder=True)


def _as_hf_config(config: "PreTrainedConfig | Mapping[str, Any]") -> "PreTrainedConfig":
    if not isinstance(config, Mapping):
        return config
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"target config: got model_type {model_type!r}, expected a model that transformers "
            "knows. Give the config.json of the target."
        )
    # Saved configs leave out what equals transformers' defaults; this fills it in.
    return CONFIG_MAPPING[model_type].from_dict(dict(config))

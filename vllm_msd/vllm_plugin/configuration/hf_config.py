"""The Hugging Face config that vLLM sees for an MSD draft.

vLLM's internal method stays `eagle`: every scheduler and cache predicate it derives from that holds
for MSD unchanged, and the runners tell MSD apart by the draft's architecture name. Whatever the
workers need travels in this config, because it is pickled to them with the engine's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from vllm_msd.draft import MSDDraftConfig
    from vllm_msd.tree.config import TreeConfig


class MSDCheckpointConfig(PreTrainedConfig):
    """What `AutoConfig` makes of a checkpoint of `model_type: msd`: its fields as written."""

    model_type = "msd"


def build_draft_hf_config(
    draft: MSDDraftConfig,
    architecture: str,
    vocab_size: int,
    max_position_embeddings: int,
    tree: TreeConfig,
    auto: Sequence[TreeConfig] = (),
    sizes: Sequence[int] = (),
) -> PreTrainedConfig:
    """Build the Llama or Qwen2 config of one draft.

    Args:
        draft: the draft's own fields; kept whole as the dict attribute `msd_draft`.
        architecture: vLLM architecture name of the draft class.
        vocab_size: rows of the target's embedding table and head, which the draft shares (a
            published draft may have fewer rows of its own).
        max_position_embeddings: positions the target is served with. Rotary positions of the draft
            are computed, not learned, so the larger of both is right.
        tree: size of the trees (or chains) to draft; kept as `msd_tree_depth` and `msd_tree_top_k`.
        auto: the shapes that the engine chooses from, none where `tree` is fixed; kept as
            `msd_auto`, a list of numbers each.
        sizes: numbers of nodes that the engine's scheduler chooses from, none where it does not;
            kept as `msd_sizes`.

    Returns:
        a LlamaConfig (`layer_type` llama) or Qwen2Config (qwen2).
    """
    from transformers import LlamaConfig, Qwen2Config

    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[draft.layer_type]
    config = config_class(
        architectures=[architecture],
        vocab_size=vocab_size,
        hidden_size=draft.hidden_size,
        intermediate_size=draft.intermediate_size,
        num_hidden_layers=draft.num_hidden_layers,
        num_attention_heads=draft.num_attention_heads,
        num_key_value_heads=draft.num_key_value_heads,
        head_dim=draft.head_dim,
        hidden_act=draft.hidden_act,
        rms_norm_eps=draft.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": draft.rope_theta},
        max_position_embeddings=max(draft.max_position_embeddings, max_position_embeddings),
        attention_bias=draft.attention_bias,
        tie_word_embeddings=False,
    )
    config.msd_draft = draft.to_dict()
    config.msd_tree_depth, config.msd_tree_top_k = tree.depth, tree.top_k
    config.msd_auto = [list(astuple(shape)) for shape in auto]
    config.msd_sizes = list(sizes)
    return config

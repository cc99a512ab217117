"""What an engine's config says about its draft trees, in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_msd.tree.config import TreeConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def tree_config(vllm_config: VllmConfig) -> TreeConfig:
    """Size of the trees of an MSD engine; `is_chain` where it drafts chains."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config.hf_config
    return TreeConfig(
        speculative.num_speculative_tokens, draft.msd_tree_depth, draft.msd_tree_top_k
    )


def wants_trees(vllm_config: VllmConfig) -> bool:
    """Whether this engine speculates with MSD and drafts trees."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    is_msd = hasattr(getattr(draft, "hf_config", None), "msd_tree_depth")
    return is_msd and not tree_config(vllm_config).is_chain

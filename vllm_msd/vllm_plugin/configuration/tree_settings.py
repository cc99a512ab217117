"""What an engine's config says about its draft trees, in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_msd.errors import ConfigError
from vllm_msd.tree.config import TreeConfig

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig


def tree_config(vllm_config: VllmConfig) -> TreeConfig:
    """Size of the trees of an MSD engine; `is_chain` where it drafts chains."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config.hf_config
    return TreeConfig(
        speculative.num_speculative_tokens, draft.msd_tree_depth, draft.msd_tree_top_k
    )


def drafts_trees(speculative_config: SpeculativeConfig | None) -> bool:
    """Whether this is MSD's speculative config, and it asks for trees, or for what pays."""
    draft = getattr(getattr(speculative_config, "draft_model_config", None), "hf_config", None)
    return getattr(draft, "msd_tree_top_k", 1) > 1 or bool(getattr(draft, "msd_auto", None))


def is_msd_config(speculative_config: SpeculativeConfig | None) -> bool:
    """Whether this is MSD's speculative config."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return hasattr(getattr(draft, "hf_config", None), "msd_draft")


def heeds_requests(speculative_config: SpeculativeConfig) -> bool:
    """Whether an MSD engine looks at what single requests say about their drafts."""
    return speculative_config.draft_model_config.hf_config.msd_heeds_requests


def wants_trees(vllm_config: VllmConfig) -> bool:
    """Whether this engine speculates with MSD and drafts trees."""
    return drafts_trees(vllm_config.speculative_config)


def auto_shapes(vllm_config: VllmConfig) -> list[TreeConfig]:
    """What an MSD engine chooses from by itself, the largest first; none where sizes are fixed.

    A shape whose levels do not fit the draft's buffers is left out.
    """
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    scheduler = vllm_config.scheduler_config
    shapes = [TreeConfig(*shape) for shape in getattr(draft, "msd_auto", None) or ()]
    rows = scheduler.max_num_batched_tokens
    return [shape for shape in shapes if scheduler.max_num_seqs * shape.top_k <= rows]


def check_level_rows(vllm_config: VllmConfig) -> None:
    """Refuse an engine whose draft levels do not fit its buffers: they hold one step's rows.

    Raises:
        ConfigError: with the settings to change.
    """
    scheduler, top_k = vllm_config.scheduler_config, tree_config(vllm_config).top_k
    rows, limit = scheduler.max_num_seqs * top_k, scheduler.max_num_batched_tokens
    if rows > limit:
        raise ConfigError(
            f"tree_top_k {top_k} with max_num_seqs {scheduler.max_num_seqs} drafts {rows} rows at "
            f"once, expected at most max_num_batched_tokens ({limit}). Lower max_num_seqs or "
            "tree_top_k, or raise max_num_batched_tokens."
        )

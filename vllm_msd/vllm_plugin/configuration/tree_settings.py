"""What an engine's config says about its draft trees, in every process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    """Whether this is MSD's speculative config, and it asks for trees, or for what pays of both."""
    draft = getattr(getattr(speculative_config, "draft_model_config", None), "hf_config", None)
    either = bool(getattr(draft, "msd_auto", None)) and not getattr(draft, "msd_sizes", None)
    return getattr(draft, "msd_tree_top_k", 1) > 1 or either


def is_msd_config(speculative_config: SpeculativeConfig | None) -> bool:
    """Whether this is MSD's speculative config."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return hasattr(getattr(draft, "hf_config", None), "msd_draft")


def sizes_vary(speculative_config: SpeculativeConfig) -> bool:
    """Whether an MSD engine drafts fewer nodes in some steps: what pays, or by a schedule."""
    draft = speculative_config.draft_model_config.hf_config
    return bool(draft.msd_auto or speculative_config.num_speculative_tokens_per_batch_size)


def wants_trees(vllm_config: VllmConfig) -> bool:
    """Whether this engine speculates with MSD and drafts trees."""
    return drafts_trees(vllm_config.speculative_config)


def requests_at_once(vllm_config: VllmConfig, columns: int, element_bytes: int) -> int:
    """For how many requests an engine drafts at once, see `TreeShape.requests_at_once`."""
    scheduler = vllm_config.scheduler_config
    return tree_config(vllm_config).shape.requests_at_once(
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens, columns, element_bytes
    )


def auto_shapes(vllm_config: VllmConfig) -> list[TreeConfig]:
    """What an MSD engine chooses from by itself, the largest first; none where sizes are fixed."""
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    return [TreeConfig(*shape) for shape in getattr(draft, "msd_auto", None) or ()]


def scheduled_sizes(vllm_config: VllmConfig) -> list[int]:
    """Numbers of nodes that an MSD engine's scheduler chooses from by itself, rising from 0.

    None where it does not choose: sizes are given, or Model Runner V1's drafter chooses.
    """
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    return list(getattr(draft, "msd_sizes", None) or ())


def wrap_num_lookahead_tokens(original: Callable[[Any], int]) -> Callable[[Any], int]:
    """Replacement of the property ``VllmConfig.num_lookahead_tokens``.

    vLLM keeps a KV slot for each drafted token. The rows that grow a tree may be more than its
    nodes.
    """

    @functools.wraps(original)
    def num_lookahead_tokens(self: Any) -> int:
        slots = original(self)
        return max(slots, tree_config(self).draft_rows) if wants_trees(self) else slots

    return num_lookahead_tokens

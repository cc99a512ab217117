"""Growing trees with the draft model."""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_msd.draft import DraftCache, MSDDraft
from vllm_msd.tree.grow import TreeShape, grow_tree
from vllm_msd.tree.record import DraftTree


def draft_tree(
    draft: MSDDraft,
    cache: DraftCache,
    last_hidden: Tensor,
    root_tokens: Tensor,
    embed_tokens: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    shape: TreeShape,
) -> DraftTree:
    """Grow one tree per request after the rows in the cache; the cache is left as it was.

    Args:
        draft: the draft model.
        cache: holds every row up to the one whose next token is the root's child.
        last_hidden: ``[B, H]`` the draft's output of each request's last real row.
        root_tokens: ``[B]`` int64 the sampled tokens.
        embed_tokens: token ids to embeddings.
        head: the target's head, ``[..., H]`` to ``[..., V]``; with a draft vocabulary its rows of
            it, ``[..., H]`` to ``[..., D]``.
        shape: size of the tree.
    """
    stable_columns, start = cache.num_columns, cache.num_tokens()
    batch = len(root_tokens)

    def expand(
        tokens: Tensor, hidden: Tensor, visible: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        stable = visible.new_ones(batch, shape.top_k, stable_columns)
        out = draft(
            embed_tokens(tokens),
            hidden,
            torch.zeros_like(tokens, dtype=torch.bool),
            (start + level)[:, None].expand_as(tokens),
            torch.cat([stable, visible], -1),
            cache,
        )
        return head(out), out

    try:
        return grow_tree(
            root_tokens, head(last_hidden), last_hidden, expand, shape, draft.token_ids
        )
    finally:
        cache.crop(stable_columns)

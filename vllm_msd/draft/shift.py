"""From a target's prompt to draft rows: row j holds hidden state j and token j + 1."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class DraftRows(NamedTuple):
    """Arguments of `MSDDraft.forward` for a batch of prompts, right-padded."""

    token_embeds: Tensor  # [B, L, H]
    hidden_states: Tensor  # [B, L, H]
    visual_mask: Tensor  # [B, L] bool
    position_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] bool, False at padding


def shift(
    prompt_embeds: Tensor,
    hidden_states: Tensor,
    token_ids: Tensor,
    next_tokens: Tensor,
    visual_mask: Tensor,
    embed_tokens: Callable[[Tensor], Tensor],
    lengths: Tensor | None = None,
) -> DraftRows:
    """Pair every hidden state with the embedding of the token after it.

    ::

        position      0    1    2    3    4          (v: image)
        token         a    v    v    b    c    next
        hidden        h0   h1   h2   h3   h4
        draft row     v|-- v|-- b|h2 c|h3 next|h4    (visual rows ignore their hidden state)

    Args:
        prompt_embeds: ``[B, L, H]`` the target's input embeddings, images expanded. Read at visual
            positions only.
        hidden_states: ``[B, L, H]`` the target's last hidden states, after its final norm.
        token_ids: ``[B, L]`` int64, aligned with the embeddings; any value at visual positions.
        next_tokens: ``[B]`` int64, the freshly sampled tokens.
        visual_mask: ``[B, L]`` bool, True at visual positions, any number of images at any place.
        embed_tokens: maps token ids ``[B, L]`` to embeddings ``[B, L, H]``.
        lengths: ``[B]`` real length of each row (default: all L). Later columns are padding.
    """
    batch, width = token_ids.shape
    column = torch.arange(width, device=token_ids.device)
    if lengths is None:
        lengths = torch.full((batch,), width, device=token_ids.device)
    is_last = column == lengths[:, None] - 1
    is_real = column < lengths[:, None]

    # roll puts position 0 into the last column, which is either is_last or padding.
    visual = visual_mask.roll(-1, 1) & is_real & ~is_last
    tokens = torch.where(is_last, next_tokens[:, None], token_ids.roll(-1, 1))
    tokens = tokens.masked_fill(visual | ~is_real, 0)  # placeholders may lie outside the table
    embeds = embed_tokens(tokens)
    embeds = torch.where(visual[..., None], prompt_embeds.roll(-1, 1).to(embeds.dtype), embeds)
    return DraftRows(embeds, hidden_states, visual, column.expand(batch, -1), is_real)

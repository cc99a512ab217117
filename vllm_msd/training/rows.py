"""From a target's features to what the draft is trained on: its input rows and the rows that count.

Row j holds hidden state j and token j + 1, and predicts hidden state j + 1, whose head gives token
j + 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_msd.draft import DraftRows, shift
from vllm_msd.training.curriculum import add_noise
from vllm_msd.training.targets import Features


def drafted_rows(answer_mask: Tensor) -> Tensor:
    """Rows whose prediction is an answer token after the first, ``[B, S]`` bool.

    Token j + 1 and token j + 2 must both be in the answer: its first token comes from the target
    itself, never from the draft.
    """
    mask = torch.zeros_like(answer_mask)
    mask[:, :-2] = answer_mask[:, 1:-1] & answer_mask[:, 2:]
    return mask


def reference_rows(answer_mask: Tensor, lengths: Tensor) -> Tensor:
    """The rows that the published training counts, ``[B, S]`` bool: token j is in the answer.

    That misses the first draft step of every reply and takes in the row after its end. The last
    row of a sequence, which has no next hidden state, does not count.
    """
    column = torch.arange(answer_mask.shape[1], device=answer_mask.device)
    return answer_mask & (column < lengths[:, None] - 1)


def draft_rows(
    features: Features, embed: Callable[[Tensor], Tensor], visual_rows: str = "decoupled"
) -> DraftRows:
    """The draft's inputs in float32, for one of the ways to treat visual rows.

    Args:
        features: of a batch, right-padded.
        embed: the target's embedding table.
        visual_rows: ``decoupled``: raw embeddings, without hidden state (MSD). ``coupled``: fused
            like text, as EAGLE does. ``dropped``: the draft sees none of them, and numbers the
            others as if they were not there.
    """
    rows = shift(
        features.embeds,
        features.hidden.float(),
        features.input_ids,
        torch.zeros_like(features.lengths),
        features.visual,
        lambda ids: embed(ids).float(),
        features.lengths,
    )
    if visual_rows == "coupled":
        return rows._replace(visual_mask=torch.zeros_like(rows.visual_mask))
    if visual_rows == "dropped":
        seen = rows.attention_mask & ~rows.visual_mask
        return rows._replace(attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    return rows


def with_noise(
    rows: DraftRows, lengths: Tensor, width: float, generators: list[torch.Generator]
) -> DraftRows:
    """Even noise on the hidden states, each record's by its own generator and length."""
    hidden = rows.hidden_states.clone()
    for row, length, generator in zip(hidden, lengths.tolist(), generators, strict=True):
        uniform = torch.rand(
            length, row.shape[-1], generator=generator, device=generator.device
        ).to(row.device)
        row[:length] = add_noise(row[None, :length], uniform[None], width)[0]
    return rows._replace(hidden_states=hidden)

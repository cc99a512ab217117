"""Drafting unrolled over every position of a known text at once.

In serving, step 1 of a chain reads the target's hidden state, step 2 the draft's output of step 1,
and so on. Here step k is computed for all rows in parallel: row j of step k stands for the k-th
drafted step of the chain that began at row j - k + 1, and sees exactly what that chain would::

    step 1, row j:   columns 0..j of step 1
    step 2, row j:   columns 0..j-1 of step 1, itself
    step 3, row j:   columns 0..j-2 of step 1, row j-1 of step 2, itself

so the chain's arithmetic is reproduced while its tokens agree with the text, which is all that
both training on the text and counting accepted tokens need.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.draft import DraftCache, DraftRows, MSDDraft


def chain_visibility(mask: Tensor, step: int) -> Tensor:
    """What step `step` (from 1) sees of all columns so far, ``[B, S, step * S]`` bool.

    mask: ``[B, S]`` bool, False at padding.
    """
    rows = mask.shape[1]
    row = torch.arange(rows, device=mask.device)[:, None]
    column = torch.arange(rows, device=mask.device)[None]
    blocks = [column <= row - (step - 1)]
    blocks += [column == row - (step - other) for other in range(2, step + 1)]
    visible = torch.cat(blocks, 1)
    return visible[None] & mask.repeat(1, step)[:, None]


def unroll(draft: MSDDraft, rows: DraftRows, steps: int) -> list[Tensor]:
    """Outputs ``[B, S, H]`` of drafting steps 1 to `steps` at every row.

    Rows near the start of a chain that would begin before row 0 hold numbers of no meaning; rows
    of no meaning never reach others.
    """
    cache = DraftCache()
    hidden = rows.hidden_states
    outputs = []
    for step in range(1, steps + 1):
        visible = chain_visibility(rows.attention_mask, step)
        # A row that sees nothing would turn into NaN and spoil its gradients.
        own = torch.arange(visible.shape[1], device=visible.device)
        visible[:, own, own + (step - 1) * visible.shape[1]] = True
        out = draft(rows.token_embeds, hidden, rows.visual_mask, rows.position_ids, visible, cache)
        outputs.append(out)
        hidden = torch.cat([rows.hidden_states[:, :1], out[:, :-1].to(hidden.dtype)], 1)
    return outputs


@dataclass
class ChainCount:
    """Verifications and emitted tokens of replayed replies."""

    verifications: int = 0
    tokens: int = 0
    accepted_at: list[int] | None = None

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, the bonus token counted."""
        return self.tokens / max(1, self.verifications)


def replay_chains(matches: Tensor, start: int, end: int, count: ChainCount) -> None:
    """Replay greedy chain drafting over one reply and add to `count`.

    Args:
        matches: ``[K, S]`` bool; ``matches[k, j]``: step k + 1 at row j guesses token j + 2, which
            is the text's (see `unroll`).
        start: position of the reply's first token, which the target itself has sampled.
        end: position of its last token.
    """
    steps = len(matches)
    if count.accepted_at is None:
        count.accepted_at = [0] * steps
    newest = start
    while newest < end:
        # Row newest - 1 pairs the last hidden state with the newest token; step k + 1 is k rows on.
        accepted = 0
        while (
            accepted < steps
            and newest + accepted < end
            and bool(matches[accepted, newest - 1 + accepted])
        ):
            count.accepted_at[accepted] += 1
            accepted += 1
        emitted = min(accepted + 1, end - newest)
        newest += emitted
        count.tokens += emitted
        count.verifications += 1

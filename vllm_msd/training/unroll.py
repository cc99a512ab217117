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

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_msd.draft import DraftCache, DraftRows, MSDDraft


def chain_visibility(
    mask: Tensor, step: int, first: int = 0, segments: Tensor | None = None
) -> Tensor:
    """What step `step` (from 1) sees of all columns so far, ``[B, rows, columns]`` bool.

    Args:
        mask: ``[B, S]`` bool, False at padding.
        step: its S - `first` rows (all S in step 1) see S columns of step 1, and as many of each
            later step as it has rows.
        first: of the sequence's rows, where the steps after the first begin.
        segments: ``[B, S]`` int, which record a row is of, where several are packed into one
            sequence; none sees another.
    """
    every = torch.arange(mask.shape[1], device=mask.device)
    late = every[first:]
    row = (every if step == 1 else late)[:, None]
    blocks = [every <= row - (step - 1)]
    blocks += [late == row - (step - other) for other in range(2, step + 1)]
    valid = torch.cat([mask] + [mask[:, first:]] * (step - 1), 1)
    visible = torch.cat(blocks, 1)[None] & valid[:, None]
    if segments is not None:
        columns = torch.cat([segments] + [segments[:, first:]] * (step - 1), 1)
        own = segments if step == 1 else segments[:, first:]
        visible &= own[:, :, None] == columns[:, None]
    return visible


def unroll(
    draft: MSDDraft,
    rows: DraftRows,
    steps: int,
    checkpointing: bool = False,
    first: int = 0,
    segments: Tensor | None = None,
) -> list[Tensor]:
    """Outputs ``[B, S, H]`` of drafting steps 1 to `steps` at every row.

    Rows near the start of a chain that would begin before row 0 hold numbers of no meaning; rows
    of no meaning never reach others.

    Args:
        draft: the draft model.
        rows: its inputs, right-padded.
        steps: how many.
        checkpointing: compute each step again on the way back, to save memory.
        first: row from which on outputs are wanted. Steps after the first leave out what comes
            before; their outputs there are 0.
        segments: of packed rows (see `chain_visibility`).
    """
    if steps == 1 and segments is None and _is_right_padded(rows.attention_mask):
        # Causal attention alone keeps right padding out of every real row.
        inputs = (rows.token_embeds, rows.hidden_states, rows.visual_mask, rows.position_ids)
        if checkpointing:
            return [checkpoint(draft, *inputs, use_reentrant=False)]
        return [draft(*inputs)]
    # Step k at row j needs step 2 at row j - k + 2.
    first = max(0, first - max(0, steps - 2))
    hidden = rows.hidden_states
    outputs: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(1, steps + 1):
        arguments = (draft, rows, hidden, step, first, keys, values, segments)
        if checkpointing:
            out, keys, values = checkpoint(_step, *arguments, use_reentrant=False)
        else:
            out, keys, values = _step(*arguments)
        outputs.append(out if step == 1 else F.pad(out, (0, 0, first, 0)))
        before = outputs[-1][:, :-1].to(hidden.dtype)
        hidden = torch.cat([rows.hidden_states[:, :1], before], 1)
    return outputs


def _step(
    draft: MSDDraft,
    rows: DraftRows,
    hidden: Tensor,
    step: int,
    first: int,
    keys: list[Tensor],
    values: list[Tensor],
    segments: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step over the keys and values of those before; leaves its arguments as they are."""
    visible = chain_visibility(rows.attention_mask, step, first, segments)
    # A row that sees nothing would turn into NaN and spoil its gradients.
    own = torch.arange(visible.shape[1], device=visible.device)
    visible[:, own, own + visible.shape[2] - visible.shape[1]] = True
    cache = DraftCache()
    cache.keys, cache.values = list(keys), list(values)
    if keys:
        mask = rows.attention_mask
        cache.valid = torch.cat([mask] + [mask[:, first:]] * (step - 2), 1)
    here = slice(first if step > 1 else 0, None)
    out = draft(
        rows.token_embeds[:, here],
        hidden[:, here],
        rows.visual_mask[:, here],
        rows.position_ids[:, here],
        visible,
        cache,
    )
    return out, cache.keys, cache.values


def _is_right_padded(mask: Tensor) -> bool:
    """Whether every row's real columns come first."""
    return bool((mask[:, :-1] >= mask[:, 1:]).all())


@dataclass
class ChainCount:
    """Verifications of replayed replies, and drafted tokens accepted at each depth.

    Counted as vLLM does: the token that every verification adds by itself is among the `tokens`,
    and a reply's last verification counts as a whole, also past the reply's end.
    """

    verifications: int = 0
    accepted_at: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that came of the verifications."""
        return self.verifications + sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, the target's own counted."""
        return self.tokens / max(1, self.verifications)

    def add(self, accepted: int) -> None:
        """Count one verification that accepted this many drafted tokens in a row."""
        self.verifications += 1
        self.accepted_at += [0] * (accepted - len(self.accepted_at))
        for depth in range(accepted):
            self.accepted_at[depth] += 1


def replay_chains(
    matches: Tensor, start: int, end: int, count: ChainCount, known: int | None = None
) -> list[tuple[int, int]]:
    """Replay greedy chain drafting over one reply and add to `count`.

    Args:
        matches: ``[K, S]`` bool; ``matches[k, j]``: step k + 1 at row j guesses token j + 2, which
            is the text's (see `unroll`).
        start: position of the reply's first token, which the target itself has sampled.
        end: position of its last token.
        known: position of the last token that the target has said, as if the reply went on;
            `end` if not given.

    Returns:
        Each verification's row of step 1, and how many tokens it accepted.
    """
    known = end if known is None else known
    newest, found = start, []
    while newest < end:
        # Row newest - 1 pairs the last hidden state with the newest token; step k + 1 is k rows on.
        accepted = 0
        while (
            accepted < len(matches)
            and newest + accepted < known
            and bool(matches[accepted, newest - 1 + accepted])
        ):
            accepted += 1
        count.add(accepted)
        found.append((newest - 1, accepted))
        newest += accepted + 1
    return found

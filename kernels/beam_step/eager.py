"""A beam step as its definition reads, on whole tensors."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .api import Beams, Candidates, DraftPlace, LevelInputs

NO_SLOT = -1


def beam_step_eager(
    log_probs: Tensor,
    tokens: Tensor,
    level: int,
    candidates: "Candidates",
    beams: "Beams",
    inputs: "LevelInputs | None",
    parent_hidden: Tensor | None,
    place: "DraftPlace | None",
) -> None:
    """Same as ``beam_step``."""
    depth, _, k = beams.numbers.shape
    num_requests = len(log_probs) // (k if level else 1)
    scores, tokens = log_probs.view(num_requests, -1), tokens.view(num_requests, -1)
    if level == 0:
        begin, parents = 0, torch.full_like(tokens, -1)
    else:
        begin = k + (level - 1) * k * k
        beam = beams.numbers[level - 1, :num_requests].repeat_interleave(k, 1)
        scores = scores + candidates.scores[:num_requests].gather(1, beam.long())
        parents = beam
    for kept, new in zip(candidates, (scores, tokens, parents), strict=True):
        kept[:num_requests, begin : begin + new.shape[1]] = new
    if level == depth or inputs is None or parent_hidden is None or place is None:
        return  # the last step writes no rows

    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    from_row = best // k
    beams.numbers[level, :num_requests] = begin + best
    row = torch.arange(k, device=best.device)
    ancestors = (torch.ones_like(best) << (level * k + row)).view(num_requests, k)
    if level > 0:
        ancestors = ancestors | beams.ancestors[level - 1, :num_requests].gather(1, from_row)
    beams.ancestors[level, :num_requests] = ancestors

    is_real = place.slots[:num_requests] >= 0
    first = place.first[:num_requests]
    if level == 0:
        fits = is_real & (first + depth * k <= place.max_model_len)
        beams.tree_start[:num_requests] = torch.where(fits, first, -1)
    length = (first + (level + 1) * k).clamp(max=place.max_model_len)
    inputs.seq_lens[:num_requests] = torch.where(is_real, length, 0)

    num_rows = num_requests * k
    inputs.input_ids[:num_rows] = tokens.gather(1, best).flatten()
    rotary = torch.where(is_real, (first + level).clamp(max=place.max_model_len - 1), 0)
    inputs.positions[:num_rows] = rotary.repeat_interleave(k)
    inputs.kv_slots[:num_rows] = _kv_slots(first[:, None] + level * k + row, is_real, place)
    parents_of_request = parent_hidden.unflatten(0, (num_requests, -1))
    request = torch.arange(num_requests, device=best.device)[:, None]
    inputs.hidden[:num_rows] = parents_of_request[request, from_row].flatten(0, 1)


def _kv_slots(positions: Tensor, is_real: Tensor, place: "DraftPlace") -> Tensor:
    """``[R * k]`` int64 of ``[R, k]`` positions."""
    has_slot = is_real[:, None] & (positions < place.max_model_len)
    inside = torch.where(has_slot, positions, 0)
    request_slots = place.slots[: len(positions)].clamp(min=0).long()[:, None]
    block = place.block_table[request_slots, inside // place.block_size].long()
    kv_slots = block * place.block_size + inside % place.block_size
    return torch.where(has_slot, kv_slots, NO_SLOT).flatten()

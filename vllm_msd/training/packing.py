"""Several records in one row of the draft's batch, so that less of it is padding.

A row is as wide as the longest record, and no record sees another: `segments` numbers the records
of a row from 1, 0 at padding. Positions start anew with each; losses are those of a padded batch.
The target's own pass stays padded: vision-language families number their positions themselves.
"""

import torch
from torch import Tensor

from vllm_msd.draft import DraftRows


def bins(lengths: list[int], width: int) -> list[list[int]]:
    """Numbers of records by row, no row longer than the width: the longest first, where it fits."""
    found: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = next((i for i, left in enumerate(room) if left >= lengths[number]), len(room))
        if place == len(room):
            found.append([])
            room.append(width)
        found[place].append(number)
        room[place] -= lengths[number]
    return found


def pack(
    rows: DraftRows, hidden: Tensor, mask: Tensor, lengths: list[int]
) -> tuple[DraftRows, Tensor, Tensor, Tensor]:
    """Pack a right-padded batch.

    Args:
        rows: the draft's inputs. hidden: ``[B, S, H]``. mask: ``[B, S]`` rows that count.
        lengths: of the B records.

    Returns:
        The same, packed, and ``segments``, int64 ``[B', S]``.
    """
    batch, width = mask.shape
    placed = bins(lengths, width)
    source = torch.zeros(len(placed), width, dtype=torch.long)
    segments = torch.zeros_like(source)
    for row, numbers in enumerate(placed):
        start = 0
        for segment, number in enumerate(numbers, 1):
            end = start + lengths[number]
            source[row, start:end] = number * width + torch.arange(lengths[number])
            segments[row, start:end] = segment
            start = end
    source, segments = source.to(mask.device), segments.to(mask.device)

    def taken(x: Tensor) -> Tensor:
        return x.reshape(batch * width, *x.shape[2:])[source]

    is_real = segments > 0
    packed = DraftRows(*map(taken, rows))
    packed = packed._replace(
        visual_mask=packed.visual_mask & is_real, attention_mask=packed.attention_mask & is_real
    )
    return packed, taken(hidden), taken(mask) & is_real, segments

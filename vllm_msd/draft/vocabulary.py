"""A draft vocabulary: the target tokens that a draft proposes, a part of the target's own.

A checkpoint keeps it as EAGLE-3's do: ``draft_vocab_size`` in its config, and a tensor ``d2t`` of
as many offsets, so that draft token i stands for target token ``i + d2t[i]``.
"""

import torch
from torch import Tensor

from vllm_msd.errors import ConfigError

OFFSETS = "d2t"  # the tensor's name


def token_ids_of(offsets: Tensor) -> Tensor:
    """``[D]`` offsets as a checkpoint holds them, to int64 ``[D]`` target token ids."""
    return torch.arange(len(offsets), device=offsets.device) + offsets


def offsets_of(token_ids: Tensor) -> Tensor:
    """``[D]`` target token ids to int64 ``[D]`` offsets as a checkpoint holds them."""
    return token_ids - torch.arange(len(token_ids), device=token_ids.device)


def check_token_ids(token_ids: Tensor, vocab_size: int, whose: str) -> None:
    """Raise `ConfigError` unless every id is one of the target's, and none comes twice.

    Args:
        token_ids: ``[D]`` integer.
        vocab_size: tokens that the target has.
        whose: what the number is called in the message.
    """
    outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    if len(outside):
        raise ConfigError(
            f"draft vocabulary ({OFFSETS}): got the token id {int(outside[0])}, expected 0 to "
            f"{vocab_size - 1} ({whose}). Is {OFFSETS} a table of offsets from the draft's id to "
            "the target's? Trim the draft again: vllm-msd trim --help"
        )
    found, counts = token_ids.unique(return_counts=True)
    if len(found) < len(token_ids):
        raise ConfigError(
            f"draft vocabulary ({OFFSETS}): got the token id {int(found[counts > 1][0])} more than "
            "once, expected every id once. Trim the draft again: vllm-msd trim --help"
        )

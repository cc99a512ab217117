"""The k most probable tokens as their definition reads, and the partial results of its parts."""

import torch
from torch import Tensor

INDEX_BITS = 0x7FFFFFFF
NOTHING = -(2**63)
MINUS_INF = float("-inf")


def nan_to_minus_inf(x: Tensor) -> Tensor:
    """And +inf to the largest finite number."""
    return x.nan_to_num(nan=MINUS_INF, neginf=MINUS_INF)


def top_k_eager(logits: Tensor, k: int, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Same as ``top_k``: log-probabilities and ids of the k best columns."""
    x = nan_to_minus_inf(logits.float())
    log_probs = nan_to_minus_inf(x.log_softmax(-1))
    best = x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return log_probs.gather(1, best), best if token_ids is None else token_ids[best]


def order_keys(values: Tensor, indices: Tensor) -> Tensor:
    """int64 keys that order float32 values first and earlier indices before later ones."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & INDEX_BITS)
    return (ordered.long() << 32) | (INDEX_BITS - indices)


def top_k_parts_eager(logits: Tensor, k: int, first_column: int, width: int, out: Tensor) -> None:
    """Same as ``top_k_parts``, into ``out``: of every ``width`` columns the best keys and sums."""
    out.fill_(NOTHING)
    for part, x in enumerate(nan_to_minus_inf(logits.float()).split(width, dim=1)):
        values, columns = x.sort(dim=-1, descending=True, stable=True)
        keys = order_keys(values, columns + first_column + part * width)[:, :k]
        out[:, part, : keys.shape[1]] = keys
        out[:, part, k] = x.logsumexp(-1).view(torch.int32)


def merge_top_k_eager(parts: Tensor, k: int, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same as ``merge_top_k``."""
    log_sum = parts[..., k].int().view(torch.float32).logsumexp(-1, keepdim=True)
    keys = parts[..., :k].flatten(1).sort(dim=-1, descending=True).values[:, :k]
    ordered = (keys >> 32).int()
    values = (ordered ^ ((ordered >> 31) & INDEX_BITS)).view(torch.float32)
    values = torch.where(keys == NOTHING, MINUS_INF, values)
    log_probs = nan_to_minus_inf((values - log_sum).clamp(max=0))
    columns = torch.where(keys == NOTHING, 0, INDEX_BITS - (keys & INDEX_BITS))
    return log_probs, columns if token_ids is None else token_ids[columns]

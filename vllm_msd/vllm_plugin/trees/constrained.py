"""Requests whose next logits depend on the drafted rows before them: they get a chain.

Penalties, forbidden words, structured output and the thinking budget read the drafted tokens of a
request row by row and take each row for the successor of the row above. In a tree that is wrong; in
a chain it is exact. So such a request's tree is laid out as one chain, best path first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_msd.tree import chain_parents
from vllm_msd.tree.relations import JUMPS

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def needs_chain(sampling_params: SamplingParams | None) -> bool:
    """Whether something of this request reads drafted rows as a chain.

    ``min_tokens`` is not among them: Model Runner V2 goes by each row's position.
    """
    p = sampling_params
    return p is not None and bool(
        p.presence_penalty != 0
        or p.frequency_penalty != 0
        or p.repetition_penalty != 1
        or p.bad_words
        or p.structured_outputs is not None
        or p.thinking_token_budget is not None
    )


def lay_out_chains(tokens: Tensor, parents: Tensor, as_chain: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the trees of some requests into chains of the same nodes. Reads nothing on the host.

    The root's first child, its first child and so on come first, in the order of the draft's own
    preference; the other nodes stand behind them, where they are hardly ever accepted.

    Args:
        tokens: ``[B, T]`` int64, node 0 is the root.
        parents: ``[B, T]`` int64, -1 at node 0, an earlier node everywhere else.
        as_chain: ``[B]`` bool, the requests to turn.

    Returns:
        tokens and parents, both ``[B, T]`` int64.
    """
    num_nodes = parents.shape[1]
    node = torch.arange(num_nodes, device=parents.device)
    earlier_sibling = (parents[:, :, None] == parents[:, None, :]) & (node < node[:, None])
    best = ~earlier_sibling.any(-1)
    up = parents.clamp(min=0)
    for _ in range(min(JUMPS, (num_nodes - 1).bit_length())):
        best = best & best.gather(1, up)  # a node is on the path only if its ancestors are
        up = up.gather(1, up)
    order = best.long().sort(dim=1, descending=True, stable=True).indices
    turn = as_chain[:, None]
    return (
        torch.where(turn, tokens.gather(1, order), tokens),
        torch.where(turn, chain_parents(*parents.shape, device=parents.device), parents),
    )

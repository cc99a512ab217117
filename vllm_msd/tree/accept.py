"""Acceptance: draw one token after every node, then walk down the tree along the draws.

A node's children have distinct tokens, chosen without chance. Recursive rejection sampling over
such children accepts child c with exactly the target's probability of its token, which is what
drawing once and looking for the draw among the children does. So one rule serves greedy decoding
and every sampling setting, and the tokens emitted are the target's own draws. (The reference draws
the token after a leaf from the unwarped distribution; here it is a draw like any other.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.tree.record import DraftTree
from vllm_msd.tree.relations import JUMPS


@dataclass(frozen=True)
class Acceptance:
    """Outcome of verifying one tree of T nodes per request. All int64.

    ``lengths [B]``: accepted draft tokens, the root not counted. ``nodes [B, T]``: the root and the
    accepted nodes, one per depth, padded with -1. ``tokens [B, T]``: the target's draw after each
    of them, padded with -1; these are the ``lengths + 1`` tokens to emit. ``next_tokens [B]``: the
    last of them, the root of the next tree.
    """

    lengths: Tensor
    nodes: Tensor
    tokens: Tensor
    next_tokens: Tensor


def accept(tree: DraftTree, drawn: Tensor, num_nodes: Tensor | None = None) -> Acceptance:
    """Accept the path whose every token is the target's draw after its parent.

    Reads nothing on the host.

    Args:
        tree: trees whose siblings have distinct tokens, so that there is one such path at most.
        drawn: ``[B, T]`` int64 the target's token after each node: its argmax, or a sample.
        num_nodes: ``[B]`` int64 nodes of each tree, the root included; nodes beyond are padding
            with any parent that comes earlier. None: all are real.
    """
    up = tree.parents.clamp(min=0)
    node = torch.arange(tree.num_nodes, device=drawn.device)
    fits = tree.tokens == drawn.gather(1, up)
    if num_nodes is not None:
        fits &= node < num_nodes[:, None]
    fits[:, 0] = True
    for _ in range(min(JUMPS, (tree.num_nodes - 1).bit_length())):
        fits = fits & fits.gather(1, up)  # a node stands only if its whole path does
        up = up.gather(1, up)
    lengths = torch.where(fits, tree.depths, 0).amax(1)

    # The accepted nodes are a chain, one per depth; the extra column takes the rejected ones.
    nodes = torch.full((len(fits), tree.num_nodes + 1), -1, device=drawn.device)
    nodes.scatter_(1, torch.where(fits, tree.depths, tree.num_nodes), node.expand_as(fits))
    nodes = nodes[:, :-1].contiguous()
    tokens = torch.where(nodes >= 0, drawn.gather(1, nodes.clamp(min=0)), -1)
    return Acceptance(lengths, nodes, tokens, tokens.gather(1, lengths[:, None])[:, 0])

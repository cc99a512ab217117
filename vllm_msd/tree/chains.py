"""Trees laid out as chains, for requests whose logits depend on the drafted rows before them.

What reads the drafted tokens of a request row by row takes each row for the successor of the row
above. In a tree that is wrong; in a chain it is exact.
"""

import torch
from torch import Tensor

from vllm_msd.tree.record import DraftTree
from vllm_msd.tree.relations import chain_parents


def lay_out_chains(tree: DraftTree, as_chain: Tensor) -> DraftTree:
    """Turn the trees of some requests into chains of the same nodes. Reads nothing on the host.

    The root's first child, its first child and so on come first, in the order of the draft's own
    preference; the other nodes stand behind them, where they are hardly ever accepted and score
    minus infinity.

    Args:
        tree: B trees.
        as_chain: ``[B]`` bool, the requests to turn.
    """
    parents = tree.parents
    node = torch.arange(tree.num_nodes, device=parents.device)
    chain = chain_parents(len(parents), tree.num_nodes, parents.device)
    has_earlier_sibling = (
        (parents[:, :, None] == parents[:, None, :]) & (node < node[:, None])
    ).any(-1)
    others = (has_earlier_sibling.long() << node).sum(1, keepdim=True)  # as a mask of nodes
    is_best = tree.ancestors & others == 0  # a first child, as are all its ancestors
    order = is_best.long().sort(dim=1, descending=True, stable=True).indices
    turn = as_chain[:, None]
    scores = tree.scores
    if scores is not None:
        ordered = scores.gather(1, order).masked_fill(~is_best.gather(1, order), -torch.inf)
        scores = torch.where(turn, ordered, scores)
    return DraftTree.from_parents(
        torch.where(turn, tree.tokens.gather(1, order), tree.tokens),
        torch.where(turn, chain, parents),
        check=False,
        scores=scores,
    )

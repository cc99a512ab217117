"""Dynamic draft trees in plain PyTorch, batched over requests.

``record.py`` is the tree itself, ``grow.py`` expands and reranks it, ``tensors.py`` derives the
tensors that verification needs, ``accept.py`` walks it greedily, ``drafting.py`` connects growing
to the draft model.
"""

from vllm_msd.tree.accept import Acceptance, accept_greedy
from vllm_msd.tree.drafting import draft_tree
from vllm_msd.tree.grow import TreeShape, grow_tree
from vllm_msd.tree.record import DraftTree
from vllm_msd.tree.tensors import retrieve_indices, tree_mask

__all__ = [
    "Acceptance",
    "DraftTree",
    "TreeShape",
    "accept_greedy",
    "draft_tree",
    "grow_tree",
    "retrieve_indices",
    "tree_mask",
]

"""Dynamic draft trees in plain PyTorch, batched over requests.

``record.py`` is the tree itself, ``relations.py`` derives depths and ancestors from parents,
``config.py`` is its size as users give it, ``grow.py`` expands and reranks it, ``tensors.py``
derives the tensors that verification needs, ``accept.py`` walks it, ``settle.py`` makes the walk a
chain, ``drafting.py`` connects growing to the draft model.
"""

from vllm_msd.tree.accept import Acceptance, accept
from vllm_msd.tree.config import TreeConfig
from vllm_msd.tree.drafting import draft_tree
from vllm_msd.tree.grow import TreeShape, grow_tree
from vllm_msd.tree.record import MAX_NODES, DraftTree
from vllm_msd.tree.relations import chain_parents, tree_relations
from vllm_msd.tree.settle import settle_index
from vllm_msd.tree.tensors import retrieve_indices, tree_mask

__all__ = [
    "MAX_NODES",
    "Acceptance",
    "DraftTree",
    "TreeConfig",
    "TreeShape",
    "accept",
    "chain_parents",
    "draft_tree",
    "grow_tree",
    "retrieve_indices",
    "settle_index",
    "tree_mask",
    "tree_relations",
]

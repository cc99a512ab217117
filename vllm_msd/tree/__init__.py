"""Dynamic draft trees in plain PyTorch, batched over requests.

``record.py`` is the tree itself, ``relations.py`` derives depths and ancestors from parents,
``config.py`` is its size as users give it, ``grow.py`` expands and reranks it, ``fused.py`` does so
by kernels, ``levels.py`` says where the rows of its levels stand in a cache, ``drafting.py``
connects growing to the draft model, ``chains.py`` turns trees into chains. ``store.py`` keeps an
engine's trees and takes them through a step; ``rows.py`` is what attention sees of them,
``path.py`` gathers rows along the accepted path. The walk that accepts a path is
`vllm_msd.kernels.accept`.
"""

from vllm_msd.tree.chains import lay_out_chains
from vllm_msd.tree.config import TreeConfig
from vllm_msd.tree.drafting import draft_tree
from vllm_msd.tree.fused import GrowthBuffers, Vocabulary, grow_tree_fused
from vllm_msd.tree.grow import TreeShape, grow_tree
from vllm_msd.tree.levels import DraftLevels
from vllm_msd.tree.path import path_index
from vllm_msd.tree.record import DraftTree
from vllm_msd.tree.relations import chain_parents, tree_relations
from vllm_msd.tree.rows import TreeRows, draft_level
from vllm_msd.tree.store import TreeStore

__all__ = [
    "DraftLevels",
    "DraftTree",
    "GrowthBuffers",
    "TreeConfig",
    "TreeRows",
    "TreeShape",
    "TreeStore",
    "Vocabulary",
    "chain_parents",
    "draft_level",
    "draft_tree",
    "grow_tree",
    "grow_tree_fused",
    "lay_out_chains",
    "path_index",
    "tree_relations",
]

"""Attention kernels for speculative decoding over token trees, importable as ``vllm_msd.kernels``.

Each kernel has a folder of its own that holds the Triton code and, beside it, an eager twin that
reads like the definition; tests compare the two. Nothing here imports vLLM, and Triton is imported
only when a kernel is launched. ``docs/kernels.md`` says what there is and what it costs.
"""

# The functions take the names of their folders: ``from vllm_msd.kernels import tree_attention``.
from .accept.api import AcceptedPaths, accept
from .settle.api import LayerCaches, settle
from .tree_attention.api import TreeAttentionWorkspace, tree_attention
from .tree_attention.eager import MAX_NODES, ancestor_bits

__all__ = [
    "MAX_NODES",
    "AcceptedPaths",
    "LayerCaches",
    "TreeAttentionWorkspace",
    "accept",
    "ancestor_bits",
    "settle",
    "tree_attention",
]

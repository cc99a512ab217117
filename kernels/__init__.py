"""Kernels for speculative decoding over token trees, importable as ``vllm_msd.kernels``.

Each kernel has a folder of its own that holds the Triton code and, beside it, an eager twin that
reads like the definition; tests compare the two. Nothing here imports vLLM, and Triton is imported
only when a kernel is launched. ``docs/kernels.md`` says what there is and what it costs.
"""

# The functions take the names of their folders: ``from vllm_msd.kernels import tree_attention``.
from .accept.api import AcceptedPaths, accept
from .beam_step.api import Beams, Candidates, DraftPlace, LevelInputs, beam_step
from .draft_prefill.api import PrefillRows, Verified, draft_prefill
from .place_trees.api import place_trees
from .rerank.api import rerank
from .settle.api import LayerCaches, settle
from .top_k.api import TopK, allocate_parts, merge_top_k, top_k, top_k_parts
from .tree_attention.api import TreeAttentionWorkspace, tree_attention
from .tree_attention.eager import MAX_NODES, ancestor_bits

__all__ = [
    "MAX_NODES",
    "AcceptedPaths",
    "Beams",
    "Candidates",
    "DraftPlace",
    "LayerCaches",
    "LevelInputs",
    "PrefillRows",
    "TopK",
    "TreeAttentionWorkspace",
    "Verified",
    "accept",
    "allocate_parts",
    "ancestor_bits",
    "beam_step",
    "draft_prefill",
    "merge_top_k",
    "place_trees",
    "rerank",
    "settle",
    "top_k",
    "top_k_parts",
    "tree_attention",
]

"""vLLM's TRITON_ATTN, following trees."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_msd.vllm_plugin.gpu.attention import TreeAttentionImpl
from vllm_msd.vllm_plugin.gpu.split import TreeMetadataBuilder


class TreeTritonMetadataBuilder(TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    """Builds TRITON_ATTN's metadata, also of the requests without drafts alone."""


class TreeTritonAttentionImpl(TreeAttentionImpl, TritonAttentionImpl):
    """TRITON_ATTN for requests without drafts, the tree kernel for the others."""

    takes_float8_cache = True


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """TRITON_ATTN that follows the trees on the metadata (`vllm_msd.tree.TreeRows`)."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonMetadataBuilder]:
        return TreeTritonMetadataBuilder

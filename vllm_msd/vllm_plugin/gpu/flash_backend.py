"""vLLM's FLASH_ATTN, following trees. Its KV cache is laid out as TRITON_ATTN's."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_msd.vllm_plugin.gpu.attention import TreeAttentionImpl
from vllm_msd.vllm_plugin.gpu.split import TreeMetadataBuilder


class TreeFlashMetadataBuilder(TreeMetadataBuilder, FlashAttentionMetadataBuilder):
    """Builds FLASH_ATTN's metadata, also of the requests without drafts alone."""


class TreeFlashAttentionImpl(TreeAttentionImpl, FlashAttentionImpl):
    """FLASH_ATTN for requests without drafts, the tree kernel for the others."""

    takes_float8_cache = False


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """FLASH_ATTN that follows the trees on the metadata (`vllm_msd.tree.TreeRows`)."""

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashMetadataBuilder]:
        return TreeFlashMetadataBuilder

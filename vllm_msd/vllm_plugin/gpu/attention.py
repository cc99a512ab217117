"""Tree attention on NVIDIA GPUs, around the backend that the engine would have without trees.

Requests with drafts go through our kernel, all others through the parent (see `split`). Everything
else is the parent's: cache layout, cache update, metadata and what it says about CUDA graphs. Under
full graphs nothing here depends on the contents of a tensor, so a graph captured with trees
attached serves every later step, provided that the tensors of `TreeRows` stay where they are.

Here is what the parents have in common; `flash_backend` and `triton_backend` give them to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_msd.errors import ConfigError
from vllm_msd.kernels import TreeAttentionWorkspace, tree_attention
from vllm_msd.kernels.tree_attention.api import HEAD_SIZES
from vllm_msd.tree import TreeRows
from vllm_msd.vllm_plugin.configuration.tree_backend import TREE_BACKENDS
from vllm_msd.vllm_plugin.configuration.tree_settings import wants_trees
from vllm_msd.vllm_plugin.gpu.backend import attends_over_paths
from vllm_msd.vllm_plugin.gpu.split import REST, Rest
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.attention import replace_backend, trees_for

# Larger batches are split less often; 67 MB for 32 heads of size 128.
WORKSPACE_TOKENS = 128
_CHAIN = "Draft a chain instead: set tree_top_k to 1."


def register() -> None:
    """Put our backends in the places of vLLM's, for engines made from now on.

    On a CPU the place is that of the one backend there, where TRITON_ATTN already stands in it (see
    `backend.attends_over_paths`); the CPU's own stays.

    Call it in each worker process of an engine with trees, before the target is loaded: attention
    layers ask for the backend as they are built. Without trees on the metadata a backend does what
    its parent does.

    Raises:
        ConfigError: the platform has no such backend.
        PatchError: vLLM's backend has changed.
    """
    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionBackend

    if current_platform.is_cpu() and not attends_over_paths():
        _put("CPU_ATTN", TreeTritonAttentionBackend)
        return
    if not current_platform.is_cuda():
        raise ConfigError(
            f"draft trees run on NVIDIA GPUs and on the CPU, not on {current_platform.device_name}."
            f" {_CHAIN}"
        )
    from vllm_msd.vllm_plugin.gpu.flash_backend import TreeFlashAttentionBackend

    for backend in (TreeTritonAttentionBackend, TreeFlashAttentionBackend):
        _put(backend.get_name(), backend)


def _put(place: str, backend: Any) -> None:
    check_overrides(backend.get_impl_cls())
    check_overrides(backend.get_builder_cls())
    replace_backend(place, backend)


def check_backend(layers: Iterable[Any]) -> None:
    """Refuse attention layers that would ignore the trees.

    Raises:
        ConfigError: a layer uses another backend than these.
    """
    for layer in layers:
        if not isinstance(layer.impl, TreeAttentionImpl):
            raise ConfigError(
                f"attention_backend: got {layer.attn_backend.get_name()}, but draft trees on a GPU "
                f"need {' or '.join(TREE_BACKENDS)}. Leave it out or set it to one of these. "
                f"{_CHAIN}"
            )


def provide_workspace(layers: Iterable[Any], device: torch.device) -> None:
    """Give all layers of an engine that follow trees one workspace for their split launches.

    Layers run one after another, so they can share it; CUDA graphs find it where it was. Call it
    before vLLM measures free memory.
    """
    found = (getattr(layer, "impl", None) for layer in layers)
    impls = [impl for impl in found if getattr(impl, "follows_trees", False)]
    if impls:
        heads, size = (max(getattr(i, n) for i in impls) for n in ("num_heads", "head_size"))
        workspace = TreeAttentionWorkspace.allocate(WORKSPACE_TOKENS, heads, size, device=device)
        for impl in impls:
            impl.workspace = workspace


@dataclass
class _Pass:
    """The requests with trees of one forward pass, cut out of vLLM's metadata for all layers.

    ``checked``: the kinds of layers whose arguments were checked.
    """

    metadata: Any
    rest: Rest | None
    rows: int
    batch: tuple[Tensor, ...]  # block_table, seq_lens, query_start, tree_start, ancestors
    max_query_len: int
    checked: set[tuple[int, ...]] = field(default_factory=set)

    @classmethod
    def of(cls, metadata: Any, tree: TreeRows) -> _Pass:
        """Cut them out, or find what another layer has cut out."""
        if id(metadata) not in tree.derived:
            rest: Rest | None = None if tree.is_draft else getattr(metadata, REST, None)
            requests, rows = len(metadata.seq_lens), metadata.num_actual_tokens
            max_query_len = metadata.max_query_len
            if rest is not None:
                requests, rows = rest.split.requests, rest.split.rows
                max_query_len = rest.split.max_query_len
            batch = (
                metadata.block_table[:requests],
                metadata.seq_lens[:requests],
                metadata.query_start_loc[: requests + 1],
                tree.tree_start[:requests],
                tree.ancestors[:rows],
            )
            tree.derived[id(metadata)] = cls(metadata, rest, rows, batch, max_query_len)
        shared: _Pass = tree.derived[id(metadata)]
        return shared


class TreeAttentionImpl(AttentionImpl):
    """Mixed into the parent's implementation of one layer's attention.

    ``follows_trees``: whether the engine has trees and this layer is one of its decoder's.
    ``workspace``: room for split launches, from `provide_workspace`; None: each makes its own.

    Raises:
        ConfigError: the engine has trees and this layer needs what the kernel cannot do.
    """

    follows_trees = False
    workspace: TreeAttentionWorkspace | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        if self.attn_type != AttentionType.DECODER or not wants_trees(config):
            return
        check_layer(self, config)
        # A float8 cache is multiplied out inside the kernel; queries stay as they are.
        self.supports_quant_query_input = False
        self.follows_trees = True

    @override
    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not with trees: the kernel writes the type of its queries."""
        return not self.follows_trees and super().fused_output_quant_supported(quant_key)

    @override
    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As the parent's; the metadata may carry trees. Reads no tensor on the host.

        Raises:
            RuntimeError: trees in an engine that was not made for them.
            ValueError: trees that do not fit the batch.
        """
        tree = trees_for(layer, attn_metadata)
        if tree is None:
            usual = (layer, query, key, value, kv_cache, attn_metadata, output)
            return super().forward(*usual, *args, **kwargs)
        if not self.follows_trees:
            raise RuntimeError("Draft trees on the metadata of an engine that drafts none")
        shared = _Pass.of(attn_metadata, tree)
        rows, kind = shared.rows, (self.num_heads, self.num_kv_heads, self.head_size)
        key_cache, value_cache = self.split_cache(kv_cache)
        quantized = self.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
        tree_attention(
            query[:rows],
            key_cache,
            value_cache,
            *shared.batch,
            self.scale,
            out=output[:rows],
            k_scale=layer._k_scale if quantized else None,
            v_scale=layer._v_scale if quantized else None,
            max_query_len=shared.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
            workspace=self.workspace,
            check=kind not in shared.checked,
        )
        shared.checked.add(kind)
        if shared.rest is not None:
            behind = [x if x is None else x[rows:] for x in (query, key, value)]
            rest = (layer, *behind, kv_cache, shared.rest.metadata, output[rows:])
            super().forward(*rest, *args, **kwargs)
        return output

    def split_cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of keys and values, ``[num_blocks, block_size, kv_heads, head_size]`` each.

        Args:
            kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]`` as vLLM binds it to the
                layer; a float8 cache comes as bytes.
        """
        if self.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)


def check_layer(impl: Any, config: VllmConfig) -> None:
    """Refuse a layer whose attention the tree kernel does not compute.

    Raises:
        ConfigError: with everything that stands in the way.
    """
    model = config.model_config
    cache_types = {"auto": model.dtype, "float16": torch.float16, "bfloat16": torch.bfloat16}
    plain = cache_types.get(impl.kv_cache_dtype) == model.dtype
    float8 = impl.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
    reasons = {
        f"head size {impl.head_size} (it does {', '.join(map(str, HEAD_SIZES))})": (
            impl.head_size not in HEAD_SIZES
        ),
        f"kv_cache_dtype {impl.kv_cache_dtype!r} with {model.dtype}": not plain and not float8,
        "a float8 cache beside FLASH_ATTN, whose queries are float8 too (TRITON_ATTN's are not)": (
            float8 and not impl.takes_float8_cache
        ),
        "a sliding window": impl.sliding_window != (-1, -1) or model.rswa_window is not None,
        "chunked attention": getattr(impl, "chunk_lookback", -1) >= 0,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on the scores": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "attention that is not causal": (
            model.is_mm_prefix_lm or config.attention_config.use_non_causal
        ),
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
    }
    found = [name for name, is_so in reasons.items() if is_so]
    if found:
        raise ConfigError(
            f"draft trees: the attention kernel does not do {', nor '.join(found)}. {_CHAIN}"
        )

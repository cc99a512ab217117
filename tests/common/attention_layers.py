"""Layers of vLLM's with the tree backends, outside any model, over vLLM's own caches."""

from pathlib import Path
from typing import Any

import torch

from tests.common import tiny
from vllm_msd.tree import TreeRows
from vllm_msd.vllm_plugin.trees.attention import ATTRIBUTE

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
LAYER = "layers.0.attn"


def tree_and_chain_configs(folder: Path) -> dict[str, Any]:
    """vLLM's configuration of an engine with trees, and of one without."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_msd.vllm_plugin import plugin

    plugin.register()
    pair = tiny.build_pair(folder, "llava")
    tree = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 3}
    common = {"model": pair.target, "dtype": "float32", "max_model_len": 512}
    return {
        name: EngineArgs(
            **common, speculative_config={"method": "msd", "model": pair.draft, **keys}
        ).create_engine_config()
        for name, keys in (("trees", tree), ("chains", {"num_speculative_tokens": 4}))
    }


def make_layer(config, backend=None, **arguments):
    """A layer of vLLM's with our backend, outside any model."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionBackend

    arguments = {"num_heads": HEADS, "head_size": HEAD_SIZE, "num_kv_heads": KV_HEADS} | arguments
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        return Attention(
            **arguments,
            scale=HEAD_SIZE**-0.5,
            prefix="layers.0.attn",
            attn_backend=backend or TreeTritonAttentionBackend,
        )


def make_metadata(batch, padded_rows=0, padded_requests=0, tree=None):
    """The parent's metadata of a batch, padded as CUDA graphs are, with trees attached."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    _, _, _, table, seq_lens, starts = batch.args[:6]
    pad = torch.zeros(padded_requests, dtype=torch.int32)
    rows = int(starts[-1])
    metadata = TritonAttentionMetadata(
        num_actual_tokens=rows + padded_rows,
        max_query_len=max(r.query_len for r in batch.requests),
        query_start_loc=torch.cat([starts, pad + rows]),
        max_seq_len=512,
        seq_lens=torch.cat([seq_lens, pad]),
        block_table=torch.cat([table, pad[:, None].expand(-1, table.shape[1])]),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        seq_threshold_3D=None,
        num_par_softmax_segments=None,
        softmax_segm_output=None,
        softmax_segm_max=None,
        softmax_segm_expsum=None,
        causal=True,
    )
    if tree is not None:
        setattr(metadata, ATTRIBUTE, tree)
    return metadata


def rows_of(batch, is_draft=False, spare=0):
    """The batch's trees; ``spare`` rows and requests behind them hold what must not matter."""
    return TreeRows(
        torch.cat([batch.args[6], torch.full((spare,), -1, dtype=torch.int32)]),
        torch.cat([batch.args[7], torch.full((spare,), 3)]),
        is_draft,
    )


def write_cache(layer, batch, layout, block_size=16):
    """vLLM's cache of two layers, filled by its own kernel; returns the second layer's view."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheTensor,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    blocks, layout = int(batch.args[3].max()) + 1, KVCacheLayout[layout]
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32
    )
    page = spec.page_size_bytes
    backing = torch.full((2 * blocks * page,), -1, dtype=torch.int8)  # NaN in float32
    tensor = KVCacheTensor(
        size=len(backing),
        layers=["0", "1"],
        layer_stride=page * blocks if layout.is_layer_compact else page,
        block_stride=page if layout.is_layer_compact else 2 * page,
    )
    view = create_kv_cache_views(backing, spec, blocks, layout, tensor)[1]
    assert view.isnan().all()
    for request, key, value in zip(range(len(batch.keys)), batch.keys, batch.values, strict=True):
        position = torch.arange(len(key))
        block = batch.args[3][request, position // block_size].long()
        slots = block * block_size + position % block_size
        layer.impl.do_kv_cache_update(layer, key, value, view, slots)
    return view


def run(layer, batch, cache, metadata):
    query = batch.args[0]
    output = torch.full((metadata.num_actual_tokens, HEADS, HEAD_SIZE), 7.0)
    query = torch.cat([query, torch.ones(len(output) - len(query), HEADS, HEAD_SIZE)])
    return layer.impl.forward(layer, query, None, None, cache, metadata, output)


def common_metadata(batch, block_size=16):
    """What vLLM's runner tells a metadata builder about a batch."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    _, _, _, table, seq_lens, starts = batch.args[:6]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=len(seq_lens),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(r.query_len for r in batch.requests),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.arange(int(starts[-1])),
    )


def make_builder(config, backend, block_size=16):
    """The backend's metadata builder for `make_layer`'s layer."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32
    )
    return backend.get_builder_cls()(spec, [LAYER], config, torch.device("cpu"))

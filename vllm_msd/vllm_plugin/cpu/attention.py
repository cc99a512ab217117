"""Tree attention on the CPU: vLLM's CPU_ATTN backend, fed with the paths of the trees.

See ``paths`` for the split into paths and ``scratch`` for where their rows go. Everything
that touches the cache is either a copy of whole blocks or vLLM's own operation, so nothing here
depends on the layout inside a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from vllm_msd.tree import TreeRows
from vllm_msd.vllm_plugin.cpu.paths import PathCall, PathPlan, plan_paths
from vllm_msd.vllm_plugin.cpu.scratch import KERNEL_BLOCK_SIZE, Scratch
from vllm_msd.vllm_plugin.trees.attention import replace_backend, trees_for


def register() -> None:
    """Put this backend in the place of vLLM's CPU_ATTN, for engines made from now on.

    Call it in each worker process of an engine with trees, before the target is loaded: attention
    layers ask for the backend as they are built. Without trees on the metadata the backend does
    what its parent does, on kernel blocks of `KERNEL_BLOCK_SIZE` slots.
    """
    replace_backend("CPU_ATTN", TreeCPUAttentionBackend)


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """CPU_ATTN that follows the trees on the metadata (`vllm_msd.tree.TreeRows`)."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        # vLLM splits the cache manager's larger blocks into these.
        return [KERNEL_BLOCK_SIZE]

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl


@dataclass
class _Pass:
    """What one metadata object's layers share in one forward pass."""

    metadata: CPUAttentionMetadata
    plan: PathPlan
    stock: list[CPUAttentionMetadata]  # for each call of the plan


@dataclass
class _LayerRows:
    """One layer's copied rows, kept for settling and for the next draft level.

    Copies of their own, as a compiled model uses its buffers again in the next layer.
    """

    impl: TreeCPUAttentionImpl
    layer: Any
    kv_cache: Tensor
    shared: _Pass
    keys: Tensor  # [m, kv_heads, head_size]
    values: Tensor


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention. ``scratch`` is set by `scratch.bind_scratch`."""

    scratch: Scratch | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As the parent's; the metadata may carry trees.

        Raises:
            RuntimeError: trees without scratch blocks.
            ValueError: trees that do not fit the batch.
        """
        tree = trees_for(layer, attn_metadata)
        if tree is None:
            usual = (layer, query, key, value, kv_cache, attn_metadata, output)
            return super().forward(*usual, *args, **kwargs)
        if self.scratch is None:
            raise RuntimeError("Draft trees on the CPU: bind_scratch was not called")

        older = tree.older.derived[_rows_of(layer)] if tree.older is not None else None
        shared = self._shared(layer, tree, attn_metadata, query.dtype, older)
        if older is not None:
            key, value = torch.cat([older.keys, key]), torch.cat([older.values, value])
        keys = key.index_select(0, shared.plan.copied_rows)
        values = value.index_select(0, shared.plan.copied_rows)
        tree.derived[_rows_of(layer)] = _LayerRows(self, layer, kv_cache, shared, keys, values)

        for call, stock in zip(shared.plan.calls, shared.stock, strict=True):
            self._fill_scratch(layer, call, kv_cache, keys, values)
            asked = query.index_select(0, call.query_rows)
            answer = torch.empty_like(asked)
            super().forward(layer, asked, key, value, self.scratch.cache, stock, answer)
            output.index_copy_(0, call.query_rows, answer)
        return output

    def _shared(
        self,
        layer: Any,
        tree: TreeRows,
        metadata: CPUAttentionMetadata,
        dtype: torch.dtype,
        older: _LayerRows | None,
    ) -> _Pass:
        """The plan of this pass, made by the first layer that asks."""
        shared = tree.derived.get(id(metadata))
        if shared is not None:
            return shared
        plan = plan_paths(
            tree,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            self.scratch.blocks.shape[2],
            len(self.scratch.blocks),
            None if older is None else older.shared.plan,
        )
        stock = []
        for call in plan.calls:
            scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(call.seq_lens),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_size,
                seq_lens=call.seq_lens,
                dtype=dtype,
                query_start_loc=call.query_start_loc,
                causal=True,
                sliding_window_size=self.sliding_window,
                isa=layer.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                kv_cache_dtype=self.kv_cache_dtype,
            )
            stock.append(
                replace(
                    metadata,
                    num_actual_tokens=len(call.query_rows),
                    max_query_len=call.max_query_len,
                    query_start_loc=call.query_start_loc,
                    max_seq_len=call.max_seq_len,
                    seq_lens=call.seq_lens,
                    block_table=call.block_table,
                    scheduler_metadata=scheduler_metadata,
                )
            )
        shared = _Pass(metadata, plan, stock)
        tree.derived[id(metadata)] = shared  # holds the metadata, so the id stays its own
        return shared

    def _fill_scratch(
        self, layer: Any, call: PathCall, kv_cache: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Write the context's last partial blocks and the paths' rows to the scratch blocks."""
        scratch = self.scratch
        if len(call.slots) == 0:
            return
        if (tails := len(call.tail_blocks)) > 0:
            torch.index_select(kv_cache, 0, call.tail_blocks, out=scratch.blocks[:tails])
        self.do_kv_cache_update(
            layer, keys[call.copies], values[call.copies], scratch.blocks, call.slots
        )
        # Scratch block numbers differ between layers, so each writes its own into the table.
        # In NumPy, which takes a tenth of the time for a handful of numbers.
        table = call.block_table.numpy().reshape(-1)
        table[call.scratch_cells.numpy()] = call.scratch_blocks.numpy() + scratch.first_block


def settle_cpu(tree: TreeRows, root_rows: Tensor, nodes: Tensor) -> None:
    """Move the accepted nodes' keys and values to the slots of a chain, in every target layer.

    The rows are written again from the copies that the forward pass kept, so call it before the
    next pass, and before anything overwrites the step's slot mapping.

    Args:
        tree: the step's trees, as the forward pass had them.
        root_rows: ``[R]`` int64 row of each request's root in the step.
        nodes: ``[R, T]`` int64 accepted nodes, the root first, padded with -1.

    Raises:
        ValueError: a node that has no row in its request's tree.
    """
    place = torch.arange(nodes.shape[1])
    moved = nodes > place  # a path never runs ahead of its nodes; -1 is no move
    come_from = (root_rows[:, None] + nodes)[moved]
    to = (root_rows[:, None] + place)[moved]
    if len(to) == 0:
        return
    moves: dict[int, tuple[Tensor, Tensor]] = {}  # copies and their slots, the same for all layers
    for key, shared in tree.derived.items():
        if isinstance(shared, _Pass):
            copies = shared.plan.copy_of_row[come_from]
            if (copies < 0).any():
                raise ValueError("settle: an accepted node is none of its request's tree")
            moves[key] = copies, shared.metadata.slot_mapping[to]
    for rows in tree.derived.values():
        if isinstance(rows, _LayerRows):
            copies, slots = moves[id(rows.shared.metadata)]
            rows.impl.do_kv_cache_update(
                rows.layer,
                rows.keys.index_select(0, copies),
                rows.values.index_select(0, copies),
                rows.kv_cache,
                slots,
            )


def _rows_of(layer: Any) -> tuple[str, int]:
    return ("rows", id(layer))

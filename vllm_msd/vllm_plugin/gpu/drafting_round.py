"""The levels of a drafting round: trees grown from what the draft's prefill left behind.

A level feeds ``top_k`` rows a request to the draft, where `beam_step` puts them. A round is one
CUDA graph for each number of requests and of levels, where the target decodes in graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_msd.kernels import DraftPlace, LevelInputs
from vllm_msd.tree import TreeRows
from vllm_msd.tree.fused import grow_tree_fused
from vllm_msd.vllm_plugin.configuration.capture_sizes import drafted_by_requests
from vllm_msd.vllm_plugin.trees.attention import attach

if TYPE_CHECKING:
    from vllm_msd.vllm_plugin.gpu.speculator import TreeSpeculator


class DraftingRound:
    """Grows trees for a `TreeSpeculator`, whose buffers it uses."""

    def __init__(self, speculator: TreeSpeculator) -> None:
        self.speculator = speculator

    def run(
        self,
        num_reqs: int,
        levels: int,
        seq_lens_cpu: torch.Tensor,
        with_attention: bool,
        eager: bool,
    ) -> None:
        """Grow trees from what the draft's prefill left in the buffers, by a graph if there is one.

        Args:
            num_reqs: R.
            levels: that are fed to the draft.
            seq_lens_cpu: ``[R]`` int32 on the host, at least the requests' lengths.
            with_attention: False in the memory profile, where there is no KV cache yet.
            eager: True where no graph may be used.
        """
        s = self.speculator
        k, step = s.shape.top_k, s.requests_at_once
        if num_reqs <= step and with_attention and not eager:
            self._set_query_starts(num_reqs)
            desc = s.decode_cudagraph_manager.of_round(num_reqs, levels)
            if desc.cg_mode == CUDAGraphMode.FULL:
                s.refresh_block_tables()
                s.decode_cudagraph_manager.run_fullgraph(desc)
                return
        longest = int(seq_lens_cpu.max()) + levels * k
        s.draft_max_seq_len = min(longest, s.max_model_len)
        self.keep_roots(num_reqs)
        for begin in range(0, num_reqs, step):
            chosen = slice(begin, min(begin + step, num_reqs))
            count = chosen.stop - begin
            self._set_query_starts(count)
            if not with_attention:
                self.grow(chosen, levels, None, None)
                continue
            if num_reqs > step:
                s.block_tables.gather_block_tables(s.idx_mapping[chosen], count)
            metadata_of = self._fresh_metadata(count, seq_lens_cpu[chosen])
            self.grow(chosen, levels, self._slot_mappings(count), metadata_of)

    def for_nobody(self) -> None:
        """Launch every kernel of drafting rounds, for a padding request and without attention."""
        s = self.speculator
        s.idx_mapping[:1].fill_(-1)
        drafted = {n for sizes in drafted_by_requests(s.vllm_config).values() for n in sizes}
        for levels in s.shape.levels_of(drafted):
            self._set_query_starts(1)
            self.keep_roots(1)
            self.grow(slice(0, 1), levels, None, None)

    def keep_roots(self, num_reqs: int) -> None:
        """Move what the draft's prefill left out of the way of the levels' rows."""
        s = self.speculator
        torch.add(s.input_buffers.positions[:num_reqs], 1, out=s.first[:num_reqs])
        s.root_hidden[:num_reqs].copy_(s.hidden_states[:num_reqs])
        # The levels' rows are text, whatever the prefill's were.
        s.model.is_visual.zero_()

    def grow(
        self,
        chosen: slice,
        levels: int,
        slot_mappings: dict[str, torch.Tensor] | None,
        metadata_of: Callable[[int], dict[str, Any]] | None,
    ) -> None:
        """Grow the trees of some requests; writes `draft_tokens` and the store.

        Reads the roots' buffers, `idx_mapping`, ``query_start_loc`` and the block tables. Nothing
        here is read on the host, so a CUDA graph can be made of it.

        Args:
            chosen: which requests of the batch, a graph's padding included.
            levels: that are fed to the draft; all of a whole tree, or fewer.
            slot_mappings: by layer, of a level's rows; None without attention.
            metadata_of: a level's attention metadata, once its rows are in their buffers.
        """
        s = self.speculator
        inputs, store = s.input_buffers, s.model_state.store
        buffers = s.buffers.shallower(levels)
        kept = buffers.shape.total_tokens
        place = DraftPlace(
            s.first[chosen],
            s.idx_mapping[chosen],
            s.block_table,
            s.block_size,
            s.max_model_len,
        )
        rows = LevelInputs(
            inputs.input_ids, inputs.positions, s.kv_slots, inputs.seq_lens, s.hidden_states
        )
        tree: TreeRows | None = None

        def expand(
            level: int, ancestors: torch.Tensor, tree_start: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal tree
            metadata = None
            if metadata_of is not None:
                tree = TreeRows(tree_start, ancestors, is_draft=True, older=tree)
                metadata = metadata_of(level)
                attach(metadata, tree)
            hidden = self._run_level(len(ancestors), metadata, slot_mappings)
            return s.head(hidden), hidden

        root_hidden = s.root_hidden[chosen]
        grow_tree_fused(
            s.head(root_hidden),
            root_hidden,
            expand,
            buffers,
            rows,
            place,
            (store.parents[:, :kept], store.depths[:, :kept], store.ancestors[:, :kept]),
            s.draft_tokens[chosen, : kept - 1],
            s.head.vocabulary,
        )

    def _run_level(
        self,
        num_rows: int,
        metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The draft's output ``[rows, H]`` for the rows in the buffers, all of them text."""
        s = self.speculator
        with set_forward_context(
            metadata,
            s.vllm_config,
            num_tokens=num_rows,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_rows),
        ):
            _, hidden = s.model(
                input_ids=None,
                positions=s.input_buffers.positions[:num_rows],
                hidden_states=s.hidden_states[:num_rows],
                inputs_embeds=s.model.embed_drafted(s.input_buffers.input_ids[:num_rows]),
            )
        return hidden

    def _set_query_starts(self, num_reqs: int) -> None:
        """``query_start_loc`` of a level; the padding requests of a graph get no rows."""
        s = self.speculator
        torch.clamp(
            s.query_starts,
            max=num_reqs * s.shape.top_k,
            out=s.input_buffers.query_start_loc,
        )

    def _slot_mappings(self, num_reqs: int) -> dict[str, torch.Tensor]:
        """KV slots of a level's rows by layer, views of vLLM's buffer."""
        s = self.speculator
        num_rows = num_reqs * s.shape.top_k
        return build_slot_mappings_by_layer(
            s.block_tables.slot_mappings[:, :num_rows], s.kv_cache_config
        )

    def _fresh_metadata(
        self, num_reqs: int, seq_lens_cpu: torch.Tensor
    ) -> Callable[[int], dict[str, Any]]:
        """Attention metadata of each level, built on the host."""
        s = self.speculator
        k = s.shape.top_k
        desc = BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE, num_tokens=num_reqs * k, num_reqs=num_reqs
        )

        def build(level: int) -> dict[str, Any]:
            return s._build_uniform_attn_metadata(desc, num_reqs, k, seq_lens_cpu, (level + 1) * k)

        return build

"""The draft's prefill of a step in which every request verified a tree: depth + 1 rows a request.

vLLM gives the draft as many rows as the target had, rejected ones included, so that it can go on
with the target's metadata. No more than depth + 1 of a tree's rows can have been accepted; one
launch lays these out (`vllm_msd.kernels.draft_prefill`), and the draft's own metadata goes with
them. Where the target decodes in graphs, so does this, in one graph for each number of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_msd.kernels import LevelInputs, PrefillRows, Verified, draft_prefill

if TYPE_CHECKING:
    from vllm_msd.vllm_plugin.gpu.speculator import TreeSpeculator


class CompactPrefill:
    """Runs the draft's prefill for a `TreeSpeculator`, whose buffers it uses.

    ``width``: rows of a request.
    """

    def __init__(self, speculator: TreeSpeculator) -> None:
        self.speculator = speculator
        self.width = speculator.shape.depth + 2

    def fits(self, input_batch: InputBatch) -> bool:
        """Whether all requests verified a tree, with no prompt row before, of enough nodes.

        Chains of requests that must have them are deeper than a tree.
        """
        drafts = input_batch.num_draft_tokens_per_req
        state = self.speculator.model_state
        return (
            drafts is not None
            and bool((drafts >= self.width - 1).all())
            and bool((input_batch.num_scheduled_tokens == drafts + 1).all())
            and not input_batch.has_prefill
            and not state.as_chain[input_batch.idx_mapping_np].any()
            and len(state.store.accepted) > 0
        )

    def capture(self) -> None:
        """Capture the graphs, after vLLM's own."""
        s = self.speculator
        s.compact_cudagraph_manager.capture(
            self._prefill,
            s.model_state,
            s.input_buffers,
            s.block_tables,
            s.attn_groups,
            s.kv_cache_config,
            progress_bar_desc="Capturing compact prefill CUDA graphs",
        )

    def run(
        self, input_batch: InputBatch, hidden_states: torch.Tensor, last_sampled: torch.Tensor
    ) -> None:
        """Lay out the rows and feed them; leaves the speculator's buffers as vLLM's prefill does.

        Args:
            input_batch: one that `fits`.
            hidden_states: ``[rows, H]`` of the target.
            last_sampled: ``[slots, 1]`` int64, the last emitted token.
        """
        s, num_reqs = self.speculator, input_batch.num_reqs
        step = s.model_state.store.step
        self._lay_out(
            Verified(
                s.model_state.store.accepted_nodes(),
                step.root_rows,
                step.tree.tree_start,
                input_batch.idx_mapping,
                input_batch.input_ids[: len(hidden_states)],
                hidden_states,
                last_sampled,
            )
        )
        rows = num_reqs * self.width
        graphs = s.compact_cudagraph_manager
        desc = graphs.dispatch(num_reqs, rows, self.width, 0)
        if desc.cg_mode == CUDAGraphMode.FULL:
            s.refresh_block_tables()
            graphs.run_fullgraph(desc)
            return
        seq_lens = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        s.draft_max_seq_len = min(int(seq_lens.max()), s.max_model_len)
        desc = BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens=rows, num_reqs=num_reqs)
        metadata = s._build_uniform_attn_metadata(desc, num_reqs, self.width, seq_lens, 0)
        slots = build_slot_mappings_by_layer(
            s.block_tables.slot_mappings[:, :rows], s.kv_cache_config
        )
        s._prefill(num_reqs, rows, metadata, slots, num_tokens_across_dp=None)

    def for_nobody(self) -> None:
        """Launch the kernel for padding alone, to have it compiled; types as in `run`."""
        s = self.speculator
        store, device = s.model_state.store, s.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self._lay_out(
            Verified(
                none.view(0, store.num_nodes),
                store.root_rows[:0],
                store.tree_start,
                none,
                s.input_buffers.input_ids,
                s.hidden_states,
                torch.zeros(len(s.block_table), 1, dtype=torch.int64, device=device),
            )
        )

    def _lay_out(self, step: Verified) -> None:
        s, buffers = self.speculator, self.speculator.input_buffers
        draft_prefill(
            step,
            s.block_table,
            s.block_size,
            self.width,
            LevelInputs(
                buffers.input_ids, buffers.positions, s.kv_slots, buffers.seq_lens, s.hidden_states
            ),
            PrefillRows(buffers.query_start_loc, s.last_token_indices, s.idx_mapping),
        )

    def _prefill(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
    ) -> None:
        """What is captured; brings up to date what a backend keeps on the device for the pass."""
        s = self.speculator
        if s.supports_decode_metadata_update:
            s._update_draft_decode_metadata(attn_metadata, num_reqs)
        s._prefill(
            num_reqs,
            num_tokens,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
        )

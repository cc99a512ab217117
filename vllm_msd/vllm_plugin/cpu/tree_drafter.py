"""Model Runner V1's drafter for MSD trees: the chain drafter's prefill, then levels of a tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from vllm_msd.tree import (
    DraftLevels,
    DraftTree,
    TreeRows,
    draft_level,
    grow_tree,
    lay_out_chains,
)
from vllm_msd.vllm_plugin.configuration.tree_settings import (
    auto_shapes,
    check_level_rows,
    tree_config,
)
from vllm_msd.vllm_plugin.cpu.chain_drafter import MSDProposer
from vllm_msd.vllm_plugin.trees.attention import attach


class TreeProposer(MSDProposer):
    """Drafts trees with an MSD draft under Model Runner V1.

    Attributes:
        drafted: the trees drafted last, ``[R, N + 1]``.
        as_chain: ``[R]`` bool, which requests of the batch need chains; set before `propose`.
    """

    drafted: DraftTree
    as_chain: Tensor

    def __init__(self, vllm_config, device, runner=None) -> None:
        super().__init__(vllm_config, device, runner)
        self.shape = tree_config(vllm_config).shape
        if not auto_shapes(vllm_config):
            check_level_rows(vllm_config)
        # The base class only runs the draft's prefill; this is also its number of warm-up passes.
        self.num_speculative_tokens = 1
        self._last_hidden: Tensor | None = None

    @override
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: tuple[list[Tensor], Tensor] | None = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: dict[str, Tensor] | list[dict[str, Tensor]] | None = None,
    ) -> Tensor | list[list[int]]:
        """Draft one tree per request; returns its nodes' tokens ``[R, num_speculative_tokens]``, or
        a list where requests want fewer."""
        super().propose(
            1,
            target_token_ids,
            target_positions,
            target_hidden_states,
            next_token_ids,
            token_indices_to_sample,
            common_attn_metadata,
            sampling_metadata,
            mm_embed_inputs,
            num_rejected_tokens_gpu,
            slot_mappings,
        )
        if token_indices_to_sample is None:
            token_indices_to_sample = common_attn_metadata.query_start_loc[1:] - 1
        tree = self._grow(
            next_token_ids.long(),
            self.positions[token_indices_to_sample] + 1,
            self._last_hidden,
            common_attn_metadata.block_table_tensor,
        )
        self.drafted = lay_out_chains(tree, self.as_chain) if self.as_chain.any() else tree
        return self._within_limits(self.drafted.tokens[:, 1 : num_speculative_tokens + 1])

    @override
    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Keep the prefill's last rows ``[R, H]``, from which the trees grow."""
        self._last_hidden = hidden_states
        return hidden_states.new_zeros(len(hidden_states), dtype=torch.int64), None

    def _grow(
        self, root_tokens: Tensor, first: Tensor, hidden: Tensor, block_table: Tensor
    ) -> DraftTree:
        """Grow the trees of B requests.

        Args:
            root_tokens: ``[B]`` int64 the sampled tokens.
            first: ``[B]`` int64 position behind each request's last valid row.
            hidden: ``[B, H]`` the draft's output of that row.
            block_table: ``[B, blocks]`` int32 of the draft's cache.
        """
        k = self.shape.top_k
        batch, num_rows = len(root_tokens), len(root_tokens) * k
        query_start = self.arange[: batch + 1] * k
        levels = DraftLevels(first, self.shape.depth, k, self.max_model_len)
        tree_start = first.int()  # also past the limit: older levels' rows are read from copies
        tree_rows: TreeRows | None = None

        def expand(tokens: Tensor, hidden: Tensor, visible: Tensor, level: int):
            nonlocal tree_rows
            if k > 1:  # a chain is causal
                tree_rows = draft_level(tree_start, visible, tree_rows)
            attention = CommonAttentionMetadata(
                query_start_loc=query_start,
                query_start_loc_cpu=query_start.cpu(),
                seq_lens=levels.seq_lens(level).int(),
                num_reqs=batch,
                num_actual_tokens=num_rows,
                max_query_len=k,
                max_seq_len=self.max_model_len,
                block_table_tensor=block_table,
                slot_mapping=self._slots(*levels.kv_positions(level), block_table),
            )
            out = self._run_level(
                tokens.flatten(),
                hidden.flatten(0, 1),
                levels.rotary_positions(level),
                attention,
                tree_rows,
            )
            logits = self.model.compute_logits(out)
            return logits.unflatten(0, (batch, k)), out.unflatten(0, (batch, k))

        logits = self.model.compute_logits(hidden)
        return grow_tree(root_tokens, logits, hidden, expand, self.shape)

    def _slots(self, positions: Tensor, is_past: Tensor, block_table: Tensor) -> Tensor:
        """Cache slots of a level's rows, from `DraftLevels.kv_positions`; ``[B * top_k]``."""
        blocks = block_table.gather(1, (positions // self.block_size).view(len(block_table), -1))
        slots = blocks.flatten().long() * self.block_size + positions % self.block_size
        return slots.masked_fill_(is_past, PADDING_SLOT_ID)

    def _run_level(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attention: CommonAttentionMetadata,
        tree_rows: TreeRows | None,
    ) -> Tensor:
        """Run the draft on rows of text: ``[rows]``, ``[rows, H]`` and ``[rows]`` to ``[rows, H]``.

        Without ``tree_rows`` they are causal.
        """
        num_rows = len(tokens)
        mode, num_input_rows, num_rows_across_dp = self._determine_batch_execution_and_padding(
            num_rows
        )
        _, layers = self.build_per_group_and_layer_attn_metadata(attention, draft_index=1)
        attach(layers, tree_rows)
        self.input_ids[:num_rows] = tokens
        self.hidden_states[:num_rows] = hidden
        self.positions[:num_rows] = positions
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids[:num_input_rows],
            "positions": self.positions[:num_input_rows],
            "hidden_states": self.hidden_states[:num_input_rows],
            "inputs_embeds": None,
        }
        if self.supports_mm_inputs:
            # Without images: every drafted row is text.
            self.inputs_embeds[:num_rows] = self.model.embed_input_ids(self.input_ids[:num_rows])
            inputs["input_ids"] = None
            inputs["inputs_embeds"] = self.inputs_embeds[:num_input_rows]
        with set_forward_context(
            layers,
            self.vllm_config,
            num_tokens=num_input_rows,
            num_tokens_across_dp=num_rows_across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(num_input_rows, attention.slot_mapping),
        ):
            out, _ = self.model(**inputs)
        return out[:num_rows]

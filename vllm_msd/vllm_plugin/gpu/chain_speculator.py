"""Model Runner V2: drafts chains as vLLM's EAGLE speculator does, with two additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator


class ChainSpeculator(EagleSpeculator):
    """EAGLE's speculator, which knows draft vocabularies, and whose full CUDA graphs take decoding
    batches only.

    With ``cudagraph_mode=FULL`` vLLM replays the draft's prefill for prompts too. Such a graph
    knows no images, and their rows would be drafted as text: output stays right, acceptance falls.
    """

    @override
    def load_model(self, target_model: nn.Module) -> None:
        """As the base class; a draft vocabulary gets its own rows of the head."""
        super().load_model(target_model)
        self.model.keep_own_head()

    @override
    def sample_draft(
        self,
        hidden_states: torch.Tensor,
        sample_src_positions: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        draft_step: torch.Tensor,
        draft_logits: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class; greedy drafts of a draft vocabulary need no logits of all tokens."""
        is_plain = draft_logits is None and self.acceptance_estimator is None
        if is_plain and self.model.token_ids is not None:
            return self.model.token_ids[self.model.column_logits(hidden_states).argmax(-1)]
        return super().sample_draft(
            hidden_states,
            sample_src_positions,
            idx_mapping,
            temperature,
            seeds,
            draft_step,
            draft_logits,
            *args,
            **kwargs,
        )

    @override
    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As the base class; prompts are drafted without full graphs."""
        if cudagraph_mode == CUDAGraphMode.FULL:
            cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        super().init_cudagraph_manager(cudagraph_mode)

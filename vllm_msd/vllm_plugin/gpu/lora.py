"""Model Runner V2: the adapter of each row of logits, where a request has several.

vLLM notes one adapter for each request, which is one for each row of logits without speculation.
With it the head's adapters would be applied to the first rows only (on the CPU the engine dies).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from typing_extensions import override
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState

from vllm_msd.vllm_plugin.patches.overrides import check_overrides


class DraftedLoraState(LoraState):
    """Counts each request's rows of logits: one more than its drafted tokens.

    Attributes:
        num_logits: ``[R]`` int, of the batch at hand, set before `make_lora_inputs`.
    """

    num_logits: np.ndarray

    @override
    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """Adapter ids of the rows of logits, those of all rows, and the adapters in use."""
        _, of_rows, requests = super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        of_logits = self.lora_ids[idx_mapping].repeat(self.num_logits)
        return tuple(of_logits), of_rows, requests


def follow_drafts(runner: Any) -> None:
    """Put our state in the place of a new runner's, and keep its counts up to date."""
    check_overrides(DraftedLoraState)
    state = runner.lora_state = DraftedLoraState(runner.max_num_reqs)
    original = runner.prepare_inputs

    @functools.wraps(original)
    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        input_batch = original(*args, **kwargs)
        state.num_logits = np.diff(input_batch.cu_num_logits_np)
        return input_batch

    runner.prepare_inputs = prepare_inputs

"""Model Runner V1's rejection sampler for trees: one draw after every node, then the walk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    RejectionSampler,
    apply_sampling_constraints,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_msd.tree import Acceptance, accept
from vllm_msd.vllm_plugin.trees.step_v1 import StepTrees


class TreeRejectionSampler(RejectionSampler):
    """Accepts a path of each request's tree where the base class accepts a prefix of its chain.

    Logits go through the same processing as in the base class, which looks at requests and rows
    and knows nothing of trees. It is exact for trees where each row is treated on its own; requests
    where it is not come as chains.

    Attributes:
        step: the trees of the step, set before each call; None: as the base class.
        acceptance: what was accepted in the last call with trees.
    """

    step: StepTrees | None = None
    acceptance: Acceptance | None = None

    @override
    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Sampled tokens ``[R, T]`` int32, padded with -1, and their logprobs ``[R * T]``."""
        step = self.step
        if step is None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        if draft_probs is not None or self.synthetic_mode:
            raise ValueError("draft trees are accepted exactly and without draft probabilities")
        drawn, shown_logits = self._draw(metadata, logits, sampling_metadata)
        accepted = accept(step.tree, step.by_request(drawn), step.num_nodes)
        self.acceptance = accepted
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._path_logprobs(
                step, accepted, shown_logits, sampling_metadata.max_num_logprobs
            )
        return SamplerOutput(
            sampled_token_ids=accepted.tokens.to(torch.int32), logprobs_tensors=logprobs
        )

    def _draw(
        self, metadata: SpecDecodeMetadata, logits: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor]:
        """``[nodes]`` int64 the token after each node, and the logits that logprobs are of."""
        shows_processed = (
            self.is_processed_logprobs_mode and sampling_metadata.max_num_logprobs is not None
        )
        if sampling_metadata.all_greedy and _leaves_logits_alone(sampling_metadata):
            return self.sampler.greedy_sample(logits.to(torch.float32)).long(), logits

        # A request's last node is drawn as one without speculation, the others by its parameters
        # spread over their rows: the base class's two ways.
        last = self.sampler(
            logits[metadata.bonus_logits_indices],
            replace(
                sampling_metadata,
                max_num_logprobs=-1 if shows_processed else None,
                logprob_token_ids=None,
            ),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if shows_processed else None,
        )
        inner = logits[metadata.target_logits_indices].to(torch.float32)
        inner = self.apply_logits_processors(inner, sampling_metadata, metadata)
        inner = apply_sampling_constraints(inner, metadata.cu_num_draft_tokens, sampling_metadata)
        drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        drawn[metadata.bonus_logits_indices] = last.sampled_token_ids[:, 0].long()
        drawn[metadata.target_logits_indices] = self._draw_rows(
            inner, metadata.num_draft_tokens, sampling_metadata
        )
        if shows_processed:
            logits = torch.empty_like(logits, dtype=torch.float32)
            logits[metadata.bonus_logits_indices] = last.logprobs_tensors.logprobs
            logits[metadata.target_logits_indices] = inner
        return drawn, logits

    def _draw_rows(
        self, logits: Tensor, num_rows: list[int], sampling_metadata: SamplingMetadata
    ) -> Tensor:
        """One token per row of processed logits; ``num_rows`` of them belong to each request."""
        if sampling_metadata.all_greedy:
            return self.sampler.greedy_sample(logits).long()
        generators, first_row = {}, 0
        for request, count in enumerate(num_rows):
            if (generator := sampling_metadata.generators.get(request)) is not None:
                generators.update(dict.fromkeys(range(first_row, first_row + count), generator))
            first_row += count
        drawn, _ = self.sampler.topk_topp_sampler(logits, generators, None, None)
        if sampling_metadata.all_random:
            return drawn.long()
        is_greedy = sampling_metadata.temperature == GREEDY_TEMPERATURE
        is_greedy = is_greedy.repeat_interleave(torch.tensor(num_rows, device=logits.device))
        return torch.where(is_greedy, self.sampler.greedy_sample(logits), drawn).long()

    def _path_logprobs(
        self, step: StepTrees, accepted: Acceptance, logits: Tensor, max_num_logprobs: int
    ) -> LogprobsTensors:
        """Logprobs after the accepted nodes, ``[R * T]``; any at the padding, vLLM drops them."""
        rows = step.first_logits[:, None] + accepted.nodes.clamp(min=0)
        logits = logits[rows.flatten()].to(torch.float32)
        values = logits if self.is_logits_logprobs_mode else self.sampler.compute_logprobs(logits)
        tokens = accepted.tokens.clamp(min=0).flatten()
        return self.sampler.gather_logprobs(values, max_num_logprobs, tokens)


def _leaves_logits_alone(sampling_metadata: SamplingMetadata) -> bool:
    """Whether nothing but temperature, top-k and top-p is to be applied."""
    holder = sampling_metadata.thinking_budget_state_holder
    processors = sampling_metadata.logitsprocs.non_argmax_invariant
    return (
        sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(isinstance(p, MinTokensLogitsProcessor) and not p.min_toks for p in processors)
    )

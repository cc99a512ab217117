"""Model Runner V1's rejection sampler for trees: one draw after every node, then the walk."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_msd.tree import TreeStore
from vllm_msd.vllm_plugin.cpu.seeds import DrawsByDepth
from vllm_msd.vllm_plugin.cpu.step import StepNodes


class TreeRejectionSampler(RejectionSampler):
    """Accepts a path of each request's tree where the base class accepts a prefix of its chain.

    The base class's processing of logits looks at requests and rows and knows nothing of trees. It
    is exact for trees where each row is treated on its own; requests where it is not come as
    chains. The draws are those of vLLM's sampler without speculation, with a row for each node.

    Attributes:
        store: the trees.
        step: the nodes of the step, set before each call; None where nothing was drafted.
    """

    step: StepNodes | None = None

    def __init__(
        self,
        sampler: Sampler,
        store: TreeStore,
        spec_config: SpeculativeConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.store = store

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
            # Asking the base class would draw once more over the whole vocabulary, for nothing.
            return self.sampler(
                logits[metadata.bonus_logits_indices], sampling_metadata, predict_bonus_token=True
            )
        if draft_probs is not None or self.synthetic_mode:
            raise ValueError("draft trees are accepted exactly and without draft probabilities")
        shown, draws = logits, None
        if sampling_metadata.all_greedy and _leaves_logits_alone(sampling_metadata):
            drawn = self.sampler.greedy_sample(logits.to(torch.float32))
        else:
            logits = logits.to(torch.float32, copy=True)
            if not _leaves_logits_alone(sampling_metadata):
                self._process(logits, metadata, sampling_metadata)
            draws = self._draws(step, sampling_metadata, logits)
            per_node = _per_node(step, sampling_metadata, draws.of_rows)
            drawn, processed = self.sampler.sample(logits, per_node)
            shown = shown if processed is None else processed

        requests = slice(len(step.row_start) - 1)
        accepted = self.store.accept(requests, step.row_start, drawn.long(), step.tokens)
        columns = metadata.max_spec_len + 1  # no path of this step is longer
        tokens, nodes = accepted.tokens[:, :columns], accepted.nodes[:, :columns]
        if draws is not None:
            draws.settle((tokens >= 0).sum(1).tolist())
        logprobs = None
        if (count := sampling_metadata.max_num_logprobs) is not None:
            rows = step.row_start[:-1, None] + nodes.clamp(min=0)
            logprobs = self._logprobs(shown[rows.flatten()], tokens.flatten(), count)
        return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=logprobs)

    def _draws(
        self, step: StepNodes, sampling_metadata: SamplingMetadata, logits: Tensor
    ) -> DrawsByDepth:
        """The generators of the seeded requests' nodes."""
        # On a CPU a draw takes one number from its generator, however many words there are; only
        # draws in float64 take one for each of them.
        row = torch.zeros_like(logits[:1, : None if self.sampler.use_fp64_gumbel else 1])
        return DrawsByDepth(
            sampling_metadata.generators,
            step.row_start.tolist(),
            (step.nodes + step.shift).tolist(),
            lambda generator: self.sampler.topk_topp_sampler(row, {0: generator}, None, None),
        )

    def _process(
        self, logits: Tensor, metadata: SpecDecodeMetadata, sampling_metadata: SamplingMetadata
    ) -> None:
        """Apply penalties, bias and the like to ``logits [nodes, V]``, in place.

        vLLM treats a request's last row as without speculation, and has another way for the rows
        before it, which leaves the bias out.
        """
        last, inner = metadata.bonus_logits_indices, metadata.target_logits_indices
        logits[last] = self.sampler.apply_logits_processors(
            logits[last], sampling_metadata, predict_bonus_token=True
        )
        biased = logits[inner]
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                _add_bias(biased, processor, metadata.num_draft_tokens)
        logits[inner] = self.apply_logits_processors(biased, sampling_metadata, metadata)

    def _logprobs(self, logits: Tensor, tokens: Tensor, max_num_logprobs: int) -> LogprobsTensors:
        """Logprobs of ``tokens [rows]``; any at the padding (-1), vLLM drops them."""
        logits = logits.to(torch.float32)
        values = logits if self.is_logits_logprobs_mode else self.sampler.compute_logprobs(logits)
        return self.sampler.gather_logprobs(values, max_num_logprobs, tokens.clamp(min=0))


def _leaves_logits_alone(sampling_metadata: SamplingMetadata) -> bool:
    """Whether nothing but temperature, min-p, top-k and top-p is to be applied."""
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(map(_is_idle, sampling_metadata.logitsprocs.non_argmax_invariant))
    )


def _is_idle(processor: object) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases


def _add_bias(logits: Tensor, processor: LogitBiasLogitsProcessor, num_rows: list[int]) -> None:
    """Add each request's bias to its ``num_rows`` rows of ``logits``, in place."""
    first_row = 0
    for request, count in enumerate(num_rows):
        if bias := processor.biases.get(request):
            tokens = torch.tensor(list(bias), device=logits.device)
            values = torch.tensor(list(bias.values()), device=logits.device)
            logits[first_row : first_row + count].index_add_(1, tokens, values.expand(count, -1))
        first_row += count


def _per_node(
    step: StepNodes, sampling_metadata: SamplingMetadata, generators: dict[int, torch.Generator]
) -> SamplingMetadata:
    """What the draws depend on, with a row for each node in the place of one for each request."""

    def spread(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[step.slots]

    min_p = LogitsProcessors()
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if not isinstance(processor, MinPLogitsProcessor):
            raise TypeError(f"draft trees do not know the logits processor {type(processor)}")
        if processor.min_p_count:
            processor = copy(processor)
            processor.min_p = spread(processor.min_p)
            min_p.argmax_invariant.append(processor)
    return replace(
        sampling_metadata,
        temperature=spread(sampling_metadata.temperature),
        top_k=spread(sampling_metadata.top_k),
        top_p=spread(sampling_metadata.top_p),
        generators=generators,
        logitsprocs=min_p,
    )

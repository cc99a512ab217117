"""Requests whose next logits depend on the drafted rows before them: they get a chain.

Penalties, forbidden words, structured output and the thinking budget read a request's drafted rows
as a chain; `vllm_msd.tree.lay_out_chains` makes one of its tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def needs_chain(sampling_params: SamplingParams | None) -> bool:
    """Whether something of this request reads drafted rows as a chain.

    ``min_tokens`` is not among them: Model Runner V2 goes by each row's position.
    """
    p = sampling_params
    return p is not None and bool(
        p.presence_penalty != 0
        or p.frequency_penalty != 0
        or p.repetition_penalty != 1
        or p.bad_words
        or p.structured_outputs is not None
        or p.thinking_token_budget is not None
    )

"""Two adjacent images that the encoder cache cannot hold together (vLLM 0.32).

A draft reads one row ahead of the target, so the 0.32 scheduler ends a chunk one row before an
image that is not encoded yet, and keeps an image's encoding until the target is one row past it.
When an image starts right where another ends, the first is kept for the row it is waiting for: the
request never moves again. The look-ahead is a wish, not a need: both runners fall back to the
placeholder's own embedding for that one draft row.
"""

import functools
from collections.abc import Callable
from typing import Any


def wrap_try_schedule_encoder_inputs(original: Callable[..., tuple]) -> Callable[..., tuple]:
    """Replacement of ``Scheduler._try_schedule_encoder_inputs``."""

    @functools.wraps(original)
    def try_schedule_encoder_inputs(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple:
        arguments = (request, num_computed_tokens, num_new_tokens, encoder_compute_budget)
        result = original(self, *arguments, shift_computed_tokens)
        if result[1] or not num_new_tokens or not shift_computed_tokens:
            return result
        _free_passed_images(self, request, num_computed_tokens)
        return original(self, *arguments, 0)

    return try_schedule_encoder_inputs


def _free_passed_images(scheduler: Any, request: Any, num_computed_tokens: int) -> None:
    """Release the images that end at or before the next row: the draft reads past them."""
    settled = num_computed_tokens - request.num_output_placeholders
    for input_id in list(scheduler.encoder_cache_manager.get_cached_input_ids(request)):
        place = request.mm_features[input_id].mm_position
        if place.offset + place.length <= settled:
            scheduler._free_encoder_input(request, input_id)

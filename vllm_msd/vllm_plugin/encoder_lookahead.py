"""Two images in a row that the encoder cache cannot hold together (vLLM 0.32).

A draft reads one row ahead of the target, so the 0.32 scheduler ends a chunk one row before an
image that is not encoded yet, and keeps an image's encoding until the target is one row past it.
When an image starts where another ends, or one row later, the first is kept for the row that waits
for the second: the request never moves again.
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
        if _free_passed_images(self, request, num_computed_tokens):
            result = original(self, *arguments, shift_computed_tokens)
        if not result[1] and self.encoder_cache_manager.get_cached_input_ids(request):
            # It waits for what it holds itself. The look-ahead is a wish, not a need: both runners
            # give that one draft row the placeholder's own embedding.
            result = original(self, *arguments, 0)
        return result

    return try_schedule_encoder_inputs


def _free_passed_images(scheduler: Any, request: Any, num_computed_tokens: int) -> bool:
    """Release the images that end at or before the next row (the draft reads past them)."""
    settled = num_computed_tokens - request.num_output_placeholders
    passed = [
        input_id
        for input_id in scheduler.encoder_cache_manager.get_cached_input_ids(request)
        if (place := request.mm_features[input_id].mm_position).offset + place.length <= settled
    ]
    for input_id in passed:
        scheduler._free_encoder_input(request, input_id)
    return bool(passed)

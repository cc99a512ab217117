"""Chunks of a prompt that end right before an image, whose first embedding the draft reads ahead.

vLLM 0.32 ends a chunk one row before an image that is not encoded yet, and keeps an image's
encoding until the target is one row past it. When an image starts where another ends, or one row
later, and the encoder cache cannot hold both, the first is kept for the row that waits for the
second: the request never moves again.

vLLM 0.33 ends the chunk at the image and gives the draft's last row the embedding of the image
placeholder, on the text branch. All later rows of the draft attend to it. Here the chunk ends a row
earlier, so that the next one reads the image.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_msd.vllm_plugin.runners import is_msd


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
        if not num_new_tokens or not shift_computed_tokens or not is_msd(self.vllm_config):
            return result
        if result[1]:
            return _end_before_read_ahead(self, request, num_computed_tokens, result)
        if _free_passed_images(self, request, num_computed_tokens):
            result = original(self, *arguments, shift_computed_tokens)
        if not result[1] and self.encoder_cache_manager.get_cached_input_ids(request):
            # It waits for what it holds itself. The look-ahead is a wish, not a need: both runners
            # give that one draft row the placeholder's own embedding.
            result = original(self, *arguments, 0)
        return result

    return try_schedule_encoder_inputs


def _end_before_read_ahead(
    scheduler: Any, request: Any, num_computed_tokens: int, result: tuple
) -> tuple:
    """The scheduler's result, without a last row that reads into an image not there to be read.

    A row on its own stays if the request holds images itself: it could wait for them for good.
    """
    scheduled, num_new_tokens, budget, loaded, duplicates = result
    next_row = num_computed_tokens + num_new_tokens
    read_next = {
        input_id
        for input_id, feature in enumerate(request.mm_features)
        if (place := feature.mm_position).offset == next_row
        and place.get_embeds_indices_in_range(0, 1) != (0, 0)  # its first row is an embedding
    }
    if not read_next:  # nearly always
        return result
    available = {*scheduled, *loaded, *duplicates}
    available |= scheduler.encoder_cache_manager.get_cached_input_ids(request)
    if not read_next <= available and (num_new_tokens > 1 or not available):
        num_new_tokens -= 1
    return scheduled, num_new_tokens, budget, loaded, duplicates


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

"""What a step of vLLM's scheduler drafts, under Model Runner V2: sizes left to the plugin, and
requests that want fewer drafts than others, or none.

Nodes stand in the order of their probability, so a request's first n are the best n. vLLM
schedules what a request's list of drafts holds; it is cut before. The worker drafts for all alike,
as its CUDA graphs do, and for nobody where nobody wants any. Model Runner V1's drafters cut their
own lists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm_msd.vllm_plugin.configuration.request_options import node_limit
from vllm_msd.vllm_plugin.drafted_nodes import note_scheduled
from vllm_msd.vllm_plugin.runners import is_msd
from vllm_msd.vllm_plugin.scheduled_sizes import sizes_of


def wrap_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``Scheduler.schedule``, the synchronous and the asynchronous one's."""

    @functools.wraps(original)
    def schedule(self: Any, throttle_prefills: bool = False) -> Any:
        if not is_msd(self.vllm_config):
            return original(self, throttle_prefills)
        sizes = sizes_of(self)
        if not self.use_v2_model_runner:
            output = original(self, throttle_prefills)
            if self.vllm_config.scheduler_config.async_scheduling:
                note_scheduled(self, output)  # workers hand no drafts over
            return output
        if sizes is not None:
            self.dynamic_sd_lookup = sizes.rule.table()
        cut_drafts(self.running)
        output = original(self, throttle_prefills)
        scheduled = (self.requests[req_id] for req_id in output.num_scheduled_tokens)
        if output.num_scheduled_tokens and all(
            node_limit(request.sampling_params) == 0 for request in scheduled
        ):
            output.num_spec_tokens_to_schedule = 0
        if sizes is not None:
            sizes.scheduled(output)
        note_scheduled(self, output)
        return output

    return schedule


def cut_drafts(requests: Iterable[Any]) -> None:
    """Cut the drafts that are to be verified next to what each request wants at most."""
    for request in requests:
        if request.spec_token_ids:
            limit = node_limit(request.sampling_params)
            if limit is not None and limit < len(request.spec_token_ids):
                # A list of its own: asynchronous scheduling gives all requests the same one.
                request.spec_token_ids = request.spec_token_ids[:limit]

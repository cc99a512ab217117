"""A request's sampling parameters: min_p and logit_bias under draft trees, and our own options.

vLLM refuses both with any speculation, because Model Runner V1's rejection sampler leaves them out.
Trees are sampled by our own samplers, which treat every row as a step of its own.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration.request_options import node_limit
from vllm_msd.vllm_plugin.configuration.tree_settings import drafts_trees, is_msd_config


def wrap_validate_spec_decode(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of ``SamplingParams._validate_spec_decode``."""

    @functools.wraps(original)
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if is_msd_config(speculative_config):
            try:
                node_limit(self)
            except ConfigError as error:  # the error that servers answer with 400
                raise VLLMValidationError(str(error)) from error
        if not drafts_trees(speculative_config):
            original(self, speculative_config)

    return validate_spec_decode

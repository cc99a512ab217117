"""What one request may say about its own drafts, in vLLM's free table of arguments.

    extra_body={"vllm_xargs": {"msd": False}}           draft nothing for this request
    extra_body={"vllm_xargs": {"msd_max_nodes": 8}}     at most so many nodes a step

From Python: ``SamplingParams(extra_args={"msd": False})``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_msd.errors import ConfigError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

SWITCH, MOST = "msd", "msd_max_nodes"


def node_limit(params: SamplingParams | None) -> int | None:
    """The most nodes that a request may have a step; None if it does not say.

    Raises:
        ConfigError: a value that cannot be meant.
    """
    options: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    switch, most = options.get(SWITCH, True), options.get(MOST)
    if not isinstance(switch, bool) and switch not in (0, 1):
        raise ConfigError(f"{SWITCH}: got {switch!r}, expected true or false.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
        raise ConfigError(f"{MOST}: got {most!r}, expected a whole number from 0 on.")
    return most if switch else 0

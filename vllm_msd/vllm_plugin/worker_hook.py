"""Gives a worker of an MSD engine its drafter, once the worker has built its model runner.

Model Runner V1 only: Model Runner V2 drives an MSD draft as it is. The runner has built vLLM's
EAGLE drafter by then and loaded no weights yet, so the drafter is simply replaced by our subclass
of it; engines in the same process that speculate otherwise are not touched.
"""

import functools
from collections.abc import Callable
from typing import Any


def is_msd(vllm_config: Any) -> bool:
    """Whether this engine speculates with an MSD draft."""
    speculative_config = vllm_config.speculative_config
    draft_model_config = getattr(speculative_config, "draft_model_config", None)
    return hasattr(getattr(draft_model_config, "hf_config", None), "msd_draft")


def wrap_init_device(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of ``WorkerWrapperBase.init_device``, which builds the model runner."""

    @functools.wraps(original)
    def init_device(self: Any) -> None:
        original(self)
        if is_msd(self.vllm_config) and not self.vllm_config.use_v2_model_runner:
            from vllm.config import set_current_vllm_config

            from vllm_msd.vllm_plugin.proposer_v1 import MSDProposer

            runner = self.worker.model_runner
            with set_current_vllm_config(self.vllm_config):
                runner.drafter = MSDProposer(self.vllm_config, runner.device, runner)

    return init_device

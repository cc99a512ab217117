"""Gives a worker of an MSD engine its drafter, or the runner that drafts trees.

Model Runner V1 has built vLLM's EAGLE drafter by then and loaded no weights yet, so the drafter is
simply replaced by our subclass of it; for draft trees the whole runner is ours. Model Runner V2
gets our speculators, and a mend for LoRA (see `gpu.lora`). Engines in the same process that
speculate otherwise are not touched.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration.tree_settings import is_msd_config, wants_trees
from vllm_msd.vllm_plugin.patches.patching import PatchError


def is_msd(vllm_config: Any) -> bool:
    """Whether this engine speculates with an MSD draft."""
    return is_msd_config(vllm_config.speculative_config)


def wrap_init_device(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of ``WorkerWrapperBase.init_device``, which builds the model runner."""

    @functools.wraps(original)
    def init_device(self: Any) -> None:
        if not is_msd(self.vllm_config):
            original(self)
        elif self.vllm_config.use_v2_model_runner:
            original(self)
            _require_our_speculator(self.worker.model_runner)
            if self.vllm_config.lora_config is not None:
                from vllm_msd.vllm_plugin.gpu.lora import follow_drafts

                follow_drafts(self.worker.model_runner)
        elif wants_trees(self.vllm_config):
            with _tree_runner():
                original(self)
        else:
            original(self)
            _set_drafter(self.worker.model_runner, self.vllm_config)

    return init_device


def _require_our_speculator(runner: Any) -> None:
    """Raise PatchError where Model Runner V2 was imported before it could be patched.

    It binds ``init_speculator`` as it is imported; drafts would then go on without us.
    """
    from vllm_msd.vllm_plugin.gpu.chain_speculator import ChainSpeculator

    if not isinstance(runner.speculator, ChainSpeculator):
        raise PatchError(
            f"MSD was asked for, but vLLM built a {type(runner.speculator).__name__}: its model "
            "runner had been imported before plugins were loaded. Import nothing from "
            "vllm.v1.worker before the engine is made, or call "
            "vllm.plugins.load_general_plugins() first."
        )


def _set_drafter(runner: Any, vllm_config: Any) -> None:
    """Give a runner of vLLM's own the drafter of chains."""
    from vllm.config import set_current_vllm_config

    from vllm_msd.vllm_plugin.cpu.chain_drafter import MSDProposer

    with set_current_vllm_config(vllm_config):
        runner.drafter = MSDProposer(vllm_config, runner.device, runner)


@contextmanager
def _tree_runner() -> Iterator[None]:
    """Workers made meanwhile build our runner for trees.

    Raises:
        ConfigError: not on the CPU.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError(
            "MSD's draft trees need Model Runner V2 on this device. Unset "
            "VLLM_USE_V2_MODEL_RUNNER, or draft a chain: set tree_top_k to 1."
        )
    from vllm.v1.worker import cpu_worker

    from vllm_msd.vllm_plugin.cpu import attention as cpu_attention
    from vllm_msd.vllm_plugin.cpu.runner import TreeModelRunner

    cpu_attention.register()
    before = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = TreeModelRunner
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = before


def wrap_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``vllm.v1.worker.gpu.spec_decode.init_speculator`` (Model Runner V2)."""

    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not is_msd(vllm_config):
            return original(vllm_config, device, req_states)
        if wants_trees(vllm_config):
            from vllm_msd.vllm_plugin.gpu.speculator import TreeSpeculator

            return TreeSpeculator(vllm_config, device)
        from vllm_msd.vllm_plugin.gpu.chain_speculator import ChainSpeculator

        return ChainSpeculator(vllm_config, device)

    return init_speculator

"""Mends vLLM's sampling on the CPU (Model Runner V1), in three places.

1. The rejection sampler spreads each request's temperature, top-p and top-k over its drafted
tokens. On the CPU that kernel is replaced by a C++ one for int64 tensors, and the adapter around it
hands over a converted copy of the output and drops it: temperature (float32), top-p (float32) and
top-k (int32) come back as uninitialised memory (vLLM issue 55005). Greedy requests do not take this
way.

2. A step without drafted tokens (a prompt's first) hands the sampler an empty batch, and top-k
without top-p takes the maximum over its k: the engine dies.

3. A prompt that is read in chunks has a token sampled after each, which is thrown away; the random
numbers of a seeded request are wound back then, which a CPU's generator cannot do: the engine dies,
with and without speculation.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_msd.cpu_environment import shortcomings
from vllm_msd.vllm_plugin.runners import is_msd


def wrap_expand_kernel(original: Callable[..., None]) -> Callable[..., None]:
    """The replacement for ``vllm.utils.cpu_triton_utils._expand_kernel_impl``."""

    @functools.wraps(original)
    def expand(
        output: torch.Tensor,
        input_val: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        replace_from: float,
        replace_to: float,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        """Write ``input_val[r]`` into request r's tokens of ``output``, any dtype.

        Args:
            output: ``[num_tokens]``, written in place.
            input_val: ``[num_requests]``.
            cu_num_tokens: ``[num_requests]`` integer, end of each request's tokens in ``output``.
            replace_from: a value of ``input_val`` that is written as ``replace_to`` instead.
            replace_to: see above.
            MAX_NUM_TOKENS: the kernel's block size, not needed here.
        """
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        output.copy_(values.repeat_interleave(counts.long()))

    return expand


def wrap_apply_top_k_only(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The replacement for ``vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_only``."""

    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Keep the ``k[i]`` best of each row of ``logits [num_tokens, vocab]``, also of no row."""
        return original(logits, k) if logits.shape[0] else logits

    return apply_top_k_only


def wrap_initialize_from_config(original: Callable[..., None]) -> Callable[..., None]:
    """The replacement for ``WorkerWrapperBase.initialize_from_config``: the runner is complete."""

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        if self.vllm_config.device_config.device_type == "cpu" and not (
            self.vllm_config.use_v2_model_runner
        ):
            runner = self.worker.model_runner
            runner.sample_tokens = spare_unfinished_prompts(runner)
            if is_msd(self.vllm_config):
                advise(self.vllm_config)

    return initialize_from_config


def advise(vllm_config: Any) -> None:
    """Say once, when all is ready, what makes this engine much slower than it could be."""
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if found := shortcomings(os.environ, dtype):
        init_logger("vllm.vllm_msd").warning("MSD: this CPU could do better. %s.", "; ".join(found))


def spare_unfinished_prompts(runner: Any) -> Callable[..., Any]:
    """``runner.sample_tokens``, but no unfinished prompt draws from its request's generator.

    What is sampled for it is thrown away, so it may come from anywhere.
    """
    sample_tokens = runner.sample_tokens

    @functools.wraps(sample_tokens)
    def sample(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        spared = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            batch.generators.update(spared)

    return sample

"""Mends vLLM's sampling under speculation on the CPU (Model Runner V1), in two places.

1. The rejection sampler spreads each request's temperature, top-p and top-k over its drafted
tokens. On the CPU that kernel is replaced by a C++ one for int64 tensors, and the adapter around it
hands over a converted copy of the output and drops it: temperature (float32), top-p (float32) and
top-k (int32) come back as uninitialised memory (vLLM issue 55005). Greedy requests do not take this
way.

2. A step without drafted tokens (a prompt's first) hands the sampler an empty batch, and top-k
without top-p takes the maximum over its k: the engine dies.
"""

import functools
from collections.abc import Callable

import torch


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

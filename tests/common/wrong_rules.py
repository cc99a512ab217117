"""Wrong acceptance rules, patched into vLLM as negative controls of the losslessness tests.

All of them are mistakes one can really make. Model Runner V1 verifies in Python around C++ kernels,
Model Runner V2 inside Triton kernels, so only the first rule exists for both.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def accept_every_draft(runner: str) -> Iterator[None]:
    """Whatever was drafted is output, whether the target wants it or not."""
    if runner == "v2":
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler as v2

        with mock.patch.object(v2, "rejection_sample", _always(v2.rejection_sample)):
            yield
        return
    from vllm.v1.sample import rejection_sampler as v1

    greedy = v1._rejection_greedy_sample

    def take_draft(output: Any, cu_drafts: Any, drafts: Any, best: Any, *rest: Any) -> Any:
        return greedy(output, cu_drafts, drafts, drafts.to(best.dtype), *rest)

    def zeros(num_tokens: int, *_: Any) -> torch.Tensor:
        return torch.zeros(num_tokens, dtype=torch.float64)

    with (
        mock.patch.object(v1, "_rejection_greedy_sample", take_draft),
        mock.patch.object(v1, "generate_uniform_probs", zeros),
    ):
        yield


def _always(rejection_sample: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's synthetic acceptance, at a rate of 1."""
    signature = inspect.signature(rejection_sample)

    def sample(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        steps = bound.arguments["num_speculative_steps"]
        bound.arguments["synthetic_conditional_rates"] = torch.ones(steps)
        return rejection_sample(*bound.args, **bound.kwargs)

    return sample


@contextmanager
def redraw_without_residual(runner: str) -> Iterator[None]:
    """After a rejection, draw from the target's law itself: rejected drafts get a second chance."""
    with _recover(runner, lambda probs: torch.multinomial(probs, 1).squeeze(-1)):
        yield


@contextmanager
def redraw_best(runner: str) -> Iterator[None]:
    """After a rejection, output the target's most likely token."""
    with _recover(runner, lambda probs: probs.argmax(-1)):
        yield


@contextmanager
def _recover(runner: str, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    if runner != "v1":
        raise ValueError(f"this rule exists for model runner v1, got {runner}")
    from vllm.v1.sample import rejection_sampler as v1

    original = v1.sample_recovered_tokens
    signature = inspect.signature(original)

    def recovered(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = signature.bind(*args, **kwargs).arguments
        return choose(call["target_probs"]).to(call["draft_token_ids"].dtype)

    with mock.patch.object(v1, "sample_recovered_tokens", recovered):
        yield


WRONG_RULES = {
    "v1": (accept_every_draft, redraw_without_residual, redraw_best),
    "v2": (accept_every_draft,),
}

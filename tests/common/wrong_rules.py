"""Wrong acceptance rules, patched in as negative controls of the losslessness tests.

All of them are mistakes one can really make. With chains, Model Runner V1 verifies in Python around
C++ kernels, Model Runner V2 inside Triton kernels, so only the first rule exists for both. With
trees the rule is this package's.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from tests.common.tree_mutations import ACCEPT, mutated, patched


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


@contextmanager
def accept_first_child(runner: str) -> Iterator[None]:
    """The draft's likeliest path down the tree is output, whatever the target draws there."""

    def wrong(original: Any) -> Any:
        def accept(
            drawn: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, start: torch.Tensor
        ) -> Any:
            wrong = drawn.clone()
            for up, (begin, end) in zip(parents, pairwise(start.tolist()), strict=True):
                nodes, up = slice(begin, end), up[None, : end - begin].long()
                children = tokens[None, nodes].to(drawn.dtype)
                wrong[nodes] = _first_children(children, up, drawn[None, nodes])[0]
            return original(wrong, tokens, parents, start)

        return accept

    with patched(ACCEPT, wrong):
        yield


def _first_children(
    tokens: torch.Tensor, parents: torch.Tensor, drawn: torch.Tensor
) -> torch.Tensor:
    """``drawn`` with the first child's token wherever there is a child; all ``[R, T]``."""
    node = torch.arange(tokens.shape[1])
    is_child = (parents[:, None, :] == node[:, None]) & (tokens[:, None, :] >= 0)  # [R, T, T]
    first = tokens.gather(1, is_child.int().argmax(-1))
    return torch.where(is_child.any(-1), first, drawn)


@contextmanager
def redraw_among_all(runner: str) -> Iterator[None]:
    """A drawn token that is no child counts as a rejection, and another one is drawn in its place.

    The mistake of `redraw_without_residual` with trees: children get a second chance.
    """
    if runner != "v1":
        raise ValueError(f"this rule exists for model runner v1, got {runner}")
    from vllm.v1.sample.sampler import Sampler

    sample = Sampler.sample
    again: list[torch.Tensor] = []

    def sample_twice(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        again[:] = [sample(self, logits.clone(), *args, **kwargs)[0].long()]
        return sample(self, logits, *args, **kwargs)

    def wrong(original: Any) -> Any:
        def accept(
            drawn: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, start: torch.Tensor
        ) -> Any:
            right = original(drawn, tokens, parents, start)
            found = right.tokens.clone()
            for request, (begin, end) in enumerate(pairwise(start.tolist())):
                depth = int(right.lengths[request])
                last = int(right.nodes[request, depth])
                if (parents[request, : end - begin] == last).any():  # it has children
                    found[request, depth] = again[0][begin + last]
            return right._replace(tokens=found)

        return accept

    with mock.patch.object(Sampler, "sample", sample_twice), patched(ACCEPT, wrong):
        yield


@contextmanager
def tokens_in_row_order(runner: str) -> Iterator[None]:
    """The right path is accepted, but the tokens drawn at the first nodes are output."""
    with mutated(runner, "acceptance"):
        yield


WRONG_RULES = {
    "v1": (accept_every_draft, redraw_without_residual, redraw_best),
    "v2": (accept_every_draft,),
}
WRONG_TREE_RULES = {
    "v1": (accept_first_child, redraw_among_all, tokens_in_row_order),
    "v2": (accept_first_child, tokens_in_row_order),
}

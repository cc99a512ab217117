"""Acceptance from a table, for models of random weights: what is drafted is run, and then replaced.

The draft has run as it would, and so does everything after it; a verification accepts what a draw
says. Draws follow the chances of a usual tree (`vllm_msd.budget.usual_tree`), evenly spread, so
that a few hundred of them already have its mean. The text is noise.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

from vllm_msd.bench.arms import Arm
from vllm_msd.budget import usual_tree
from vllm_msd.tree import DraftTree, TreeConfig

FIRST_TOKEN = 100  # node i proposes the i-th token from here on, the root's place proposes none
_GOLDEN = (math.sqrt(5) - 1) / 2
_FORCED = 1e4  # a logit that decides


class Replay:
    """Draws how each verification of an arm ends.

    Args:
        shape: of its trees, or chains.
        ratio: how often the draft's first choice is right (`vllm_msd.budget.ratio_for`).
        seed: of the first draw.
        device: of the engine.

    Attributes:
        tree: ``[1, T]`` the one that all requests have.
    """

    def __init__(
        self, shape: TreeConfig, ratio: float, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        usual = usual_tree(shape, [ratio])
        parents, size = [-1, *usual.parents.tolist()], shape.num_nodes + 1
        tokens = torch.arange(size, device=device)[None] + FIRST_TOKEN
        self.tree = DraftTree.from_parents(tokens, torch.tensor([parents], device=device))
        # A verification ends at a node if that is accepted and none of its children is.
        ends = torch.tensor([1.0, *usual.chances], dtype=torch.float64)
        ends.index_add_(0, torch.tensor(parents[1:]), -ends[1:])
        self._cumulated = ends.clamp(min=0).cumsum(0).to(device)
        drawn = torch.full((size, size), FIRST_TOKEN)  # by end: what the target says after each
        for end in range(size):
            node = end
            while node:
                drawn[end, parents[node]] = FIRST_TOKEN + node
                node = parents[node]
        self._drawn = drawn.to(device)
        self._start, self._count = random.Random(seed).random(), 0

    def ends(self, requests: int) -> Tensor:
        """``[R]`` int64 the last accepted node of each request; of a chain, how many tokens."""
        numbers = torch.arange(self._count, self._count + requests, device=self._cumulated.device)
        self._count += requests
        draws = (self._start + numbers.double() * _GOLDEN) % 1
        found = torch.searchsorted(self._cumulated, draws * self._cumulated[-1], right=True)
        return found.clamp(max=len(self._cumulated) - 1)

    def drawn(self, row_start: Tensor, num_rows: int) -> Tensor:
        """What the target says after every node of a step, so that the drawn paths are accepted.

        Nothing is read on the host.

        Args:
            row_start: ``[R + 1]`` integers, the first node of each request.
            num_rows: nodes in all.

        Returns:
            ``[num_rows]`` int64 tokens.
        """
        ends = self.ends(len(row_start) - 1)
        row_start = row_start.long()
        rows = torch.arange(num_rows, device=row_start.device)
        request = torch.searchsorted(row_start[1:], rows, right=True).clamp(max=len(ends) - 1)
        node = (rows - row_start[request]).clamp(0, self._drawn.shape[1] - 1)
        return self._drawn[ends[request], node]

    def force(self, logits: Tensor, metadata: Any) -> None:
        """Write into a step's logits what the target has to say about chains, in place.

        Args:
            logits: ``[rows, V]`` of the step.
            metadata: vLLM's `SpecDecodeMetadata`.
        """
        counts = torch.tensor(metadata.num_draft_tokens)
        ends = self.ends(len(counts)).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        accepted = torch.arange(len(first)) - first < ends
        rows, tokens = metadata.target_logits_indices.long(), metadata.draft_token_ids.long()
        forced = torch.where(accepted, _FORCED, -_FORCED).to(logits)
        logits[rows, tokens] = forced


def shape_of(arm: Arm) -> TreeConfig:
    """The size of an arm's trees; `is_chain` of a chain's."""
    if arm.method == "chain":
        return TreeConfig(arm.sizes[0], arm.sizes[0], 1)
    return TreeConfig(*arm.sizes)


def synthetic_rates(arm: Arm, ratio: float) -> dict[str, Any]:
    """What vLLM's own replay of a chain is told, beside the rest of the speculative config."""
    rates = [ratio**depth for depth in range(1, arm.sizes[0] + 1)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def install(runner: Any, arm: Arm, ratio: float, seed: int) -> None:
    """Let a model runner of this process accept by draws from now on.

    A chain under Model Runner V2 is left alone: vLLM replays it (`synthetic_rates`).

    Args:
        runner: vLLM's, of an engine of the arm.
        arm: of MSD, with sizes.
        ratio, seed: see `Replay`.
    """
    is_v1 = hasattr(runner, "drafter")
    if arm.method == "chain":
        if is_v1:
            _install_chain(runner, Replay(shape_of(arm), ratio, seed))
        return
    replay = Replay(shape_of(arm), ratio, seed, runner.device)
    store = runner.store if is_v1 else runner.model_state.store
    accept = store.accept

    def accept_drawn(slots: Any, row_start: Tensor, drawn: Tensor, tokens: Tensor) -> Any:
        return accept(slots, row_start, replay.drawn(row_start, len(drawn)).to(drawn), tokens)

    store.accept = accept_drawn
    if is_v1:
        _install_trees_v1(runner.drafter, replay.tree)
    else:
        _install_trees_v2(runner.speculator, store, replay.tree)


def _install_chain(runner: Any, replay: Replay) -> None:
    """vLLM's rejection sampler on a CPU knows no synthetic acceptance (0.32 and 0.33)."""
    sampler = runner.rejection_sampler
    forward = sampler.forward

    def forced(metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any) -> Any:
        replay.force(logits, metadata)
        return forward(metadata, draft_probs, logits, sampling_metadata)

    sampler.forward = forced


def _install_trees_v1(drafter: Any, tree: DraftTree) -> None:
    grow = drafter._grow_all

    def grown(next_tokens: Tensor, *args: Any) -> DraftTree:
        grow(next_tokens, *args)
        return DraftTree.concatenate([tree] * len(next_tokens))

    drafter._grow_all = grown


def _install_trees_v2(speculator: Any, store: Any, tree: DraftTree) -> None:
    propose = speculator.propose

    def proposed(input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        drafted = propose(input_batch, *args, **kwargs)
        if not kwargs.get("dummy_run") and len(drafted):
            store.put(input_batch.idx_mapping[: len(drafted)].long(), tree)
            drafted.copy_(tree.tokens[:, 1:].expand_as(drafted))
        return drafted

    speculator.propose = proposed

"""Trees broken on purpose, and a look at what trees accept: both inside the worker's process.

Every mutation is a mistake one can really make, patched in where the plugin does that step. One
test each must notice it; a test that does not proves nothing about the step. ``EVERY`` names what a
tree needs on top of a chain; the tests run all of it under both model runners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vllm_msd.kernels import AcceptedPaths
from vllm_msd.tree import tree_relations


@contextmanager
def patched(place: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace ``module:name`` (or ``module:Class.name``) of this package by ``make`` of it."""
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = import_module(f"vllm_msd.{module}")
    for parent in parents:
        owner = getattr(owner, parent)
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


# Mutations -----------------------------------------------------------------------------------


def _star_masks(tree_rows: Any) -> Any:
    """A node sees the root and itself, but not what lies between them."""

    def build(tree_start: Tensor, ancestors: Tensor, is_draft: bool) -> Any:
        return tree_rows(tree_start, _star(ancestors), is_draft)

    return build


def _star(ancestors: Tensor) -> Tensor:
    below = ancestors.clone()
    for shift in (1, 2, 4, 8, 16, 32):
        below |= below >> shift  # all bits up to the node's own
    return (below ^ (below >> 1)) | 1


def _star_masks_placed(place: Any) -> Any:
    """As `_star_masks`, of the trees that `place_trees` lays over a step."""

    def broken(*args: Any, row_ancestors: Tensor, **kwargs: Any) -> None:
        place(*args, row_ancestors=row_ancestors, **kwargs)
        row_ancestors.copy_(_star(row_ancestors))

    return broken


def _linear_positions_placed(place: Any) -> Any:
    """Nodes have the rotary positions of their slots."""

    def broken(*args: Any, positions: Tensor, **kwargs: Any) -> None:
        linear = args[-1].clone()
        place(*args, positions=positions, **kwargs)
        positions.copy_(linear)

    return broken


def _tokens_in_row_order(original: Any) -> Any:
    """The accepted path is right, but its tokens are those of the tree's first nodes.

    The first ones level by level: the nodes stand in order of path probability, in which the first
    rows often are the path.
    """

    def broken(drawn: Tensor, tokens: Tensor, parents: Tensor, row_start: Tensor) -> Any:
        right = original(drawn, tokens, parents, row_start)
        node = torch.arange(parents.shape[1])
        depths = tree_relations(parents.long())[0]
        is_real = node < row_start.diff()[:, None]
        first = torch.where(is_real, depths, len(node)).sort(dim=1, stable=True).indices
        rows = row_start[:-1, None].long() + first
        wrong = drawn.long()[rows.clamp(max=len(drawn) - 1)]
        return right._replace(tokens=torch.where(right.nodes >= 0, wrong, -1))

    return broken


def _linear_sampling_positions(verify: Any) -> Any:
    """Seeded noise is keyed by the row's slot instead of the node's depth."""

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        unshifted = lambda count: torch.zeros(count, dtype=torch.int64)  # noqa: E731
        with mock.patch.object(self.store, "next_shifts", unshifted):
            return verify(self, *args, **kwargs)

    return broken


def _first_rows(draft_prefill: Any) -> Any:
    """The compact prefill takes a tree's first rows instead of those on the accepted path."""

    def broken(step: Any, *args: Any) -> None:
        first = torch.arange(step.nodes.shape[1]).where(step.nodes >= 0, step.nodes)
        draft_prefill(step._replace(nodes=first), *args)

    return broken


def _inherited(name: str) -> Callable[[Any], Any]:
    """A method of `TreeModelState` left out: vLLM's own in its place."""

    def make(_: Any) -> Any:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        return getattr(DefaultModelState, name)

    return make


def _unshifted_rows(build: Any) -> Any:
    """Nodes have the rotary positions of their slots."""

    def broken(*args: Any) -> Any:
        right = build(*args)
        return replace(right, shift=torch.zeros_like(right.shift))

    return broken


def _nothing(_: Any) -> Callable[..., None]:
    return lambda *args, **kwargs: None


# What is broken: the place and its replacement. The first ones are the same for both model runners.
STORE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "mask": ("tree.store:TreeRows", _star_masks),
    "acceptance": ("tree.store:accept", _tokens_in_row_order),
    "draft_gather": ("tree.store:TreeStore.path_rows", _nothing),
}
STATE = "vllm_plugin.gpu.model_state:TreeModelState"
MUTATIONS: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "v1": {
        **STORE,
        "position": ("vllm_plugin.cpu.step:StepNodes.build", _unshifted_rows),
        "settle": ("vllm_plugin.cpu.runner:settle_cpu", _nothing),
    },
    "v2": {
        **STORE,
        "mask": ("tree.store:place_trees", _star_masks_placed),
        "position": ("tree.store:place_trees", _linear_positions_placed),
        "draft_gather": ("vllm_plugin.gpu.compact_prefill:draft_prefill", _first_rows),
        "draft_move": ("tree.store:TreeStore.move_accepted", _nothing),
        "settle": (f"{STATE}.postprocess_state", _inherited("postprocess_state")),
        "sampling_position": (
            "vllm_plugin.gpu.sampler:TreeRejectionSampler._verify", _linear_sampling_positions,
        ),
    },
}  # fmt: skip
# What the draft reads changes no output.
SHOWS_IN_OUTPUT = {
    runner: [name for name in table if not name.startswith("draft_")]
    for runner, table in MUTATIONS.items()
}


@contextmanager
def mutated(runner: str, name: str) -> Iterator[None]:
    """Break one step of a tree engine in this process."""
    with patched(*MUTATIONS[runner][name]):
        yield


# What trees accept ---------------------------------------------------------------------------

ACCEPT = "tree.store:accept"


@dataclass
class Seen:
    """What the walks accepted so far.

    ``other_children``: accepted nodes that are not their parent's first child, which no chain could
    have accepted. ``branching``: verified trees in which a node has two children. ``cut``: trees
    that the scheduler made shorter than the largest one in ``sizes``.
    """

    trees: int = 0
    branching: int = 0
    accepted: int = 0
    other_children: int = 0
    deepest: int = 0
    sizes: dict[int, int] = field(default_factory=dict)

    def add(self, parents: Tensor, num_nodes: Tensor, found: AcceptedPaths) -> None:
        """Count the trees of one step."""
        node = torch.arange(parents.shape[1])
        is_real = node < num_nodes[:, None]
        twins = (parents[:, :, None] == parents[:, None, :]) & (node < node[:, None])
        is_other = twins.any(-1)
        on_path = torch.zeros_like(is_other).scatter_(1, found.nodes.clamp(min=0), True)
        self.trees += int((num_nodes > 1).sum())
        self.branching += int((is_other & is_real).any(1).sum())
        self.accepted += int(found.lengths.sum())
        self.other_children += int((on_path & is_other).sum())
        self.deepest = max(self.deepest, int(found.lengths.max()))
        for size in num_nodes.tolist():
            self.sizes[size] = self.sizes.get(size, 0) + 1

    def report(self) -> dict[str, Any]:
        """The counts as plain numbers, and no longer here."""
        counts = {
            "trees": self.trees,
            "branching": self.branching,
            "path_nodes": self.accepted,
            "other_children": self.other_children,
            "deepest": self.deepest,
            "tree_sizes": {str(size): n for size, n in sorted(self.sizes.items())},
        }
        self.__init__()
        return counts


@contextmanager
def watched_acceptance() -> Iterator[Seen]:
    """Count what the engines of this process accept, from where the store calls `accept`."""
    seen = Seen()

    def watch(original: Any) -> Any:
        def watching(
            drawn: Tensor, tokens: Tensor, parents: Tensor, row_start: Tensor
        ) -> AcceptedPaths:
            found = original(drawn, tokens, parents, row_start)
            seen.add(parents, row_start.diff(), found)
            return found

        return watching

    with patched(ACCEPT, watch):
        yield seen

"""The draft tree of a batch of requests, as one frozen record."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.kernels import MAX_NODES
from vllm_msd.tree.relations import tree_relations


@dataclass(frozen=True)
class DraftTree:
    """Trees of B requests with T nodes each; node 0 is the root, parents come before children.

    ::

        node       0 root           tokens     [x  a  b  c]
                  / \\               parents    [-1 0  0  1]
                 1   2              depths     [0  1  1  2]
                 |                  ancestors  bit n set when node n is an ancestor or itself:
                 3                             [0b0001 0b0011 0b0101 0b1011]

    All tensors are ``[B, T]`` int64. The root is the sampled token that was not drafted.
    ``scores``, where known: ``[B, T]`` float32, the draft's log probability of each node's path.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "parents", "depths", "ancestors"):
            x = getattr(self, name)
            if x.dim() != 2 or x.shape != self.tokens.shape or x.dtype != torch.int64:
                raise ValueError(
                    f"{name}: got {tuple(x.shape)} {x.dtype}, expected "
                    f"{tuple(self.tokens.shape)} torch.int64 with two axes"
                )
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise ValueError(f"nodes per tree: got {self.num_nodes}, expected 1 to {MAX_NODES}")

    @property
    def num_nodes(self) -> int:
        """Nodes per tree (T), the root included."""
        return self.tokens.shape[1]

    @classmethod
    def from_parents(
        cls, tokens: Tensor, parents: Tensor, check: bool = True, scores: Tensor | None = None
    ) -> "DraftTree":
        """Build the record from ``[B, T]`` tokens and parents (-1 at the root only).

        Args:
            tokens: int64 token of each node.
            parents: int64 parent of each node.
            check: look at the contents of ``parents``, which waits for the device.
            scores: float32 log probability of each node's path.

        Raises:
            ValueError: a node does not come after its parent, or there are too many nodes.
        """
        node = torch.arange(tokens.shape[1], device=tokens.device)
        if check and (
            (parents >= node).any() or (parents[:, 1:] < 0).any() or (parents[:, 0] != -1).any()
        ):
            raise ValueError("parents: expected -1 at node 0 and an earlier node everywhere else")
        return cls(tokens, parents, *tree_relations(parents), scores)

    def by_request(self) -> list["DraftTree"]:
        """The trees one by one, ``[1, T]`` each; views."""
        fields = [self.tokens, self.parents, self.depths, self.ancestors]
        if self.scores is not None:
            fields.append(self.scores)
        return [DraftTree(*one) for one in zip(*(x.split(1) for x in fields), strict=True)]

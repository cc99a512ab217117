"""Growing dynamic trees by kernels: `grow_tree` for an engine, captured in one CUDA graph.

Three launches a level beside the draft's own, none of which reads a tensor on the host or makes
one: the best tokens of each row (two), the next level's rows (one). After the last level one more
keeps the best nodes. ``grow.py`` is the definition; both grow the same trees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_msd.kernels import (
    Beams,
    Candidates,
    DraftPlace,
    LevelInputs,
    TopK,
    allocate_parts,
    beam_step,
    merge_top_k,
    rerank,
    top_k_parts,
)
from vllm_msd.tree.grow import TreeShape


class FusedExpandFn(Protocol):
    """Feeds one level to the draft."""

    def __call__(self, level: int, ancestors: Tensor, tree_start: Tensor) -> tuple[Tensor, Tensor]:
        """Run the draft over the ``R * k`` rows that stand in the `LevelInputs`.

        Args:
            level: 0, 1, ...: a Python number, so that a graph holds what follows from it.
            ancestors: ``[R * k]`` int64, bit b set where a row sees the b-th drafted row.
            tree_start: ``[R]`` int32 position of the first drafted row, -1 for a causal request.

        Returns:
            logits ``[R * k, V]`` and hidden states ``[R * k, H]``, which the next step reads.
        """


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a draft's columns of logits stand for.

    ``token_ids [V]`` int32 or int64: the token of each column, None if it is the column's number.
    ``first_column``: number of this device's first column, where they are spread over devices.
    ``gather``: puts the ``[rows, parts, k + 1]`` results of all devices behind one another along
    dimension 1; None for one device.
    """

    token_ids: Tensor | None = None
    first_column: int = 0
    gather: Callable[[Tensor], Tensor] | None = None


WHOLE = Vocabulary()


@dataclass(frozen=True)
class GrowthBuffers:
    """What growing writes on its way, made once for the largest batch.

    ``parts`` and ``best``: of the rows of one level, see `vllm_msd.kernels.top_k`. ``candidates``
    and ``beams``: of the whole tree.
    """

    shape: TreeShape
    parts: Tensor
    best: TopK
    candidates: Candidates
    beams: Beams

    @classmethod
    def allocate(
        cls, shape: TreeShape, num_requests: int, num_columns: int, device: torch.device
    ) -> "GrowthBuffers":
        """``num_columns``: of the logits on this device."""
        k, rows = shape.top_k, num_requests * shape.top_k
        return cls(
            shape,
            allocate_parts(rows, num_columns, k, device),
            TopK.allocate(rows, k, device),
            Candidates.allocate(num_requests, shape.depth, k, device),
            Beams.allocate(num_requests, shape.depth, k, device),
        )

    def shallower(self, depth: int) -> "GrowthBuffers":
        """The same memory, for trees of `TreeShape.shallower`."""
        shape = self.shape.shallower(depth)
        requests = len(self.candidates.scores)
        candidates = Candidates(
            *(
                t.flatten()[: requests * shape.num_candidates].view(requests, -1)
                for t in self.candidates
            )
        )
        beams = Beams(self.beams.numbers[:depth], self.beams.ancestors[:depth], *self.beams[2:])
        return GrowthBuffers(shape, self.parts, self.best, candidates, beams)


def grow_tree_fused(
    root_logits: Tensor,
    root_hidden: Tensor,
    expand: FusedExpandFn,
    buffers: GrowthBuffers,
    inputs: LevelInputs,
    place: DraftPlace,
    relations: tuple[Tensor, Tensor, Tensor],
    draft_tokens: Tensor,
    vocabulary: Vocabulary = WHOLE,
) -> None:
    """Grow one tree for each of R requests, padding requests included.

    Args:
        root_logits: ``[R, V]`` bfloat16, float16 or float32, the draft's for the token after the
            root.
        root_hidden: ``[R, H]`` the draft's output that gave them, not in ``inputs.hidden``.
        expand: feeds a level to the draft.
        buffers: written; for R requests or more.
        inputs: written before each call of ``expand``, which reads them.
        place: where the rows lie, and which requests are padding.
        relations: parents, depths and ancestors by slot, ``[slots + 1, T]`` int64, written in place
            at the requests' slots; see `vllm_msd.kernels.rerank`. T is how many nodes are kept.
        draft_tokens: ``[R or more, T - 1]`` int64, written.
        vocabulary: what the columns of the logits are.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    shape, num_requests = buffers.shape, len(root_logits)
    k, slots = shape.top_k, place.slots[:num_requests]
    logits, hidden = root_logits, root_hidden
    del root_logits
    for level in range(shape.depth + 1):
        rows = len(logits)
        parts = top_k_parts(logits, k, vocabulary.first_column, out=buffers.parts[:rows])
        del logits  # before the next level's are made: the largest tensors of a round
        if vocabulary.gather is not None:
            parts = vocabulary.gather(parts)
        best = TopK(*(t[:rows] for t in buffers.best))
        merge_top_k(parts, vocabulary.token_ids, out=best)
        beam_step(*best, level, buffers.candidates, buffers.beams, inputs, hidden, place)
        if level < shape.depth:
            ancestors = buffers.beams.ancestors[level, :num_requests].flatten()
            logits, hidden = expand(  # noqa: RUF059 (the next turn of the loop uses it)
                level, ancestors, buffers.beams.tree_start[:num_requests]
            )
    rerank(buffers.candidates, k, slots, *relations, draft_tokens)

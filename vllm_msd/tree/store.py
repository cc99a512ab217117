"""The owner of an engine's trees: kept by request between steps, laid over rows within a step.

vLLM schedules a tree like a chain: node i of a request stands i rows after the root, and its KV
goes to the i-th slot after the root's. A step goes through the store like this::

    put           the drafter keeps each request's new tree under the request's slot
    begin_step    the target's forward pass: which row is which node, what attention follows
    shift         rotary positions: a node's is its root's plus its depth
    open_step, place    both, by a kernel that reads nothing on the host
    accept        the walk down each tree along the target's draws
    path_rows, move_accepted    rows of the accepted path in front: the drafter's input
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.kernels import AcceptedPaths, accept, place_trees
from vllm_msd.tree.chains import lay_out_chains
from vllm_msd.tree.path import path_index, path_moves
from vllm_msd.tree.record import DraftTree
from vllm_msd.tree.relations import chain_parents
from vllm_msd.tree.rows import TreeRows


@dataclass(frozen=True)
class Step:
    """The trees of one forward pass. ``root_rows [R]`` int64: the row of each request's root."""

    tree: TreeRows
    root_rows: Tensor


class TreeStore:
    """Trees of T nodes at most, of as many requests as an engine runs at once.

    A slot starts with a chain, for which an engine's own behaviour is exact. A tree that is stale
    but consistent costs speed only, so parents are written in one place, with what follows from
    them. Nothing here reads a tensor on the host. CUDA graphs read and write these very tensors,
    so all are made once and written in place.

    Attributes:
        parents, depths, ancestors: ``[slots + 1, T]`` int64, as in `DraftTree`. The last row is
            nobody's: slot -1, which the padding requests of a graph have, comes out there.
        tree_start: ``[slots]`` int32 and
        row_ancestors: ``[rows]`` int64, of the current step, as in `TreeRows`.
        root_rows, shifts: ``[slots]`` and ``[rows]`` int64, of the current step, see `place`.
        step: the current step, None before the first.
        accepted: what was accepted in it, of all requests in batch order; more than one entry
            where they were verified in turn, none where nobody had drafts.
    """

    def __init__(
        self, num_slots: int, num_rows: int, num_nodes: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_nodes = num_nodes
        parents = chain_parents(1, num_nodes, device)
        self.chain = DraftTree.from_parents(torch.zeros_like(parents), parents, check=False)
        self.parents = self.chain.parents.repeat(num_slots + 1, 1)
        self.depths = self.chain.depths.repeat(num_slots + 1, 1)
        self.ancestors = self.chain.ancestors.repeat(num_slots + 1, 1)
        self.tree_start = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
        self.row_ancestors = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.root_rows = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.shifts = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.step: Step | None = None
        self.accepted: list[AcceptedPaths] = []
        self._verified_nodes = 0

    def put(self, slots: Tensor | slice, tree: DraftTree) -> None:
        """Keep the trees of R requests, of T nodes or fewer, under their slots (``[R]`` int64).

        Nodes that a smaller tree does not have keep what they were; no step verifies them.
        """
        nodes = slice(0, tree.num_nodes)
        self.parents[slots, nodes] = tree.parents
        self.depths[slots, nodes] = tree.depths
        self.ancestors[slots, nodes] = tree.ancestors

    def put_chain(self, slot: int) -> None:
        """Forget the tree of a slot: its next drafts are a chain."""
        self.put(slice(slot, slot + 1), self.chain)

    def turn_into_chains(self, slots: Tensor, drafted: Tensor, as_chain: Tensor) -> None:
        """Lay out some of the trees just put as chains of the same nodes, see `lay_out_chains`.

        Args:
            slots: ``[R]`` int64.
            drafted: ``[R, T - 1]`` int64 their nodes' tokens, written in place; fewer where the
                trees just put are smaller.
            as_chain: ``[R]`` bool, the requests to turn.
        """
        tokens = torch.nn.functional.pad(drafted, (1, 0))  # roots stay where they are
        relations = (
            x[slots, : tokens.shape[1]] for x in (self.parents, self.depths, self.ancestors)
        )
        tree = lay_out_chains(DraftTree(tokens, *relations), as_chain)
        self.put(slots, tree)
        drafted.copy_(tree.tokens[:, 1:])

    def shift(self, slots: Tensor, nodes: Tensor) -> Tensor:
        """Depth minus node number: how far positions lie from linear ones, 0 or less.

        Args:
            slots, nodes: ``[L]`` integers, the slot and the node of each row asked about.

        Returns:
            ``[L]`` int64.
        """
        return self.depths[slots, nodes] - nodes

    def begin_step(
        self,
        slots: Tensor,
        nodes: Tensor,
        rows: Tensor,
        row_start: Tensor,
        seq_lens: Tensor,
        padded_requests: int,
        padded_rows: int,
    ) -> TreeRows:
        """Lay the trees over the rows of a forward pass of R requests with L nodes in all.

        A request without drafts is a root alone, and causal. Nodes are the last rows of their
        request, root first; they come request by request, as the logits do.

        Args:
            slots, nodes, rows: ``[L]`` integers: slot, node number and row of each node.
            row_start: ``[R + 1]`` integers, the first node of each request among them.
            seq_lens: ``[R]`` integers, positions of each request with these rows.
            padded_requests, padded_rows: how many the pass has, padding included.
        """
        num_nodes = row_start.diff()
        self.tree_start.fill_(-1)
        self.tree_start[: len(num_nodes)] = torch.where(num_nodes > 1, seq_lens - num_nodes, -1)
        self.row_ancestors[rows] = self.ancestors[slots, nodes]
        tree = TreeRows(
            self.tree_start[:padded_requests], self.row_ancestors[:padded_rows], is_draft=False
        )
        self.step = Step(tree, rows[row_start[:-1]].long())
        self.accepted = []
        return tree

    def open_step(self, num_requests: int, padded_requests: int, padded_rows: int) -> TreeRows:
        """The trees of a step of R requests, for attention; `place` fills them in.

        Args:
            num_requests: R.
            padded_requests, padded_rows: how many the pass has, padding included.
        """
        tree = TreeRows(
            self.tree_start[:padded_requests], self.row_ancestors[:padded_rows], is_draft=False
        )
        self.step = Step(tree, self.root_rows[:num_requests])
        self.accepted, self._verified_nodes = [], 0
        return tree

    def skip_step(self) -> None:
        """A step in which no request has drafts, and no pass follows trees."""
        self.step, self.accepted = None, []

    def place(
        self,
        slots: Tensor,
        node_start: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        linear: Tensor,
        positions: Tensor,
    ) -> None:
        """Lay the trees over the rows of the step that is open; see `vllm_msd.kernels.place_trees`.

        What `begin_step` and `shift` do, in one launch.
        """
        if self.step is None:
            raise RuntimeError("place: expected an open step")
        place_trees(
            self.depths,
            self.ancestors,
            slots,
            node_start,
            query_start,
            seq_lens,
            linear,
            tree_start=self.step.tree.tree_start,
            root_rows=self.root_rows,
            row_ancestors=self.row_ancestors,
            positions=positions,
            shifts=self.shifts,
        )

    def next_shifts(self, num_nodes: int) -> Tensor:
        """``[num_nodes]`` int64 `shift` of the nodes whose requests `accept` takes next."""
        return self.shifts[self._verified_nodes : self._verified_nodes + num_nodes]

    def accept(
        self, slots: Tensor, row_start: Tensor, drawn: Tensor, tokens: Tensor
    ) -> AcceptedPaths:
        """Walk down the trees of the step's requests: of all at once, or of some, in batch order.

        Args:
            slots: ``[R]`` int64 their slots, which still hold the trees that are verified.
            row_start, drawn, tokens: as in `vllm_msd.kernels.accept`.
        """
        found = accept(drawn, tokens, self.parents[slots], row_start)
        self.accepted.append(found)
        self._verified_nodes += len(drawn)
        return found

    def accepted_nodes(self) -> Tensor | None:
        """``[R, T]`` int64 the step's accepted nodes, padded with -1; None if nobody had drafts."""
        if len(self.accepted) == 1:
            return self.accepted[0].nodes
        return torch.cat([found.nodes for found in self.accepted]) if self.accepted else None

    def move_accepted(self, *tensors: Tensor) -> None:
        """Move the rows of the accepted nodes behind the root's, in place; nothing else moves.

        Args:
            tensors: ``[rows, ...]`` each, one row for each row of the step.
        """
        nodes = self.accepted_nodes()
        if nodes is None or self.step is None:
            return
        to, come_from = path_moves(self.step.root_rows, nodes)
        for rows in tensors:
            rows[to] = rows[come_from]

    def path_rows(self, num_rows: int) -> Tensor | None:
        """Where each of the step's rows comes from (`path_index`); None: all stay."""
        nodes = self.accepted_nodes()
        if nodes is None or self.step is None:
            return None
        return path_index(self.step.root_rows, nodes, num_rows)

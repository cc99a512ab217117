"""The store: trees by slot, a step's rows against plain loops, and what acceptance leaves."""

import pytest
import torch

from tests.common.accepted_paths import random_forest, walked_one_by_one
from vllm_msd.kernels import ancestor_bits
from vllm_msd.tree import DraftTree, TreeStore, lay_out_chains

SLOTS, ROWS, NODES = 6, 80, 9
FIELDS = ("parents", "depths", "ancestors")


def forest(sizes: list[int], seed: int) -> tuple[DraftTree, torch.Tensor]:
    """Trees of NODES nodes, and a draw after each node; the first ``sizes`` nodes make a tree."""
    tokens, parents, drawn, _ = random_forest(sizes, NODES, seed)
    parents[:, 0] = -1
    return DraftTree.from_parents(tokens, parents, check=False), drawn


class Batch:
    """R requests in some slots, prompt rows before their nodes, in the arguments of the store."""

    def __init__(self, slots: list[int], sizes: list[int], before: list[int]) -> None:
        self.slots, self.sizes, self.before = slots, sizes, before
        self.node_slots = torch.tensor(slots).repeat_interleave(torch.tensor(sizes))
        self.nodes = torch.tensor([node for n in sizes for node in range(n)], dtype=torch.int32)
        rows, end = [], 0
        for n, m in zip(sizes, before, strict=True):
            rows += range(end + m, end + m + n)
            end += m + n
        self.num_rows, self.rows = end, torch.tensor(rows)
        self.row_start = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
        self.seq_lens = torch.tensor([40 + 3 * i for i in range(len(sizes))], dtype=torch.int32)

    def begin(self, store: TreeStore, padding: int = 0):
        return store.begin_step(
            self.node_slots, self.nodes, self.rows, self.row_start, self.seq_lens,
            len(self.sizes) + padding, self.num_rows + padding,
        )  # fmt: skip


def test_slots_start_with_chains_and_keep_what_is_put():
    store = TreeStore(SLOTS, ROWS, NODES)
    tree, _ = forest([NODES] * 3, seed=1)
    store.put(torch.tensor([4, 0, 1]), tree)
    for name in FIELDS:
        kept, chain = getattr(store, name), getattr(store.chain, name)
        assert torch.equal(kept[[4, 0, 1]], getattr(tree, name)), name
        assert torch.equal(kept[[2, 3, 5]], chain.expand(3, -1)), name
    store.put_chain(4)
    for name in FIELDS:
        kept = getattr(store, name)
        assert torch.equal(kept[4], getattr(store.chain, name)[0]), name
        assert torch.equal(kept[1], getattr(tree, name)[2]), name
    assert not torch.equal(store.parents[1], store.parents[4])


def test_a_smaller_tree_takes_the_place_of_a_larger_ones_first_nodes():
    store = TreeStore(SLOTS, ROWS, NODES)
    large, _ = forest([NODES], seed=1)
    store.put(slice(2, 3), large)
    small = DraftTree.from_parents(
        torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[-1, 0, 0, 2]])
    )
    store.put(slice(2, 3), small)
    for name in FIELDS:
        kept = getattr(store, name)[2]
        assert torch.equal(kept[:4], getattr(small, name)[0]), name
        assert torch.equal(kept[4:], getattr(large, name)[0, 4:]), name


@pytest.mark.parametrize("nodes", [NODES, 4])
def test_some_trees_become_chains_of_their_nodes(nodes):
    """Also smaller ones, put over larger ones: their old nodes are none of the chain's."""
    store = TreeStore(SLOTS, ROWS, NODES)
    store.put(torch.tensor([4, 0, 2]), forest([NODES] * 3, seed=4)[0])
    tree, _ = forest([NODES] * 3, seed=3)
    tree = DraftTree.from_parents(tree.tokens[:, :nodes], tree.parents[:, :nodes])
    slots, turn = torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    store.put(slots, tree)
    drafted = tree.tokens[:, 1:].clone()
    store.turn_into_chains(slots, drafted, turn)
    expected = lay_out_chains(tree, turn)
    assert torch.equal(drafted, expected.tokens[:, 1:])
    assert not torch.equal(expected.parents, tree.parents)
    for name in FIELDS:
        assert torch.equal(getattr(store, name)[slots, :nodes], getattr(expected, name)), name


def test_padding_requests_touch_no_slot():
    """Slot -1: the padding of a graph's batch, whatever stands in it."""
    store = TreeStore(SLOTS, ROWS, NODES)
    tree, _ = forest([NODES] * 3, seed=2)
    store.put(torch.tensor([-1, SLOTS - 1, -1]), tree)
    assert torch.equal(store.parents[SLOTS - 1], tree.parents[1])
    assert torch.equal(store.parents[: SLOTS - 1], store.chain.parents.expand(SLOTS - 1, -1))


@pytest.mark.parametrize("seed", range(4))
def test_a_step_lays_the_trees_over_its_rows(seed):
    """Cut trees, a request without drafts, prompt rows before a tree, a larger step before."""
    store = TreeStore(SLOTS, ROWS, NODES)
    tree, _ = forest([NODES] * 4, seed)
    store.put(torch.tensor([5, 0, 3, 2]), tree)
    batch = Batch([3, 5, 2, 0], sizes=[NODES, 4, 1, 7], before=[0, 6, 3, 1])
    Batch([0, 1, 2, 3, 4, 5], sizes=[2] * 6, before=[3] * 6).begin(store)
    rows = batch.begin(store, padding=2)
    assert not rows.is_draft
    assert rows.tree_start.tolist() == [40 - NODES, 43 - 4, -1, 49 - 7, -1, -1]
    assert len(rows.ancestors) == batch.num_rows + 2

    row, shifts = 0, []
    of_slot = dict(zip([5, 0, 3, 2], tree.parents.tolist(), strict=True))
    for slot, size, before, root in zip(
        batch.slots, batch.sizes, batch.before, store.step.root_rows.tolist(), strict=True
    ):
        row += before
        assert root == row
        parents = of_slot[slot][:size]
        assert rows.ancestors[row : row + size].tolist() == ancestor_bits(parents).tolist()
        depths = []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        shifts += [depth - node for node, depth in enumerate(depths)]
        row += size
    assert store.shift(batch.node_slots, batch.nodes).tolist() == shifts
    assert min(shifts) < 0


@pytest.mark.parametrize("dims", [1, 3])
def test_one_launch_lays_out_the_same_step(dims):
    """`open_step` and `place` against `begin_step` and `shift`; sampling in two turns."""
    stores = [TreeStore(SLOTS, ROWS, NODES) for _ in range(2)]
    tree, _ = forest([NODES] * 4, seed=3)
    batch = Batch([3, 5, 2, 0], sizes=[NODES, 4, 1, 7], before=[0, 6, 3, 1])
    for store in stores:
        store.put(torch.tensor([5, 0, 3, 2]), tree)
    expected, padded = batch.begin(stores[0], padding=2), len(batch.sizes) + 2
    shifts = stores[0].shift(batch.node_slots, batch.nodes)

    store = stores[1]
    rows = store.open_step(len(batch.sizes), padded, batch.num_rows + 2)
    linear = torch.arange(batch.num_rows).expand(dims, -1).squeeze(0).contiguous()
    positions = torch.zeros_like(linear)
    lengths = [m + n for m, n in zip(batch.before, batch.sizes, strict=True)]
    query_start = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.tensor(batch.slots)
    store.place(slots, batch.row_start, query_start, batch.seq_lens, linear, positions)
    assert torch.equal(rows.tree_start, expected.tree_start)
    assert torch.equal(rows.ancestors[batch.rows], expected.ancestors[batch.rows])
    assert torch.equal(store.step.root_rows, stores[0].step.root_rows)
    linear[..., batch.rows] += shifts
    assert torch.equal(positions, linear)

    first = int(batch.row_start[2])
    assert torch.equal(store.next_shifts(first), shifts[:first])
    tokens = torch.zeros(len(shifts), dtype=torch.int64)
    store.accept(slots[:2], batch.row_start[:3], tokens[:first], tokens[:first])
    assert torch.equal(store.next_shifts(len(shifts) - first), shifts[first:])
    store.skip_step()
    assert store.step is None and store.accepted_nodes() is None
    with pytest.raises(RuntimeError, match="expected an open step"):
        store.place(slots, batch.row_start, query_start, batch.seq_lens, linear, positions)


def test_the_tensors_stay_where_they_are():
    """CUDA graphs keep their addresses."""
    store = TreeStore(SLOTS, ROWS, NODES)
    names = (*FIELDS, "tree_start", "row_ancestors")
    before = {name: getattr(store, name).data_ptr() for name in names}
    tree, _ = forest([NODES], seed=3)
    store.put(torch.tensor([2]), tree)
    store.put_chain(1)
    rows = Batch([2], [NODES], [5]).begin(store)
    assert {name: getattr(store, name).data_ptr() for name in names} == before
    assert rows.tree_start.data_ptr() == before["tree_start"]
    assert rows.ancestors.data_ptr() == before["row_ancestors"]


@pytest.mark.parametrize("chunks", [[(0, 4)], [(0, 1), (1, 3), (3, 4)]])
@pytest.mark.parametrize("seed", range(4))
def test_accepted_paths_stand_in_front(chunks, seed):
    """All requests at once and some after others; rows of no node stay where they are."""
    sizes, slots = [NODES, 4, 1, 7], torch.tensor([3, 5, 2, 0])
    tree, drawn = forest(sizes, seed)
    store = TreeStore(SLOTS, ROWS, NODES)
    store.put(slots, tree)
    batch = Batch(slots.tolist(), sizes, before=[0, 6, 3, 1])
    batch.begin(store)
    assert store.accepted_nodes() is None and store.path_rows(batch.num_rows) is None
    for first, last in chunks:
        begin, end = batch.row_start[[first, last]].tolist()
        where = torch.arange(NODES) < torch.tensor(sizes[first:last])[:, None]
        store.accept(
            slots[first:last],
            batch.row_start[first : last + 1] - begin,
            drawn[first:last][where],
            tree.tokens[first:last][where],
        )
        assert len(where) and end > begin
    expected = walked_one_by_one(tree.tokens, tree.parents, drawn, torch.tensor(sizes))
    assert torch.equal(store.accepted_nodes(), expected.nodes)
    assert torch.equal(torch.cat([found.tokens for found in store.accepted]), expected.tokens)
    assert expected.lengths.max() > 0

    wanted = list(range(batch.num_rows))
    for root, path in zip(store.step.root_rows.tolist(), expected.nodes.tolist(), strict=True):
        for i, node in enumerate(path):
            if node >= 0:
                wanted[root + i] = root + node
    assert store.path_rows(batch.num_rows).tolist() == wanted
    moved = torch.arange(batch.num_rows), torch.arange(2.0 * batch.num_rows).view(-1, 2)
    store.move_accepted(*moved)
    assert moved[0].tolist() == wanted and torch.equal(moved[1][:, 0], 2.0 * moved[0])

    batch.begin(store)
    assert store.accepted_nodes() is None and store.path_rows(batch.num_rows) is None


def test_nothing_is_read_on_the_host():
    """Meta tensors have no contents: anything decided by a node or a length would raise."""
    store = TreeStore(SLOTS, ROWS, NODES, "meta")
    batch = Batch([3, 5], [NODES, 4], [0, 6])
    for name in ("node_slots", "nodes", "rows", "row_start", "seq_lens"):
        setattr(batch, name, getattr(batch, name).to("meta"))
    store.put(batch.node_slots[:2], store.chain)
    batch.begin(store)
    assert store.shift(batch.node_slots, batch.nodes).is_meta


def test_a_smaller_tree_is_kept_in_front():
    store = TreeStore(SLOTS, ROWS, NODES)
    parents = torch.tensor([[-1, 0, 0, 1]])
    store.put(slice(2, 3), DraftTree.from_parents(torch.zeros_like(parents), parents))
    assert store.parents[2, :4].tolist() == parents[0].tolist()
    assert store.depths[2, :4].tolist() == [0, 1, 1, 2]
    assert store.shift(torch.tensor([2, 2]), torch.tensor([2, 3])).tolist() == [-1, -1]
    assert store.parents[1].tolist() == list(range(-1, NODES - 1))

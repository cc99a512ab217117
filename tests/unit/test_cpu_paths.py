"""Trees split into paths, without vLLM: every row asked once, with the keys its mask names."""

import pytest
import torch

from tests.common.tree_batches import random_tree
from vllm_msd.tree import TreeRows, tree_relations
from vllm_msd.vllm_plugin.cpu.paths import PathPlan, plan_paths

BLOCK = 4
SCRATCH = 1000  # where scratch blocks are numbered from in the simulated cache


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def seen_keys(plan: PathPlan, block_table: torch.Tensor) -> dict[int, list[object]]:
    """What each row sees, oldest first: a slot of the cache, or ``("row", r)`` for a copy."""
    seen: dict[int, list[object]] = {}
    for call in plan.calls:
        scratch: dict[int, object] = {}
        for number, block in enumerate(call.tail_blocks.tolist()):
            for offset in range(BLOCK):
                scratch[number * BLOCK + offset] = block * BLOCK + offset
        rows = plan.copied_rows[call.copies].tolist()
        scratch.update((s, ("row", r)) for s, r in zip(call.slots.tolist(), rows, strict=True))
        table = call.block_table.clone()
        table.view(-1)[call.scratch_cells] = call.scratch_blocks + SCRATCH
        starts = call.query_start_loc.tolist()
        for i, length in enumerate(call.seq_lens.tolist()):
            keys: list[object] = []
            for position in range(length):
                block = table[i, position // BLOCK].item()
                slot = block * BLOCK + position % BLOCK
                keys.append(slot if block < SCRATCH else scratch[slot - SCRATCH * BLOCK])
            asked = call.query_rows[starts[i] : starts[i + 1]].tolist()
            for back, row in enumerate(reversed(asked)):
                assert row not in seen, "asked twice"
                seen[row] = keys[: length - back]
    return seen


@pytest.mark.parametrize("scratch_blocks", [100, 6])
@pytest.mark.parametrize("seed", range(10))
def test_every_row_sees_its_context_and_its_ancestors(seed, scratch_blocks):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(0, 14, (3,), generator=generator).tolist()
    trees = [random_tree(n, generator) for n in (1, 7, 13)]
    before = [0, min(3, contexts[1]), 0]  # prompt rows in the same step
    table = torch.randperm(30, generator=generator).int().view(3, 10)
    masks, starts, want, row = [], [0], {}, 0
    for i, (context, parents) in enumerate(zip(contexts, trees, strict=True)):
        linear = [table[i, p // BLOCK].item() * BLOCK + p % BLOCK for p in range(40)]
        relations = tree_relations(torch.tensor([parents]))[1][0].tolist()
        for j in range(before[i]):
            want[row + j] = linear[: context - before[i] + j + 1]
        root = row + before[i]
        for node, mask in enumerate(relations):
            path = [b for b in range(node + 1) if mask >> b & 1]
            want[root + node] = (linear[:context], path, linear[context:], root)
        masks += [0x5555] * before[i] + relations
        row = root + len(parents)
        starts.append(row)
    seq_lens = ints(*(c + len(t) for c, t in zip(contexts, trees, strict=True)))
    tree = TreeRows(ints(*contexts), torch.tensor(masks), False)
    plan = plan_paths(tree, ints(*starts), seq_lens, table, BLOCK, scratch_blocks)
    seen = seen_keys(plan, table)

    assert sorted(seen) == list(range(row))
    for asked, expected in want.items():
        if isinstance(expected, list):
            assert seen[asked] == expected
            continue
        context, path, slots, root = expected
        # A node is either a copy of its row or lies where the step wrote it.
        named = [slots.index(k) if isinstance(k, int) else k[1] - root
                 for k in seen[asked][len(context) :]]  # fmt: skip
        assert seen[asked][: len(context)] == context
        assert named == path
    assert all(len(call.scratch_blocks) <= scratch_blocks for call in plan.calls)
    assert scratch_blocks < 100 or len(plan.calls) == 1


def test_a_chain_is_one_request_and_copies_nothing():
    masks = tree_relations(torch.arange(-1, 5)[None])[1][0]
    plan = plan_paths(
        TreeRows(ints(5), masks, False), ints(0, 6), ints(11), torch.arange(9).int()[None], BLOCK, 0
    )
    (call,) = plan.calls
    assert call.seq_lens.tolist() == [11] and len(plan.copied_rows) == 0


@pytest.mark.parametrize(
    ("start", "masks"),
    [
        (5, [0b001, 0b011, 0b001]),  # node 2 does not see itself
        (5, [0b001, 0b011, 0b110]),  # node 2 lacks its parent's parent
        (4, [0b001, 0b011, 0b101]),  # four nodes, three rows
        (8, [0b001, 0b011, 0b101]),  # the tree starts behind its rows
    ],
)
def test_what_is_no_tree_is_refused(start, masks):
    tree = TreeRows(ints(start), torch.tensor(masks), False)
    with pytest.raises(ValueError, match=r"request 0|rows 0|row "):
        plan_paths(tree, ints(0, 3), ints(8), torch.arange(9).int()[None], BLOCK, 100)

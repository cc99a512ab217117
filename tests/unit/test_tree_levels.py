"""Where the rows of draft levels stand, against counting by hand; the masks that attention sees."""

import pytest
import torch

from vllm_msd.kernels import ancestor_bits
from vllm_msd.tree import DraftLevels, TreeShape, draft_level, grow_tree


def test_the_drawn_example():
    """The three levels in the docstring, and a second request beside them."""
    levels = DraftLevels(torch.tensor([5, 20]), num_levels=3, top_k=3, limit=100)
    for level, (rotary, kv, length) in enumerate([(5, 5, 8), (6, 8, 11), (7, 11, 14)]):
        assert levels.rotary_positions(level).tolist() == [rotary] * 3 + [rotary + 15] * 3
        positions, is_past = levels.kv_positions(level)
        assert positions.tolist() == [kv, kv + 1, kv + 2, kv + 15, kv + 16, kv + 17]
        assert not is_past.any()
        assert levels.seq_lens(level).tolist() == [length, length + 15]
    assert levels.tree_start().tolist() == [5, 20]
    assert levels.tree_start().dtype == torch.int32


@pytest.mark.parametrize("first", range(20, 32))
def test_near_the_limit(first):
    """Row by row: nothing stands at the limit or beyond, and what would has no slot."""
    limit, num_levels, k = 30, 3, 2
    levels = DraftLevels(torch.tensor([first]), num_levels, k, limit)
    for level in range(num_levels):
        wanted = [first + level * k + j for j in range(k)]
        positions, is_past = levels.kv_positions(level)
        assert is_past.tolist() == [position >= limit for position in wanted]
        assert positions[~is_past].tolist() == [p for p in wanted if p < limit]
        assert positions.max() < limit
        assert levels.rotary_positions(level).tolist() == [min(first + level, limit - 1)] * k
        assert levels.seq_lens(level).tolist() == [min(wanted[-1] + 1, limit)]
    assert levels.tree_start().tolist() == [first if first + num_levels * k <= limit else -1]


def test_levels_are_linked_and_carry_the_beams_ancestors():
    """A beam that crosses over: its masks against those of the tree it forms, row by row."""
    k, depth = 2, 3
    crossing = torch.tensor([[[0.0, 9.0, -9.0, -9.0], [1.0, 8.9, -9.0, -9.0]]])
    rows, tree_start, seen = [], torch.tensor([7], dtype=torch.int32), []

    def expand(tokens, hidden, visible, level):
        rows.append(draft_level(tree_start, visible, rows[-1] if rows else None))
        seen.append((tokens, visible))
        return crossing * (level + 1), hidden

    grow_tree(torch.tensor([3]), crossing[:, 0], torch.zeros(1, 4), expand, TreeShape(8, depth, k))
    assert [level.older for level in rows] == [None, *rows[:-1]]
    assert all(level.is_draft and level.tree_start is tree_start for level in rows)
    parents = [-1]  # of a tree that hangs all drafted rows below one root
    for level, (_, visible) in enumerate(seen):
        for j in range(k):
            above = visible[0, j, : level * k].nonzero().flatten().tolist()
            parents.append(above[-1] + 1 if above else 0)
    assert len(set(parents)) > k  # rows of a level do not all hang on the same one
    expected = ancestor_bits(parents)[1:] >> 1
    assert torch.cat([level.ancestors for level in rows]).tolist() == expected.tolist()

"""Trees: growing batched equals one by one and equals a plain search; records; acceptance."""

import itertools
import random

import pytest
import torch

from tests.common.accepted_paths import accept_trees, next_roots
from tests.common.drafts import LAYOUTS, small_draft
from tests.common.tree_tensors import retrieve_indices, tree_mask
from vllm_msd.draft import DraftCache
from vllm_msd.errors import ConfigError
from vllm_msd.tree import (
    DraftTree,
    TreeConfig,
    TreeShape,
    draft_tree,
    grow_tree,
    path_index,
)

SHAPE = TreeShape(total_tokens=12, depth=3, top_k=3)


def random_tree(seed, nodes=20):
    """A random tree whose siblings have distinct tokens."""
    torch.manual_seed(seed)
    parents = torch.tensor([-1] + [int(torch.randint(n, ())) for n in range(1, nodes)])
    return DraftTree.from_parents(torch.randperm(50)[None, :nodes], parents[None])


def walk_up(parents, node):
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("seed", range(3))
def test_record_agrees_with_walking_up(seed):
    tree = random_tree(seed)
    parents, mask = tree.parents[0].tolist(), tree_mask(tree)[0]
    for node in range(tree.num_nodes):
        path = walk_up(parents, node)
        assert mask[node].nonzero().flatten().tolist() == path
        assert int(tree.depths[0, node]) == len(path) - 1
    paths = retrieve_indices(tree.parents[0])
    leaves = [n for n in range(tree.num_nodes) if n not in parents]
    assert [[n for n in row if n >= 0] for row in paths.tolist()] == [
        walk_up(parents, leaf) for leaf in leaves
    ]
    by_node = retrieve_indices(tree.parents[0], lexicographic=True).tolist()
    assert sorted(by_node) == sorted(paths.tolist())
    assert by_node == sorted(by_node, key=lambda row: [99 if n < 0 else n for n in row])


def test_a_chain_of_64_fits_the_bitmask():
    parents = torch.arange(-1, 63)[None]
    tree = DraftTree.from_parents(torch.arange(64)[None], parents)
    assert torch.equal(tree_mask(tree)[0], torch.ones(64, 64).tril().bool())
    with pytest.raises(ValueError, match="65"):
        DraftTree.from_parents(torch.arange(65)[None], torch.arange(-1, 64)[None])


@pytest.mark.parametrize("parents", [[-1, 1, 0], [-1, -1, 0], [0, 0, 0]])
def test_parents_out_of_order_are_refused(parents):
    with pytest.raises(ValueError, match="parents"):
        DraftTree.from_parents(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([parents]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growing_a_batch_equals_one_by_one(layout):
    """Requests of unequal length in one padded cache grow the trees they would grow alone."""
    draft = small_draft(layout, seed=5).double()
    head = torch.randn(40, 32, dtype=torch.double) * 0.3
    lengths = torch.tensor([7, 3, 5])
    x = torch.randn(2, 3, 7, 32, dtype=torch.double)
    visual = torch.zeros(3, 7, dtype=torch.bool)
    visual[0, 2:5] = True
    positions = torch.arange(7).expand(3, 7)
    roots = torch.tensor([4, 8, 15])
    with torch.no_grad():
        cache = DraftCache()
        out = draft(*x, visual, positions, positions < lengths[:, None], cache)
        last = out[torch.arange(3), lengths - 1]
        args = (draft.embed_tokens, lambda h: h @ head.T, SHAPE)
        together = draft_tree(draft, cache, last, roots, *args)
        assert cache.num_columns == 7
        for b, n in enumerate(lengths.tolist()):
            own = DraftCache()
            rows = (t[b : b + 1, :n] for t in (*x, visual, positions))
            alone_out = draft(*rows, cache=own)
            alone = draft_tree(draft, own, alone_out[:, -1], roots[b : b + 1], *args)
            for name in ("tokens", "parents", "depths", "ancestors"):
                assert torch.equal(getattr(together, name)[b : b + 1], getattr(alone, name)), name


def test_growing_keeps_the_most_probable_nodes():
    """A draft whose tokens do not depend on their past: the tree is known beforehand."""
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]]))

    def expand(tokens, hidden, visible, level):
        assert visible.shape == (1, 2, 2 * (level + 1))
        return logits[:, None].expand(1, 2, 3), hidden

    tree = grow_tree(
        torch.tensor([9]), logits, torch.zeros(1, 4), expand, TreeShape(6, depth=2, top_k=2)
    )
    # 0.6, 0.36, 0.3, 0.216, then 0.18 twice: the level above comes first in candidate order.
    assert tree.tokens.tolist() == [[9, 0, 0, 1, 0, 1]]
    assert tree.parents.tolist() == [[-1, 0, 1, 0, 2, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_is_the_most_probable_tree_of_its_size(seed):
    """Against all candidates: no tree of n of them has a higher sum of path probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shape, vocabulary = TreeShape(total_tokens=14, depth=3, top_k=3), 7
    table = torch.randn(vocabulary, vocabulary, generator=generator) * 2
    if seed == 3:  # every token is followed by a certain one: many ties
        table = torch.where(torch.eye(vocabulary).roll(1, 1) > 0, 0.0, -200.0)
    log_probs = table.log_softmax(-1)

    def expand(tokens, hidden, visible, level):
        return table[tokens], hidden

    root = torch.zeros(1, dtype=torch.int64)
    tree = grow_tree(root, table[root], torch.zeros(1, 4), expand, shape)
    best = {}  # path of every candidate: its log-probability
    paths = [(0, c) for c in log_probs[0].topk(shape.top_k).indices.tolist()]
    for _ in range(shape.depth + 1):
        scored = {p: float(sum(log_probs[a, b] for a, b in itertools.pairwise(p))) for p in paths}
        best |= scored
        beam = sorted(scored, key=scored.get, reverse=True)[: shape.top_k]
        paths = [(*p, c) for p in beam for c in log_probs[p[-1]].topk(shape.top_k).indices.tolist()]
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    assert all(parent < node for node, parent in enumerate(parents))
    chosen = [tuple(tokens[n] for n in walk_up(parents, node)) for node in range(1, 14)]
    scores = torch.tensor([best[path] for path in chosen]).exp()
    highest = torch.tensor(sorted(best.values(), reverse=True)).exp()
    torch.testing.assert_close(scores.cumsum(0), highest[:13].cumsum(0), rtol=1e-5, atol=0)


def test_certain_tokens_do_not_lose_their_parents():
    """A chain of probability one: every node of it scores the same."""
    logits = torch.tensor([[0.0, -200.0, -300.0]])

    def expand(tokens, hidden, visible, level):
        return logits[:, None].expand(1, 2, 3), hidden

    tree = grow_tree(
        torch.tensor([9]), logits, torch.zeros(1, 4), expand, TreeShape(4, depth=4, top_k=2)
    )
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]
    assert tree.tokens.tolist() == [[9, 0, 0, 0]]


@pytest.mark.parametrize("sizes", [(14, 1, 3), (66, 5, 8), (1, 1, 3), (4, -1, 3), (4, 1, 0)])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ConfigError, match="tree: got"):
        TreeShape(*sizes)


def test_acceptance_of_a_mixed_batch():
    """None accepted, part of a path, a whole path, and a right token below a wrong one."""
    parents = torch.tensor([[-1, 0, 0, 1, 3]]).expand(4, 5)
    tokens = torch.tensor([[7, 1, 2, 3, 4]]).expand(4, 5)
    target = torch.tensor([[9, 3, 0, 4, 5], [2, 3, 6, 4, 5], [1, 3, 6, 4, 5], [1, 8, 6, 4, 5]])
    result = accept_trees(DraftTree.from_parents(tokens, parents), target)
    assert result.lengths.tolist() == [0, 1, 3, 1]
    assert next_roots(result).tolist() == [9, 6, 5, 8]
    assert result.nodes.tolist() == [
        [0, -1, -1, -1, -1], [0, 2, -1, -1, -1], [0, 1, 3, 4, -1], [0, 1, -1, -1, -1],
    ]  # fmt: skip
    assert result.tokens.tolist() == [
        [9, -1, -1, -1, -1], [2, 6, -1, -1, -1], [1, 3, 4, 5, -1], [1, 8, -1, -1, -1],
    ]  # fmt: skip


def test_padding_nodes_are_never_accepted():
    """A tree cut after two nodes: the third would fit, and its child after it."""
    parents = torch.tensor([[-1, 0, 1, 2]])
    tree = DraftTree.from_parents(torch.tensor([[7, 1, 2, 3]]), parents)
    drawn = torch.tensor([[1, 2, 3, 4]])
    assert accept_trees(tree, drawn).lengths.tolist() == [3]
    cut = accept_trees(tree, drawn, torch.tensor([2]))
    assert cut.lengths.tolist() == [1]
    assert cut.tokens.tolist() == [[1, 2, -1, -1]]


@pytest.mark.parametrize("seed", range(3))
def test_gathering_along_the_path_is_a_compaction(seed):
    """Against a plain loop over requests; rows that belong to no tree stay where they are."""
    rng = random.Random(seed)
    rows, roots, paths = list(range(60)), [4, 20, 33], []
    expected = rows.copy()
    for root in roots:
        path = [0, *sorted(rng.sample(range(1, 12), rng.randrange(0, 6)))]
        paths.append(path + [-1] * (12 - len(path)))
        for i, node in enumerate(path):
            expected[root + i] = rows[root + node]
    index = path_index(torch.tensor(roots), torch.tensor(paths), len(rows))
    assert torch.tensor(rows)[index].tolist() == expected


@pytest.mark.parametrize(
    ("nodes", "depth", "top_k", "message"),
    [
        (24, 5, None, "tree_top_k"),
        (24, None, 4, "tree_depth"),
        (64, 5, 8, "at most 63"),
        (24, 8, 4, "tree_depth of at most 7"),
        (24, 2, 4, "only 20 nodes"),
        (5, 4, 1, "leave tree_depth out"),
        (24, 0, 4, "from 1 on"),
        (24, 5, True, "from 1 on"),
        (4, 5, 2, "at most num_speculative_tokens"),
    ],
)
def test_impossible_sizes_are_refused(nodes, depth, top_k, message):
    with pytest.raises(ConfigError, match=message):
        TreeConfig.from_settings(nodes, depth, top_k)


def test_possible_sizes():
    assert TreeConfig.from_settings(5, None, None) == TreeConfig(5, 5, 1)
    assert TreeConfig.from_settings(5, None, 1).is_chain
    assert TreeConfig.from_settings(5, 5, 1).is_chain
    tree = TreeConfig.from_settings(24, 5, 6)
    assert not tree.is_chain
    assert tree.shape == TreeShape(total_tokens=25, depth=4, top_k=6)


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_equals_a_walk_down(seed):
    """Acceptance of all requests at once against following the target token by token."""
    tree = random_tree(seed)
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    torch.manual_seed(100 + seed)
    for _ in range(20):
        children = {p: [n for n, q in enumerate(parents) if q == p] for p in range(len(parents))}
        target = [
            tokens[c[int(torch.randint(len(c), ()))]] if c and torch.rand(()) < 0.7 else 50
            for c in children.values()
        ]
        path = [0]
        while step := [n for n in children[path[-1]] if tokens[n] == target[path[-1]]]:
            path += step
        result = accept_trees(tree, torch.tensor([target]))
        assert result.lengths.tolist() == [len(path) - 1]
        assert result.nodes[0, : len(path)].tolist() == path
        assert next_roots(result).tolist() == [target[path[-1]]]


@pytest.mark.parametrize("top_k", [1, 3])
def test_scores_are_log_probabilities_of_paths(top_k):
    """By hand from the logits that a made-up draft gives after each token."""
    torch.manual_seed(7)
    vocab, batch = 11, 2
    after = 2 * torch.randn(vocab, vocab)
    roots = torch.tensor([3, 8])

    def expand(tokens, hidden, visible, level):
        return after[tokens], hidden

    shape = TreeShape(total_tokens=6, depth=4, top_k=top_k)
    tree = grow_tree(roots, after[roots], torch.zeros(batch, 4), expand, shape)
    assert tree.scores.shape == (batch, 6) and (tree.scores[:, 0] == 0).all()
    assert (tree.scores.diff() <= 0).all()  # best-first
    for one in tree.by_request():
        tokens, parents = one.tokens[0].tolist(), one.parents[0].tolist()
        for node in range(1, 6):
            path = walk_up(parents, node)
            steps = itertools.pairwise(tokens[n] for n in path)
            expected = sum(after[a].log_softmax(0)[b] for a, b in steps)
            torch.testing.assert_close(one.scores[0, node], expected)

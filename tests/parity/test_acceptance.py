"""Greedy acceptance against the recorded reference."""

import torch

from tests.common.accepted_paths import accept_trees, next_roots
from tests.common.tree_tensors import retrieve_indices, tree_mask
from vllm_msd.tree import DraftTree


def parents_from_mask(mask):
    """``[T, T]`` ancestors-or-self to ``[T]`` parents: the last ancestor is the parent."""
    above = mask.bool() & ~torch.eye(len(mask), dtype=torch.bool)
    number = torch.arange(len(mask)).expand_as(mask)
    return torch.where(above, number, -1).max(1).values


def recorded_tree(ref, call):
    parents = parents_from_mask(ref[f"{call}.tree_mask"][0, 0])
    return DraftTree.from_parents(ref[f"{call}.draft_tokens"], parents[None])


def first_row_with(paths, nodes):
    """Number of the first path that begins with the accepted nodes."""
    nodes = nodes[nodes >= 0]
    return int((paths[:, : len(nodes)] == nodes).all(1).nonzero()[0])


def test_chosen_paths_of_the_continuations(ref, prompt, tree):
    """A target that follows the recorded choice accepts just that, node for node."""
    case = f"{prompt}.{tree}"
    for number in range(1, ref.num_calls(case)):
        previous, call = f"{case}.call{number - 1}", f"{case}.call{number}"
        drafted = recorded_tree(ref, previous)
        paths = ref[f"{previous}.retrieve_indices_greedy"]
        candidates = drafted.tokens[0][paths].masked_fill(paths < 0, -1)
        assert torch.equal(candidates, ref[f"{call}.candidates"])

        length = int(ref[f"{call}.accept_length"])
        path = paths[int(ref[f"{call}.best_candidate"])][: length + 1]
        # The recorded choices ignore what was drafted, so their new token may be a child as well.
        next_token = drafted.tokens.max() + 1
        target = torch.full_like(drafted.tokens, -1)
        target[0, path[:-1]] = drafted.tokens[0, path[1:]]
        target[0, path[-1]] = next_token

        result = accept_trees(drafted, target)
        assert result.lengths.tolist() == [length]
        assert torch.equal(result.nodes[0, : length + 1], path)
        assert (result.nodes[0, length + 1 :] == -1).all()
        assert next_roots(result).tolist() == [int(next_token)]
        hidden = ref[f"{call}.node_hidden_states"][:, path]
        assert torch.equal(hidden, ref[f"{call}.accept_hidden_states"])


def test_fixed_tree_over_many_logits(verification):
    """All cases in one batch: trees share their shape and differ in what the target says."""
    tree, logits = verification.info["tree"], verification["greedy.node_logits"]
    tokens = torch.tensor([tree["tokens"]]).expand(len(logits), -1)
    parents = torch.tensor([tree["parents"]]).expand(len(logits), -1)
    assert torch.equal(tokens[:1], verification["tree.draft_tokens"])
    paths = retrieve_indices(parents[0])
    assert torch.equal(paths, verification["tree.retrieve_indices_greedy"])
    by_node = retrieve_indices(parents[0], lexicographic=True)
    assert torch.equal(by_node, verification["tree.retrieve_indices_sampling"])

    result = accept_trees(DraftTree.from_parents(tokens, parents), logits.argmax(-1))
    assert torch.equal(result.lengths, verification["greedy.accept_length"])
    assert torch.equal(next_roots(result), verification["greedy.next_token"])
    best = [first_row_with(paths, nodes) for nodes in result.nodes]
    assert best == verification["greedy.best_candidate"].tolist()


def test_grown_trees_with_real_logits(verification, draft_references):
    names = verification.matches(r"greedy_dyn\.(.+)\.node_logits")
    assert names
    for name in names:
        logits = verification[f"greedy_dyn.{name}.node_logits"]
        ref = next(r for r in draft_references if r.config.vocab_size == logits.shape[1])
        drafted = recorded_tree(ref, name)
        assert torch.equal(tree_mask(drafted)[:, None].byte(), ref[f"{name}.tree_mask"])
        result = accept_trees(drafted, logits.argmax(-1)[None])
        assert int(result.lengths) == int(verification[f"greedy_dyn.{name}.accept_length"])
        expected = verification[f"greedy_dyn.{name}.next_logits"].argmax()
        assert int(next_roots(result)) == int(expected)
        best = first_row_with(ref[f"{name}.retrieve_indices_greedy"], result.nodes[0])
        assert best == int(verification[f"greedy_dyn.{name}.best_candidate"])

"""Trees laid out as chains for requests that read drafted rows one after another."""

import types

import pytest
import torch

from vllm_msd.tree import DraftTree, chain_parents, lay_out_chains
from vllm_msd.vllm_plugin.trees.constrained import needs_chain

#        0
#      / | \
#     1  2  3        best path: 0, 1, 5, 7; the others keep their order
#    /|  |
#   5 6  4
#   |
#   7
PARENTS = torch.tensor([[-1, 0, 0, 0, 2, 1, 1, 5]])
BEST_FIRST = [0, 1, 5, 7, 2, 3, 4, 6]


def test_best_path_comes_first_and_only_where_asked():
    tokens = torch.arange(10, 18).expand(2, 8)
    parents = PARENTS.expand(2, 8)
    tree = DraftTree.from_parents(tokens, parents)
    got = lay_out_chains(tree, torch.tensor([True, False]))
    assert got.tokens[0].tolist() == [10 + node for node in BEST_FIRST]
    assert torch.equal(got.parents[0], chain_parents(1, 8)[0])
    assert torch.equal(got.depths[0], torch.arange(8))
    assert torch.equal(got.tokens[1], tokens[1])
    assert torch.equal(got.parents[1], parents[1])
    assert torch.equal(got.ancestors[1], tree.ancestors[1])


def test_what_stands_behind_the_best_path_scores_nothing():
    scores = -torch.arange(8.0).expand(2, 8)
    tree = DraftTree.from_parents(torch.arange(8).expand(2, 8), PARENTS.expand(2, 8), scores=scores)
    got = lay_out_chains(tree, torch.tensor([True, False])).scores
    assert got[0].tolist() == [0, -1, -5, -7, *[-torch.inf] * 4]
    assert torch.equal(got[1], scores[1])


@pytest.mark.parametrize("seed", range(5))
def test_random_trees(seed):
    torch.manual_seed(seed)
    nodes = 30
    parents = torch.tensor([-1] + [int(torch.randint(n, ())) for n in range(1, nodes)])
    best = [0]
    while children := [n for n in range(nodes) if parents[n] == best[-1]]:
        best.append(children[0])
    rest = [n for n in range(nodes) if n not in best]
    tree = DraftTree.from_parents(torch.arange(nodes)[None], parents[None])
    assert lay_out_chains(tree, torch.tensor([True])).tokens[0].tolist() == best + rest


def test_a_chain_stays_as_it_is():
    tree = DraftTree.from_parents(torch.arange(64)[None], chain_parents(1, 64))
    got = lay_out_chains(tree, torch.tensor([True]))
    assert torch.equal(got.tokens, tree.tokens)
    assert torch.equal(got.parents, tree.parents)


FREE = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.2),
        ("bad_words", ["word"]),
        ("structured_outputs", object()),
        ("thinking_token_budget", 0),
    ],
)
def test_what_needs_a_chain(setting, value):
    assert not needs_chain(types.SimpleNamespace(**FREE))
    assert needs_chain(types.SimpleNamespace(**{**FREE, setting: value}))

"""Sampled acceptance against the recorded reference, by distribution.

The reference tries a node's children one after the other with fresh random numbers; here one token
is drawn after every node and looked for among its children. The draws differ, their law must not:
it is compared with the exact law of the target and with what the reference was seen to emit. At
leaves the two part on purpose: the reference forgets temperature there.
"""

import pytest
import torch

from tests.common.accepted_paths import accept_trees
from tests.common.distribution import chi_square, upper_tail, warp
from vllm_msd.tree import DraftTree

RUNS = 200_000
# The chance of each comparison to fail by accident, were the seed a new one.
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def sampled():
    """Draws and their acceptance of ``RUNS`` runs over one of the recorded trees."""
    cache = {}

    def sample(reference, tag):
        if tag not in cache:
            settings = reference.info["distribution"][tag]
            probs = warp(reference[f"dist.{tag}.node_logits"], settings["temperature"])
            generator = torch.Generator().manual_seed(7)
            drawn = torch.multinomial(probs, RUNS, replacement=True, generator=generator).T
            tree, tree_info = [], reference.info["tree"]
            for name in ("tokens", "parents"):
                tree.append(torch.tensor([tree_info[name]]).expand(RUNS, -1))
            cache[tag] = probs, accept_trees(DraftTree.from_parents(*tree), drawn.contiguous())
        return cache[tag]

    return sample


@pytest.fixture
def tags(verification):
    found = list(verification.info["distribution"])
    assert found
    return found


def counts_by_node(result, num_tokens):
    """``[T, V]`` how often each token was emitted right after each accepted node."""
    on_path = result.nodes >= 0
    counts = torch.zeros(result.nodes.shape[1], num_tokens, dtype=torch.long)
    one = torch.ones(1, dtype=torch.long)
    return counts.index_put_((result.nodes[on_path], result.tokens[on_path]), one, accumulate=True)


def same_law(a, b):
    """Chance that two rows of counts at least this different stem from one law."""
    counts = torch.stack([a, b])[:, (a + b) >= 10].double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    return upper_tail(float(((counts - expected) ** 2 / expected).sum()), counts.shape[1] - 1)


def leaves(reference):
    parents = reference.info["tree"]["parents"]
    return [node for node in range(len(parents)) if node not in parents]


def test_recorded_law_is_the_warped_target(verification, tags, sampled):
    for tag in tags:
        probs, _ = sampled(verification, tag)
        assert torch.allclose(probs, verification[f"dist.{tag}.exact_node_probs_warped"])


def test_tokens_follow_the_warped_target_after_every_node(verification, tags, sampled):
    for tag in tags:
        probs, result = sampled(verification, tag)
        counts = counts_by_node(result, probs.shape[1])
        assert int(counts[0].sum()) == RUNS
        for node in range(len(counts)):
            found = chi_square(counts[node][None], probs[node][None])
            assert found.draws > 100, (tag, node)
            assert found.p > FALSE_ALARM, (tag, node, found)


def test_accepted_lengths_follow_the_exact_law(verification, tags, sampled):
    for tag in tags:
        _, result = sampled(verification, tag)
        exact = verification[f"dist.{tag}.exact_accept_length_probs"]
        counts = torch.bincount(result.lengths, minlength=len(exact))
        found = chi_square(counts[None], exact[None])
        assert found.p > FALSE_ALARM, (tag, found)


def test_emits_what_the_reference_emits(verification, tags, sampled):
    """First tokens, accepted lengths, and tokens after every node that has children."""
    for tag in tags:
        probs, result = sampled(verification, tag)
        counts = counts_by_node(result, probs.shape[1])
        recorded = verification[f"dist.{tag}.next_token_counts_by_node"]
        assert same_law(counts[0], verification[f"dist.{tag}.first_token_counts"]) > FALSE_ALARM
        lengths = torch.bincount(result.lengths, minlength=4)
        recorded_lengths = verification[f"dist.{tag}.accept_length_counts"]
        assert same_law(lengths, recorded_lengths) > FALSE_ALARM
        for node in set(range(len(counts))) - set(leaves(verification)):
            assert same_law(counts[node], recorded[node]) > FALSE_ALARM, (tag, node)


def test_the_leaf_bug_of_the_reference_is_not_reproduced(verification, tags, sampled):
    """After a leaf the reference draws from the target without temperature; here it is warped."""
    tag = next(t for t in tags if verification.info["distribution"][t]["temperature"] != 1.0)
    probs, result = sampled(verification, tag)
    unwarped = verification[f"dist.{tag}.exact_node_probs_unwarped"]
    recorded = verification[f"dist.{tag}.next_token_counts_by_node"]
    ours = counts_by_node(result, probs.shape[1])
    leaf = max(leaves(verification), key=lambda node: int(recorded[node].sum()))

    def p(counts, law):
        return chi_square(counts[leaf][None], law[leaf][None]).p

    assert p(recorded, unwarped) > FALSE_ALARM > 1e-30 > p(recorded, probs)
    assert p(ours, probs) > FALSE_ALARM > 1e-30 > p(ours, unwarped)
    assert same_law(ours[leaf], recorded[leaf]) < 1e-30

"""Sizes by number of requests, chosen from costs and from what is accepted: a world of dice."""

import itertools
import json

import numpy as np
import pytest

from vllm_msd.budget import (
    AcceptancePrior,
    AcceptedTokens,
    SizeCosts,
    SizeSchedule,
    candidate_sizes,
    expected_tree,
)
from vllm_msd.budget.size_schedule import LAST_PROBE, MARGIN, PLANNED_FOR, REMEMBERED
from vllm_msd.tree import TreeConfig

CHAIN, TREE = TreeConfig(8, 8, 1), TreeConfig(16, 5, 4)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)


def costs(sizes, base=0.01, row=1e-4, free_rows=160, level=0.0005):
    """Rows cost nothing up to some number, then all the same; n nodes at most n levels."""
    return SizeCosts.of(
        (r, n, base + row * max(0, r * (n + 1) - free_rows) + level * min(n, 6))
        for r in REQUESTS
        for n in sizes
    )


class World:
    """A draft whose tokens are right with a chance at each depth, or one at all of them."""

    def __init__(self, shape, chance, table=None, seed=0):
        sizes = candidate_sizes(shape.num_nodes)
        self.costs = table or costs(sizes)
        self.rule = SizeSchedule(shape, sizes, self.costs, REQUESTS[-1])
        self.shape, self.rng = shape, np.random.default_rng(seed)
        self.set(chance)

    def set(self, chance):
        """From now on the draft is right so often."""
        chance = np.broadcast_to(chance, self.shape.depth)
        usual = AcceptancePrior(by_depth=tuple(np.maximum(chance, 1e-3).cumprod()))
        self.chances = AcceptedTokens(self.shape, usual)._ratios * (chance > 0)

    def accepted(self, nodes, count):
        """Of so many verifications of so many nodes."""
        right = self.rng.random((count, self.shape.depth)) < self.chances[nodes]
        return np.logical_and.accumulate(right, axis=1).sum(1)

    def run(self, load):
        """``(nodes, tokens, seconds)`` of each step."""
        steps = []
        for requests in load:
            nodes = self.rule.table()[requests]
            self.rule.scheduled(requests, nodes)
            got = self.accepted(nodes, requests) if nodes else np.zeros(0, dtype=int)
            for count in got:
                self.rule.observe(nodes, int(count))
            seconds = float(self.costs.seconds([requests], [nodes])[0, 0])
            steps.append((nodes, requests + int(got.sum()), seconds))
        return steps

    def fixed(self, nodes, requests, steps=2000):
        count = requests * steps
        tokens = count + (self.accepted(nodes, count).sum() if nodes else 0)
        return tokens / (steps * float(self.costs.seconds([requests], [nodes])[0, 0]))


def rate(steps):
    return sum(tokens for _, tokens, _ in steps) / sum(seconds for *_, seconds in steps)


def nodes_of(steps):
    return [nodes for nodes, *_ in steps]


def test_candidates_lie_apart_as_factors():
    assert candidate_sizes(60) == [0, 1, 3, 8, 22, 60]
    assert candidate_sizes(16) == [0, 1, 2, 4, 8, 16]
    assert candidate_sizes(5) == [0, 1, 2, 3, 5]
    assert candidate_sizes(1) == [0, 1]
    assert candidate_sizes(16, 2) == [0, 16] and candidate_sizes(16, 3) == [0, 1, 16]
    for nodes, most in itertools.product(range(1, 129), range(2, 7)):
        sizes = candidate_sizes(nodes, most)
        assert len(sizes) <= most and {0, nodes} <= set(sizes) <= set(range(nodes + 1))


# What is accepted --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_before_evidence_it_is_the_prior(shape):
    prior = AcceptancePrior(by_depth=(0.9, 0.6, 0.5))
    chances, _ = expected_tree(shape, prior.by_depth)
    got = AcceptedTokens(shape, prior).of_all()
    assert got == pytest.approx([0.0, *np.cumsum(chances)])


def test_a_chains_places_are_learned_one_by_one():
    truth = np.array([0.5, 0.95, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9])
    rng = np.random.default_rng(1)
    found = AcceptedTokens(CHAIN)
    for _ in range(8):
        for right in rng.random((400, 8)) < truth:
            found.observe(8, int(np.logical_and.accumulate(right).sum()))
        found.learn()
    assert found.of_all()[1:] == pytest.approx(np.cumsum(truth.cumprod()), abs=0.1)


def test_a_trees_other_sizes_follow_by_the_same_factors():
    """A draft as if the prior had said more at each depth: seen at 4 nodes, known at 16."""
    better = AcceptancePrior(by_depth=(0.8, 0.7, 0.6, 0.5, 0.45))
    usual = AcceptancePrior(by_depth=(0.6, 0.45, 0.35, 0.25, 0.2))
    wanted, found = AcceptedTokens(TREE, better), AcceptedTokens(TREE, usual)
    before = abs(found.of_all()[16] - wanted.of_all()[16])
    rng = np.random.default_rng(2)
    for _ in range(20):
        for right in rng.random((200, 5)) < wanted._ratios[4]:
            found.observe(4, int(np.logical_and.accumulate(right).sum()))
        found.learn()
    assert found.of_all()[4] == pytest.approx(wanted.of_all()[4], abs=0.06)
    assert abs(found.of_all()[16] - wanted.of_all()[16]) < before / 3


def test_learning_says_what_came_against_what_was_expected():
    found = AcceptedTokens(CHAIN, AcceptancePrior(by_depth=(0.5, 0.25)))
    for accepted in (0, 2, 1, 1):
        found.observe(2, accepted)
    assert found.learn() == (4.0, pytest.approx(4 * 0.75))
    assert found.learn() == (0.0, 0.0)


def test_a_prior_of_zero_is_corrected_and_old_evidence_can_be_let_go():
    found = AcceptedTokens(CHAIN, AcceptancePrior(by_depth=(0.0,)))
    assert found.of_all()[8] < 0.02
    for _ in range(40):
        for _ in range(100):
            found.observe(2, 2)
        found.learn()
    assert found.of_all()[2] > 1.5
    found.forget(0.01)
    assert found.of_all()[8] < 0.02


# What it costs -----------------------------------------------------------------------------------


def test_costs_between_and_beyond_what_was_measured():
    table = SizeCosts.of([(1, 0, 1), (4, 0, 4), (8, 0, 6), (1, 2, 2), (4, 2, 6)])
    got = table.seconds([1, 2, 4, 8, 16], [0, 2, 5])
    assert got[:, 0].tolist() == [1, 2, 4, 6, 10]  # on as it was
    assert got[:, 1].tolist() == pytest.approx([2, 2 + 4 / 3, 6, 12, 24])  # as the requests
    assert np.isinf(got[:, 2]).all()
    with pytest.raises(ValueError, match="expected counts with seconds"):
        SizeCosts.of([(1, 2, 0.1)])
    with pytest.raises(ValueError, match="expected counts with seconds"):
        SizeCosts.of([(1, 0, float("nan"))])


def test_costs_are_kept_for_what_they_were_measured_on(tmp_path):
    table, path, key = costs([0, 4]), tmp_path / "x.json", {"model": "m", "sizes": [0, 4]}
    table.save(path, key)
    assert SizeCosts.load(path, key) == table
    assert SizeCosts.load(path, key | {"model": "n"}) is None
    assert SizeCosts.load(tmp_path / "y.json", key) is None
    path.write_text(path.read_text()[:-9])
    assert SizeCosts.load(path, key) is None
    path.write_text(json.dumps({"format": "sizes 1", "key": key, "points": [[1, 4, 0.1]]}))
    assert SizeCosts.load(path, key) is None


# The rule ----------------------------------------------------------------------------------------


def test_never_a_size_that_is_expected_to_be_slower_than_none():
    """Whatever the costs are, and while they are met by any load and any luck."""
    rng = np.random.default_rng(3)
    drafted = 0
    for seed in range(30):
        shape = (CHAIN, TREE)[seed % 2]
        sizes = candidate_sizes(shape.num_nodes)
        table = costs(sizes, 0.01, *10 ** rng.uniform([-5, 0, -5], [-3, 3, -2.5]))
        world = World(shape, rng.uniform(0, 1), table, seed)
        for _ in range(12):
            world.run(rng.choice(REQUESTS, size=20))
            world.rule._look_again()
            rates, chosen = world.rule.rates(), world.rule._chosen
            own = rates[np.arange(len(rates)), chosen]
            assert (own >= rates[:, 0]).all() and (own * MARGIN >= rates.max(1)).all()
            drafted += (chosen > 0).sum()
    assert drafted > 1000


@pytest.mark.parametrize("requests", [1, 8, 32, 128])
@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_as_fast_as_the_best_fixed_size(shape, chance, requests):
    world = World(shape, chance)
    world.run([requests] * 300)
    best = max(world.fixed(n, requests) for n in world.rule.sizes.tolist())
    world.run([requests] * 3000)
    assert rate(world.run([requests] * 1500)) > 0.95 * best


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_a_draft_unlike_its_prior_costs_little(requests):
    """Second choices are never right: a tree is worth its first children alone."""
    world = World(TREE, 0.5)
    world.chances = np.where(np.arange(1, 6) <= np.arange(17)[:, None], 0.5, 0.0)
    world.run([requests] * 300)
    best = max(world.fixed(n, requests) for n in world.rule.sizes.tolist())
    assert rate(world.run([requests] * 1500)) > 0.9 * best


def test_sizes_fall_with_the_requests_and_come_back():
    world = World(TREE, 0.8)
    few, many, again = (world.run([n] * 200) for n in (2, 128, 2))
    assert nodes_of(few)[-1] == 16 and set(nodes_of(many)) <= {0, 1}
    assert nodes_of(again)[-1] == 16


def test_a_wrong_draft_is_hardly_asked_and_a_right_one_again():
    """What was right for long goes wrong, and is right again."""
    world = World(CHAIN, 0.5)
    assert nodes_of(world.run([1] * 2000))[-1] > 0
    world.set(0.0)
    world.run([1] * 1500)
    wrong = nodes_of(world.run([1] * 3000))
    assert 0 < sum(n > 0 for n in wrong) < 0.01 * len(wrong)
    assert world.rule.accepted._trials.max() <= REMEMBERED  # so that few tokens can turn it
    world.set(0.5)
    right = nodes_of(world.run([1] * 3000))
    back = next(i for i in range(len(right)) if all(right[i : i + 3 * PLANNED_FOR]))
    assert back < LAST_PROBE + 6 * PLANNED_FOR and right[-1] > 0


def test_what_is_not_verified_is_tried_now_and_then():
    """Deeper tokens were never right; then they are, at a size that pays little."""
    sizes = candidate_sizes(CHAIN.num_nodes)
    world = World(CHAIN, np.array([0.95, *[0.0] * 7]), costs(sizes, level=0.0009))
    world.run([8] * 2000)
    short = nodes_of(world.run([8] * 1000))
    assert set(short) == {1, 2} and short.count(2) < 20
    world.set(0.95)
    assert nodes_of(world.run([8] * 4000))[-1] == 8


def probing(best=(16, 1, 0)):
    """A rule to which so many nodes pay for 1, 2 and 3 requests, and whose next probe is due."""
    sizes = candidate_sizes(16)
    table = SizeCosts.of(
        (r, n, 1.0 if n <= pays else 10.0) for r, pays in enumerate(best, 1) for n in sizes
    )
    rule = SizeSchedule(TREE, sizes, table, len(best))
    assert rule.table()[1:] == list(best)
    while rule.table() is rule._table:
        rule.scheduled(2, 1)
    return rule


def test_a_probe_waits_for_a_step_that_can_be_one():
    rule = probing()
    assert rule.table()[1:] == [16, 2, 16]
    for _ in range(3):
        rule.scheduled(1, 16)  # has all nodes anyway
        rule.scheduled(2, 0)  # whose requests want none
        rule.scheduled(3, 0)
    assert rule.table()[1:] == [16, 2, 16]
    rule.scheduled(2, 2)
    assert rule.table()[1:] == [16, 1, 0]


@pytest.mark.parametrize(("verified", "kept"), [(True, 1000), (False, REMEMBERED)])
def test_only_where_nothing_is_verified_is_evidence_let_go(verified, kept):
    """The last step before a look says nothing: it may be the one of 3 requests between others."""
    rule = probing()
    for _ in range(2000):
        rule.observe(16, 3)
    rule._look_again()
    for step in range(1, 4 * PLANNED_FOR + 1):
        requests = 1 if verified and step % 4 else 3
        rule.scheduled(requests, rule.table()[requests])
        if requests == 1:
            rule.observe(16, 3)
    trials = rule.accepted._trials[0]
    assert trials > kept if verified else trials <= kept


def test_what_was_not_timed_is_not_tried():
    costs_of = [(1, 0, 1.0), (1, 1, 1.0), (1, 8, 1.0), (2, 0, 1.0)]
    rule = SizeSchedule(TREE, [0, 1, 2, 4, 8, 16], SizeCosts.of(costs_of), 2)
    assert rule.sizes.tolist() == [0, 1, 8] and rule._probes[1:] == [8, 8]
    alone = SizeSchedule(TREE, [0, 1, 2], SizeCosts.of([(1, 0, 1.0)]), 2)
    for _ in range(100):
        assert alone.table() == [0, 0, 0]
        alone.scheduled(1, 0)


def test_sizes_do_not_flap():
    """Where all sizes are as good as each other, luck does not move the table."""
    tokens = [1 + sum(0.7**depth for depth in range(1, n + 1)) for n in range(9)]
    table = SizeCosts.of(
        (r, n, 0.01 * r**0.5 * (tokens[n] if n else 1.05))
        for r in REQUESTS
        for n in candidate_sizes(CHAIN.num_nodes)
    )
    world = World(CHAIN, 0.7, table)
    world.run([16] * 500)
    chosen = []
    for _ in range(200):
        world.run([16] * PLANNED_FOR)
        chosen.append(world.rule._table[16])
    assert sum(a != b for a, b in itertools.pairwise(chosen)) <= 8


def test_ranges_say_the_whole_table():
    rule = World(TREE, 0.5).rule
    ranges = rule.ranges()
    assert ranges[0][0] == 1 and ranges[-1][1] == REQUESTS[-1]
    told = [nodes for first, last, nodes in ranges for _ in range(first, last + 1)]
    assert told == rule._table[1:]
    assert all(a[1] + 1 == b[0] and a[2] != b[2] for a, b in itertools.pairwise(ranges))


def test_sizes_have_to_begin_with_none():
    for sizes in ([1, 2], [0], [0, 4, 2]):
        with pytest.raises(ValueError, match="expected 0 and larger ones"):
            SizeSchedule(CHAIN, sizes, costs([0, 1, 2, 4]), 8)

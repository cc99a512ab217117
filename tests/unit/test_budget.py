"""The budget of drafted nodes: costs, worths, the rule, and a simulated engine around them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.common.drafting_world import DEPTH, Auto, World, costs, rate
from vllm_msd.budget import (
    AcceptancePrior,
    Calibration,
    CostTable,
    choose_shape,
    expected_tree,
    prefix_lengths,
)
from vllm_msd.budget.costs import GREEDY
from vllm_msd.budget.rule import best_count
from vllm_msd.errors import ConfigError
from vllm_msd.tree import TreeConfig

# A step of 100 ms whose rows cost little, much, and as much as the first one (seconds).
CHEAP_ROWS = costs(0.1, 0.001, 0.0002, 0.004, 0.004)
DEAR_ROWS = costs(0.1, 0.001, 0.01, 0.004, 0.004)
ALL_ROWS = costs(0.002, 0.001, 0.1, 0.004, 0.004)


def honest(own):
    return own


def wrong(own):
    return np.zeros_like(own)


# Costs --------------------------------------------------------------------------------------------


def test_costs_between_and_beyond_what_was_measured():
    table = CostTable(
        ((1, 1, 1.0), (1, 5, 2.0), (1, 9, 1.5), (4, 4, 3.0), (4, 8, 5.0)),
        ((1, 0.5), (11, 1.5)),
        ((1, 0.2), (2, 0.4)),
        (("drawn", 0.3), ("top-p", 0.7)),
    )
    rows = [1, 3, 5, 9, 17]  # a larger step never costs less than a smaller one
    np.testing.assert_allclose(table.step_seconds(1, rows), [1, 1.5, 2, 2, 2])
    np.testing.assert_allclose(table.step_seconds(4, [4, 6, 8, 12]), [3, 4, 5, 7])
    np.testing.assert_allclose(table.step_seconds(9, [9]), [5.5])
    np.testing.assert_allclose(table.step_seconds(2, [5]), [2 + (3.5 - 2) / 3])
    assert table.draft_seconds(4, 6, 0) == 0
    assert table.draft_seconds(4, 6, 3) == pytest.approx(1.0 + 2 * 0.8)
    drawn = [table.drawn(way).step_seconds(4, 6) for way in ("greedy", "drawn", "top-p")]
    assert drawn == pytest.approx([4, 4 + 6 * 0.3, 4 + 6 * 0.7])
    assert CostTable.from_dict(table.to_dict()) == table


def test_a_row_beyond_a_single_measured_point_is_not_free():
    """Steps of many requests take long to time: there may be one point of them, without drafts."""
    points = ((1, 1, 1.0), (4, 4, 2.0), (4, 20, 10.0), (16, 16, 9.0), (32, 32, 17.0))
    table = CostTable(points, ((1, 0.5),), ((1, 0.2),))
    np.testing.assert_allclose(table.step_seconds(16, [16, 96]), [9, 9 + 80 * 0.5])
    np.testing.assert_allclose(table.step_seconds(32, [32, 64]), [17, 17 + 32 * 0.5])
    np.testing.assert_allclose(table.step_seconds(24, [48]), [(9 + 32 * 0.5 + 17 + 16 * 0.5) / 2])
    assert table.step_seconds(1, 5) == 1.0  # nothing has fewer requests


@pytest.mark.parametrize("points", [(), ((1, 1, float("nan")),), ((1, 1, -0.1),)])
def test_costs_that_are_none(points):
    with pytest.raises(ValueError, match="costs: got"):
        CostTable(points, ((1, 0.5),), ((1, 0.5),))
    with pytest.raises(ValueError, match="costs: got"):
        CostTable(((1, 1, 1.0),), ((1, 0.5),), ((1, 0.5),), (("drawn", -0.1),))


def test_stale_and_damaged_tables_are_not_used(tmp_path):
    path, key = tmp_path / "a" / "costs.json", {"model": "x", "versions": ["1", "2"]}
    path.parent.mkdir()
    assert CostTable.load(path, key) is None
    DEAR_ROWS.save(path, key)
    assert CostTable.load(path, key) == DEAR_ROWS
    assert CostTable.load(path, {**key, "model": "y"}) is None
    values = json.loads(path.read_text())
    for damaged in ({**values, "format": 0}, {**values, "step": [[1, 2]]}, {"key": key}, []):
        path.write_text(json.dumps(damaged))
        assert CostTable.load(path, key) is None
    path.write_text(path.read_text()[:-3])
    assert CostTable.load(path, key) is None


# Worths -------------------------------------------------------------------------------------------


def test_calibration_finds_the_true_map_and_follows_a_change():
    rng = np.random.default_rng(1)
    calibration = Calibration()
    np.testing.assert_allclose(calibration.worth([0.05, 0.5, 0.95]), [0.05, 0.5, 0.95], atol=0.02)
    for truth in (lambda p: p**2, lambda p: np.sqrt(p)):
        for _ in range(100):
            p = rng.random(50)
            calibration.observe(p, rng.random(50) < truth(p))
        at = np.array([0.15, 0.45, 0.75, 0.94])
        worths = calibration.worth(at)
        assert (np.diff(worths) >= 0).all()
        np.testing.assert_allclose(worths, truth(at), atol=0.15)


def test_calibration_is_monotone_where_evidence_is_not():
    """A range never seen is worth no more than the more probable ones that were found wrong."""
    calibration = Calibration()
    calibration.observe(np.full(200, 0.95), np.zeros(200))
    assert calibration.worth([0.3, 0.85]).max() < 0.1
    assert calibration.worth([0.0])[0] == 0


def test_prior_from_a_drafts_config():
    prior = AcceptancePrior.from_config(
        {"by_depth": [0.9, 0.5], "by_probability": [[0.0, 0.0], [0.5, 0.2], [1.0, 0.8]]}
    )
    assert prior.worth([0.25, 0.75]).tolist() == pytest.approx([0.1, 0.5])
    assert Calibration(prior).worth([0.75])[0] == pytest.approx(0.5, abs=0.02)
    assert AcceptancePrior.from_config(None).worth([0.3])[0] == pytest.approx(0.3)
    chances, depths = expected_tree(TreeConfig(3, 3, 1), prior.by_depth)
    np.testing.assert_allclose(chances, [0.9, 0.5, 0.5 * 5 / 9])
    assert depths.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [7, {"by_depth": [2.0]}, {"by_depth": "x"}, {"by_probability": [[0.9, 0.1], [0.1, 0.9]]},
     {"by_probability": [1, 2]}, {"by_depth": [float("nan")]}],
)  # fmt: skip
def test_prior_that_is_none(value):
    with pytest.raises(ConfigError, match="msd_acceptance: got"):
        AcceptancePrior.from_config(value)


# The rule -----------------------------------------------------------------------------------------


def test_lengths_are_the_best_of_all_combinations():
    rng = np.random.default_rng(2)
    seen = set()
    for trial in range(80):
        worths = [np.sort(rng.random(rng.integers(0, 4)))[::-1] ** 2 for _ in range(3)]
        table = costs(0.05, 0.001, rng.choice([0.001, 0.02, 0.2]), 0.01, 0.004)
        drawing = 0.02 if trial % 4 == 0 else 0.0
        drawn = replace(table, drawing=(("drawn", drawing),)).drawn("drawn")
        found = prefix_lengths(worths, drawn, depth=3)
        every = np.stack(np.meshgrid(*(np.arange(len(w) + 1) for w in worths)), -1).reshape(-1, 3)

        def of(lengths, worths=worths, table=table, drawing=drawing):
            tokens = 3 + sum(w[:n].sum() for w, n in zip(worths, lengths, strict=True))
            rows = 3 + sum(lengths)
            seconds = table.step_seconds(3, rows) + table.draft_seconds(3, rows, 3)
            return tokens / (seconds + drawing * rows)

        assert of(found) == pytest.approx(max(map(of, every)))
        seen.add(sum(found))
    assert 0 in seen and max(seen) > 5


def test_a_request_gets_a_prefix_whatever_rounding_did():
    """Worths that rise again: the later node is not taken without the earlier one."""
    assert prefix_lengths([np.array([0.1, 0.9]), np.array([0.5])], ALL_ROWS) == [0, 0]
    assert prefix_lengths([np.array([0.9, 0.1, 0.1])], costs(1, 0, 0.12, 0, 0)) == [1]
    lengths = prefix_lengths([np.array([0.0, 0.0]), np.array([0.9])], CHEAP_ROWS, at_least=5)
    assert lengths == [0, 1]
    assert best_count(np.zeros(5), 1, costs(1, 0, 0, 0, 0), 0) == 0  # the fewest at a tie
    assert prefix_lengths([], CHEAP_ROWS) == []


def test_shape_follows_the_costs():
    chain, tree = TreeConfig(8, 8, 1), TreeConfig(24, 6, 4)

    def candidates(row, level):
        for shape in (chain, tree):
            yield (
                shape,
                CostTable(
                    tuple((r, n * r, 0.01 + row * n * r) for r in (1, 16) for n in (1, 64)),
                    ((1, 0.001),),
                    tuple((r, 0.001 + level * shape.top_k * r) for r in (1, 16)),
                ),
            )

    by_depth = [0.6**n for n in range(1, 7)]
    assert choose_shape([*candidates(1e-6, 1e-6)], by_depth) == tree
    assert choose_shape([*candidates(2e-3, 1e-3)], by_depth) == chain


# Simulated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [CHEAP_ROWS, DEAR_ROWS, ALL_ROWS], ids=["cheap", "dear", "all"])
@pytest.mark.parametrize("truth", [honest, lambda p: p**3, wrong], ids=["good", "poor", "wrong"])
@pytest.mark.parametrize("requests", [1, 32])
def test_close_to_the_best_fixed_size(table, truth, requests):
    world = World(table, truth)
    best, length = world.best_fixed(requests)
    steps = Auto(world).run([requests] * 400)
    assert rate(steps[50:]) > 0.95 * best, length  # 1 or 2 % of it is chance


def test_rows_that_cost_more_to_draw_are_verified_less():
    """The same engine with greedy and with drawn requests, in turns."""
    world = World(replace(CHEAP_ROWS, drawing=(("drawn", 0.01),)), honest)
    auto = Auto(world)
    auto.run([16] * 60)
    nodes = {}
    for world.way in (GREEDY, "drawn", GREEDY):
        best, _ = world.best_fixed(16)
        steps = auto.run([16] * 250)
        assert rate(steps[100:]) > 0.95 * best
        nodes[world.way] = sum(step.nodes for step in steps)
    assert nodes["drawn"] < 0.5 * nodes[GREEDY]


def test_the_best_size_differs_between_these_loads():
    """Or the test above would prove little."""
    sizes = {
        World(table, truth).best_fixed(requests)[1]
        for table in (CHEAP_ROWS, DEAR_ROWS)
        for truth in (honest, wrong)
        for requests in (1, 32)
    }
    assert 0 in sizes and len(sizes) >= 4 and max(sizes) >= DEPTH - 2


def test_jumps_of_load_settle_within_20_steps():
    world = World(DEAR_ROWS, honest)
    auto = Auto(world)
    phases = [auto.run([requests] * 220) for requests in (1, 32, 1)]
    nodes = [np.mean([s.nodes / s.requests for s in phase[20:]]) for phase in phases]
    assert min(nodes[0], nodes[2]) > 3 and nodes[1] < 1
    for requests, phase in zip((1, 32, 1), phases, strict=True):
        assert rate(phase[20:]) > 0.9 * world.best_fixed(requests)[0]
    for phase, usual in zip(phases[1:], nodes[1:], strict=True):  # soon, not only on average
        assert np.mean([s.nodes / s.requests for s in phase[20:40]]) == pytest.approx(usual, abs=1)


@pytest.mark.parametrize("requests", [1, 16])
def test_a_draft_that_is_always_wrong_ends_at_none(requests):
    world = World(CHEAP_ROWS, wrong)
    steps = Auto(world).run([requests] * 550)[50:]
    none = requests / world.seconds(requests, 0, 0)
    assert rate(steps) > 0.97 * none
    assert sum(s.depth > 0 for s in steps) < 10
    assert sum(s.depth > 0 for s in steps) >= 1  # it is still asked now and then


def test_a_draft_comes_back_when_it_is_right_again():
    world = World(CHEAP_ROWS, wrong)
    auto = Auto(world)
    assert sum(s.depth for s in auto.run([1] * 150)[120:]) < 3 * DEPTH
    world.truth = honest
    steps = auto.run([1] * 700)
    assert np.mean([s.depth for s in steps[-50:]]) > 3

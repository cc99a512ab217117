"""Drafts of single requests under Model Runner V2: what the scheduler is left with."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams

from vllm_msd.vllm_plugin import drafted_nodes, request_drafts, scheduled_sizes
from vllm_msd.vllm_plugin.gpu import step_costs

PLACEHOLDERS = [-1] * 5


def request(drafts=PLACEHOLDERS, penalty=0.0, **own):
    params = SamplingParams(presence_penalty=penalty, extra_args=own or None)
    return SimpleNamespace(spec_token_ids=drafts, sampling_params=params)


class Scheduler:
    """What vLLM's does with drafts: schedules those of every running request."""

    def __init__(self, requests, v2=True):
        self.requests, self.use_v2_model_runner = requests, v2
        self.vllm_config = SimpleNamespace(
            speculative_config=None, scheduler_config=SimpleNamespace(async_scheduling=False)
        )
        self.running = list(requests.values())

    @request_drafts.wrap_schedule
    def schedule(self, throttle_prefills=False):
        return SimpleNamespace(
            num_scheduled_tokens={
                name: 1 + len(r.spec_token_ids) for name, r in self.requests.items()
            },
            num_spec_tokens_to_schedule=5,
        )


@pytest.fixture
def msd_engine(monkeypatch):
    monkeypatch.setattr(request_drafts, "is_msd", lambda config: True)


def test_each_request_keeps_what_it_wants(msd_engine):
    found = Scheduler(
        {
            "all": request(),
            "none": request(msd=False),
            "two": request(msd_max_nodes=2),
            "more": request(msd_max_nodes=9),
            "cut already": request([7, 8], msd_max_nodes=3),
            "none yet": request([], msd_max_nodes=3),
        }
    ).schedule()
    assert found.num_scheduled_tokens == {
        "all": 6, "none": 1, "two": 3, "more": 6, "cut already": 3, "none yet": 1,
    }  # fmt: skip
    assert found.num_spec_tokens_to_schedule == 5
    assert PLACEHOLDERS == [-1] * 5, "the list that all requests share"


def test_nothing_is_drafted_where_nobody_wants_it(msd_engine):
    nobody = Scheduler({"a": request(msd=False), "b": request(msd_max_nodes=0)})
    assert nobody.schedule().num_spec_tokens_to_schedule == 0
    idle = Scheduler({})
    assert idle.schedule().num_spec_tokens_to_schedule == 5


@pytest.mark.parametrize("is_msd", [False, True])
def test_other_engines_are_left_alone(monkeypatch, is_msd):
    """Those without MSD, and Model Runner V1, whose drafters cut by themselves."""
    monkeypatch.setattr(request_drafts, "is_msd", lambda config: is_msd)
    found = Scheduler({"none": request(msd=False)}, v2=not is_msd).schedule()
    assert found.num_scheduled_tokens == {"none": 6}
    assert found.num_spec_tokens_to_schedule == 5


# Sizes left to the plugin -------------------------------------------------------------------------


def engine_config(
    sizes=(0, 2, 5),
    costs=((1, 0, 0.1), (2, 0, 0.1), (1, 5, 0.1), (1, 2, 0.1)),
    tree=(5, 1),
    scheduling=False,
):
    draft = SimpleNamespace(
        msd_draft={"msd_acceptance": None}, msd_tree_depth=tree[0], msd_tree_top_k=tree[1],
        msd_sizes=sizes, msd_costs=costs, msd_auto=None,
    )  # fmt: skip
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=5,
            num_speculative_tokens_per_batch_size=[[1, 2, 5]],
            draft_model_config=SimpleNamespace(hf_config=draft),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=2, async_scheduling=scheduling),
    )


class MovingScheduler(Scheduler):
    """And looks the number of drafts up, as vLLM's does."""

    dynamic_sd_lookup = (0, 9, 9)
    num_spec_tokens = 5

    def __init__(self, requests, v2=True, **config):
        super().__init__(requests, v2)
        self.vllm_config = engine_config(**config)

    @request_drafts.wrap_schedule
    def schedule(self, throttle_prefills=False):
        count = len(self.requests)
        return SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(self.requests, 1),
            num_spec_tokens_to_schedule=self.dynamic_sd_lookup[count],
            scheduled_spec_decode_tokens={name: [-1] for name in self.requests},
        )

    @scheduled_sizes.wrap_make_spec_decoding_stats
    def make_spec_decoding_stats(self, stats, drafted, accepted, invalid, request_id):
        return (stats, drafted, accepted, invalid, request_id)


def test_sizes_left_to_the_plugin_follow_what_is_accepted():
    """Drafts that cost nothing more pay as long as some are accepted."""
    scheduler = MovingScheduler({"a": request()})
    for _ in range(40):
        assert scheduler.schedule().num_spec_tokens_to_schedule == 5
        seen = scheduler.make_spec_decoding_stats(None, 5, 4, None, "a")
        assert seen == (None, 5, 4, None, "a")
    for _ in range(400):
        scheduler.schedule()
        scheduler.make_spec_decoding_stats(None, 5, 0, {"a": 0}, "a")
    rule = scheduled_sizes.sizes_of(scheduler).rule
    assert rule.accepted.of_all()[5] < 0.6
    # Two requests with drafts were not measured: they take as long as twice one.
    scheduler.requests = {"a": request(), "b": request()}
    asked = [scheduler.schedule().num_spec_tokens_to_schedule for _ in range(40)]
    assert asked.count(0) > 35 and max(asked) > 0  # what is left are probes
    assert rule.gist().endswith("2: none")


def test_what_a_grammar_forbids_was_not_drafted():
    scheduler = MovingScheduler({"a": request()})
    scheduler.schedule()
    noted = []
    rule = scheduled_sizes.sizes_of(scheduler).rule
    rule.observe = lambda *counts: noted.append(counts)
    scheduler.make_spec_decoding_stats(None, 5, 1, {"a": 2, "b": 1}, "a")
    scheduler.make_spec_decoding_stats(None, 0, 0, None, "a")
    assert noted == [(3, 1)]


@pytest.mark.parametrize(("tree", "noted"), [((2, 2), [(5, 2)]), ((5, 1), [(5, 1), (5, 2)])])
def test_a_chain_in_the_place_of_a_tree_says_nothing_about_trees(tree, noted):
    scheduler = MovingScheduler({"a": request(penalty=0.5), "b": request()}, tree=tree)
    scheduler.schedule()
    found = []
    scheduled_sizes.sizes_of(scheduler).rule.observe = lambda *counts: found.append(counts)
    scheduler.make_spec_decoding_stats(None, 5, 1, None, "a")
    scheduler.make_spec_decoding_stats(None, 5, 2, None, "b")
    assert found == noted


def test_the_log_tells_what_was_drafted_for_the_nodes_verified(monkeypatch):
    """Two nodes of a tree that is two wide need one level, which proposes all five."""
    said = []
    monkeypatch.setattr(scheduled_sizes.envs, "VLLM_LOG_STATS_INTERVAL", 0.0)
    monkeypatch.setattr(scheduled_sizes.logger, "info", said.append)
    costs = ((1, 0, 0.1), (2, 0, 0.1), (1, 2, 0.1))
    MovingScheduler({"a": request()}, tree=(2, 2), costs=costs).schedule()
    assert said == [
        "MSD drafted in 1 of 1 steps: 5.0 nodes a request, of which 2.0 were to be verified."
    ]


@pytest.mark.parametrize(
    ("v2", "reason"),
    [(True, scheduled_sizes.UNTIMED), (False, scheduled_sizes.FALLEN_BACK)],
    ids=["no room", "Model Runner V1"],
)
def test_where_no_steps_were_timed_all_are_drafted(monkeypatch, v2, reason):
    said = []
    monkeypatch.setattr(scheduled_sizes.logger, "info", said.append)
    scheduler = MovingScheduler({"a": request()}, v2, costs=None)
    assert scheduler.schedule().num_spec_tokens_to_schedule == 5
    assert scheduler.dynamic_sd_lookup == [5, 5, 5]
    assert said == [reason]


@pytest.mark.parametrize(
    ("v2", "scheduling", "counted"), [(True, False, 15), (False, True, 15), (False, False, 0)]
)
def test_drafts_are_counted_by_steps_where_no_worker_tells(v2, scheduling, counted):
    """Model Runner V1's workers hand drafts over unless steps are scheduled asynchronously."""
    scheduler = MovingScheduler({"a": request()}, v2, costs=None, scheduling=scheduling)
    for _ in range(4):
        scheduler.schedule()
    count = drafted_nodes._count_of(scheduler)
    assert count.total == counted


class Executor:
    """Workers whose steps take a second a thousand rows; one asks them all.

    Args:
        room: requests that the cache has room for.
        memory: rows that the device has memory for.
        slow: what the first measurements take besides, one after the other.
    """

    def __init__(self, room, memory=math.inf, slow=()):
        self.room, self.memory, self.asked, self.slow = room, memory, [], list(slow)

    def collective_rpc(self, method, args=()):
        if method.__name__ == "machine_of":
            return [{"gpu": "some"}, {"gpu": "other"}]
        self.asked.append(args)
        requests, nodes = args
        if requests * (1 + nodes) > self.memory:
            return [0.5, step_costs.OUT_OF_MEMORY]
        found = seconds_of(*args) + (self.slow.pop(0) if self.slow else 0.0)
        return [found if requests <= self.room else None, None]


def seconds_of(requests, nodes):
    return 1e-3 * requests * (1 + nodes)


def measured(room=8, seconds=8.0, rows=64, **executor):
    config = engine_config((0, 5))
    config.scheduler_config = SimpleNamespace(max_num_seqs=12, max_num_batched_tokens=rows)
    executor = Executor(room, **executor)
    return scheduled_sizes.measure(executor, config, seconds), executor.asked


# By rows. Without drafts up to the most requests; with five as many as a step has rows for.
PLACES = [(1, 0), (2, 0), (4, 0), (1, 5), (8, 0), (12, 0), (2, 5), (4, 5), (8, 5)]


def test_costs_are_those_of_the_first_rank_where_there_is_room():
    costs, asked = measured()
    assert asked == [(1, 5), *PLACES, *PLACES]  # the first to warm up
    assert costs.points == tuple((*place, seconds_of(*place)) for place in PLACES if place[0] <= 8)
    assert measured(rows=24)[1][-1] == (4, 5)
    assert measured(room=0)[0] is None


def test_a_step_that_was_slow_once_is_not_dear():
    """What the first pass over all points found slow, the second finds quick."""
    costs, _ = measured(slow=[0.0, 0.2, 0.0, 0.3, 0.1])
    assert costs.points == measured()[0].points


def test_measuring_ends_when_its_time_is_over():
    """The first point is measured in any case, or there would be no costs."""
    costs, asked = measured(seconds=0.0)
    assert asked == [(1, 5), (1, 0)] and len(costs.points) == 1


def test_measuring_ends_where_memory_does(monkeypatch):
    said = []
    monkeypatch.setattr(scheduled_sizes.logger, "warning", lambda *args: said.append(args[1:]))
    costs, asked = measured(memory=12)
    assert asked == [(1, 5), *PLACES[:8]]  # the last has 24 rows
    assert [point[:2] for point in costs.points] == [p for p in PLACES[:7] if p[0] <= 8]
    assert said == [(4, 5)]


def test_a_step_without_memory_leaves_no_requests_behind(monkeypatch):
    done = []

    class Steps:
        def __init__(self, worker, requests, nodes, context):
            done.append((requests, nodes, context))

        def first(self, positions):
            raise torch.OutOfMemoryError("of 80 GiB")

        def finish(self):
            done.append("finished")

    monkeypatch.setattr(step_costs, "_Steps", Steps)
    monkeypatch.setattr(step_costs, "_context", lambda *_: 7)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(num_lookahead_tokens=5),
        kv_connector=SimpleNamespace(set_disabled=done.append),
    )
    found = step_costs.time_steps(SimpleNamespace(model_runner=runner), 3, 2)
    assert found == step_costs.OUT_OF_MEMORY
    assert done == [(3, 2, 7), True, "finished", False]

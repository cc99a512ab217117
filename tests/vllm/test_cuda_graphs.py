"""Model Runner V2 on the wiring of a GPU, its CUDA graphs emulated: nothing changes but the speed.

Triton attention on vLLM's own caches, the settle kernel, and graphs of the target's decoding, the
draft's prefill and a drafting round. Each engine lives in a process of its own and is compared with
an eager one by its tokens *and* its accepted counts: a wrong draft changes no token.

Not covered: what a GPU computes, streams, piecewise graphs; see ``tests.common.cuda_graphs``.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.common import tiny
from tests.common.cuda_graphs.moving_sizes import draft_of_trees
from tests.common.tree_mutations import SHOWS_IN_OUTPUT
from tests.common.worker import run_worker
from vllm_msd.demo.paths import demo_pair
from vllm_msd.roofline.scratch import drafting_bytes
from vllm_msd.tree import TreeConfig

pytestmark = pytest.mark.long
# Nodes by running requests.
SCHEDULE = ((1, 1, 16), (2, 2, 7), (3, 3, 0), (4, 4, 3), (5, 6, 2))
DRAFTS = {
    "chain": {"spec_tokens": 5},
    "tree": {"spec_tokens": 16, "tree": (5, 4)},
    "schedule": {"spec_tokens": 16, "tree": (5, 4), "schedule": SCHEDULE},
    "moving": {"spec_tokens": 16},
}
DECODING = "FULL_DECODE_ONLY"
# Trees of fewer nodes than a whole one is deep keep vLLM's own prefill of the draft, which issues
# so many launches more than the compact one.
OTHER_PREFILL = 20
CASES = [
    "mixed_batch", "chunk_inside_image", "prefix_cache", "preemption", "structured_output",
    "settled_prefixes", "constrained_beside_free", "seeded_samples",
]  # fmt: skip


@cache
def answers(kind, graphs=None, **options):
    pair = demo_pair()
    draft = str(pair.draft) if kind else None
    return run_worker(
        "graph_answers",
        "v2",
        wiring={"graphs": graphs, "profile": graphs is not None},  # as a GPU starts
        target=str(pair.target),
        requests=8,
        **{"draft": draft, **(DRAFTS[kind] if kind else {}), **options},
    )


def replays(report, manager):
    return sum(report["replays"][manager].values())


@pytest.mark.parametrize(("draft", "speculator"), [("chain", "Chain"), ("tree", "Tree")])
@pytest.mark.parametrize("graphs", [DECODING, "FULL"])
def test_graphs_change_nothing(draft, speculator, graphs):
    """Under ``FULL`` also the prompts' images: a graph of the draft's prefill knows none."""
    eager, got = answers(draft), answers(draft, graphs)
    assert eager["speculator"] == got["speculator"] == f"{speculator}Speculator"
    assert got["ids"] == answers(None)["ids"]
    assert got["acceptance"] == eager["acceptance"]
    assert got["acceptance"]["accepted"] > 20 and got["acceptance"]["rejected"] > 20
    prefill = "compact" if draft == "tree" else "prefill"
    assert min(replays(got, name) for name in ("target", prefill, "decode")) > 0


def test_requests_are_drafted_for_in_turn_where_not_all_fit():
    """2,048 tokens in float32, four rows a request: room for two requests of up to six."""
    at_once, in_turn = answers("tree"), answers("tree", logits_bytes=2 * 4 * 2048 * 4)
    assert in_turn["ids"] == at_once["ids"]
    assert in_turn["acceptance"] == at_once["acceptance"]
    assert (at_once["requests_at_once"], in_turn["requests_at_once"]) == (6, 2)


@pytest.mark.parametrize("scheduling", [False, True], ids=["sync", "async"])
def test_trees_by_a_schedule(scheduling):
    """Of other sizes in nearly every step, as requests come and go."""
    eager, got = (answers("schedule", g, async_scheduling=scheduling) for g in (None, DECODING))
    assert got["ids"] == eager["ids"] == answers(None)["ids"]
    assert got["acceptance"] == eager["acceptance"] != answers("tree")["acceptance"]
    assert got["acceptance"]["accepted"] > 20 and got["acceptance"]["rejected"] > 20
    rows = {int(size.split()[2]) // int(size.split()[0]) for size in got["replays"]["target"]}
    assert rows == {nodes + 1 for *_, nodes in SCHEDULE}
    # Two nodes need one level, three need two; where none are asked for there is no graph.
    rounds = [size.split() for size, n in got["replays"]["decode"].items() if n]
    levels = {int(words[0]): int(words[-2]) for words in rounds}
    assert len(levels) == len(rounds) and set(levels.values()) == {4, 2, 1}
    assert levels.items() <= {1: 4, 2: 4, 4: 2, 5: 1, 6: 1}.items()


def test_a_threshold_of_a_schedule_costs_nothing_but_its_rows():
    """Two sizes as a batch shrinks: no step leaves the graphs, whatever the batch.

    Graphs of 3 rows a request are there for 1, 2 and 6 requests; between them lie those of 17.
    """
    pair = demo_pair()
    steps = run_worker(
        "launches_by_batch", "v2", target=str(pair.target), draft=str(pair.draft),
        speculation={"spec_tokens": 16, "tree": [5, 4], "schedule": [[1, 2, 16], [3, 6, 2]]},
        lengths=[6, 10, 14, 20, 36, 48],
    )  # fmt: skip
    decoding = [step for step in steps if step["rows"] == step["requests"] + step["drafted"]]
    few, many = ([s for s in decoding if s["drafted"] == n * s["requests"] > 0] for n in (16, 2))
    crossing = [s for s in decoding if s["requests"] <= 2 and s["drafted"] == 2 * s["requests"]]
    assert len(few) > 3 and len(many) > 3 and crossing
    assert {s["requests"] for s in few} == {1, 2} and max(s["requests"] for s in many) > 3
    for step in (*few, *many):
        assert len(step["graphs"]) == 3, step
    # The target's graph and what is issued beside the graphs do not depend on the size.
    assert len({s["graphs"][0] for s in (*few, *many)}) == 1
    assert max(s["outside"] for s in many) <= max(s["outside"] for s in few) + OTHER_PREFILL
    levels = {s["graphs"][2] for s in many if s not in crossing}
    assert max(levels) < min(s["graphs"][2] for s in few) / 2


MOST = (16, 8, 4, 2, 2, 0)  # nodes that pay, by requests


@pytest.fixture(scope="module")
def other_drafts(tmp_path_factory):
    """The demo's draft as one that prefers trees, and with its input shuffled."""
    root, own = tmp_path_factory.mktemp("drafts"), Path(demo_pair().draft)
    config = json.loads((own / "config.json").read_text())
    wrong = root / "wrong"
    wrong.mkdir()
    weights = load_file(own / "model.safetensors")
    order = torch.randperm(len(weights["fc.weight"]), generator=torch.manual_seed(0))
    weights["fc.weight"] = weights["fc.weight"][order].contiguous()
    save_file(weights, wrong / "model.safetensors")
    (wrong / "config.json").write_text(json.dumps(config))
    return {"tree": draft_of_trees(str(own), root / "tree", 16, 5, 4), "wrong": str(wrong)}


def test_sizes_left_to_the_plugin_follow_the_requests(other_drafts):
    """Graphs are there for all of them, and hold what eager steps do; scheduled asynchronously.

    More than four requests are drafted for in turn, without a graph.
    """
    options = {"async_scheduling": True, "best": MOST, "draft": other_drafts["tree"]}
    eager = answers("moving", **options)
    in_turn = {"logits_bytes": 4 * 4 * 2048 * 4}
    got = answers("moving", DECODING, timed=(0, 16), **in_turn, **options)
    assert (eager["requests_at_once"], got["requests_at_once"]) == (6, 4)
    assert {int(size.split()[0]) for size in got["replays"]["decode"]} == {1, 2, 3, 4}
    assert got["ids"] == eager["ids"] == answers(None)["ids"]
    assert len(got["times"]) == 2 and min(got["times"]) > 0
    assert got["acceptance"] == eager["acceptance"]
    assert got["acceptance"]["accepted"] > 20 and got["acceptance"]["rejected"] > 20
    assert got["steps"] == eager["steps"]
    others = [step for step in got["steps"] if step[1] != MOST[step[0] - 1]]
    assert len(others) <= 1 and all(n > MOST[requests - 1] for requests, n in others)  # a probe
    asked = [nodes for _, nodes in got["steps"]]
    assert set(asked) == set(MOST) and asked.count(0) > 10
    assert max(asked[asked.index(0) :]) == 16, "none at first, and all when the others are gone"
    used = {size for size, count in got["replays"]["target"].items() if count}
    assert {int(size.split()[2]) // int(size.split()[0]) for size in used} == {1, 3, 5, 9, 17}


def test_a_wrong_draft_is_hardly_asked(other_drafts):
    """After made-up requests whose steps were timed, which leave nothing behind."""
    got = answers("moving", best=(5,) * 6, draft=other_drafts["wrong"], timed=(0, 5), spec_tokens=5)
    assert got["ids"] == answers(None)["ids"]
    assert len(got["times"]) == 2 and min(got["times"]) > 0
    assert got["acceptance"]["accepted"] < got["acceptance"]["rejected"] / 20
    asked = [nodes for _, nodes in got["steps"]]
    assert asked[0] == 5
    late = asked[asked.index(0) :]
    assert len(late) > 20 and 0 < sum(nodes > 0 for nodes in late) <= 2  # probes


OWN = ((), (("msd", False),), (("msd_max_nodes", 2),))


@pytest.mark.parametrize(
    ("draft", "graphs", "scheduling"), [("chain", None, False), ("tree", DECODING, True)], ids=str
)
def test_requests_with_fewer_drafts_or_none(draft, graphs, scheduling):
    """Beside others that have all of them, and after these are gone."""
    got = answers(draft, graphs, async_scheduling=scheduling, own=OWN)
    assert got["ids"] == answers(None)["ids"]
    most = DRAFTS[draft]["spec_tokens"]
    drafts, tokens = got["drafts"], [len(ids) for ids in got["ids"]]
    kinds = [range(kind, len(drafts), 3) for kind in range(3)]
    for kind, limit in zip(kinds, (most, 0, 2), strict=True):
        assert {max(drafts[i]) for i in kind} == {limit}
        # A step emits the drafts that it accepts, and one token more.
        accepted = sum(tokens[i] - 1 - len(drafts[i]) for i in kind)
        rejected = sum(sum(drafts[i]) for i in kind) - accepted
        assert (accepted > 5 and rejected > 0) if limit else accepted <= 0


def test_chains_verified_adaptively():
    """Rows are free up to 12 a step: of six requests some keep their drafts, others lose them."""
    got = answers("chain", DECODING, free_rows=12)
    assert got["ids"] == answers(None)["ids"]
    assert got["acceptance"]["accepted"] > 20 and got["acceptance"]["rejected"] > 5
    cut = [(budget, own) for budget, own in got["budgets"] if 0 < budget < sum(own)]
    whole = [budget for budget, own in got["budgets"] if budget == sum(own)]
    assert len(cut) > 3 and whole
    assert sum(replays(got, name) for name in ("target", "decode")) > 0


@pytest.mark.parametrize(("nodes", "tree"), [(60, (6, 10)), (30, (5, 10))], ids=str)
def test_large_trees_under_the_limits_of_a_default_server(nodes, tree):
    """1,024 requests of 8,192 rows, as on a device of 80 GB: one level of all would be 10,240."""
    limits = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    got = run_worker(
        "graph_answers", "v2", wiring={}, target=str(demo_pair().target),
        draft=str(demo_pair().draft), requests=8, spec_tokens=nodes, tree=tree, options=limits,
        profile=True,
    )  # fmt: skip
    assert got["ids"] == answers(None)["ids"]
    assert got["acceptance"]["accepted"] > 20 and got["acceptance"]["rejected"] > 20
    assert got["requests_at_once"] == 819
    assert got["profiled_rows"] == 8192
    shape = TreeConfig(nodes, *tree)
    memory = drafting_bytes(1024, shape, 2048, hidden=256, max_tokens=8192, element_bytes=4)
    assert got["memory"] == {kind: memory[kind] for kind in ("growth", "trees", "roots")}


def test_launches_of_a_drafting_round():
    """At most 6 a level beside the draft's own layer, and 8 more in the whole graph."""
    depth, _ = DRAFTS["tree"]["tree"]
    levels = depth - 1  # the first one needs the root's logits only
    launches = answers("tree", DECODING)["launches"]
    assert launches["draft layer"] > 10 * levels
    assert 4 * levels < launches["beside"] <= 6 * levels + 8


def test_graphs_under_async_scheduling():
    eager, got = (answers("tree", g, async_scheduling=True) for g in (None, DECODING))
    assert got["ids"] == eager["ids"] == answers(None)["ids"]
    assert got["acceptance"] == eager["acceptance"]
    assert replays(got, "decode") > 0


def test_a_freed_buffer_is_an_error():
    with pytest.raises(RuntimeError, match="StaleGraphError"):
        answers("chain", DECODING, bug="freed_lengths")


@pytest.mark.parametrize("bug", ["stale_draft_tokens", "stale_parents"])
def test_a_buffer_made_anew_shows_in_the_counts_alone(bug):
    right, got = answers("tree", DECODING), answers("tree", DECODING, bug=bug)
    assert got["ids"] == right["ids"]
    assert got["acceptance"] != right["acceptance"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    # Heads of 64, which the tree kernel takes; the other tiny targets have 32.
    kind = "qwen3_vl"
    pair = tiny.build_pair(tmp_path_factory.mktemp("pair"), kind, decoys=2)

    @cache
    def report(graphs):
        return run_worker(
            "tree",
            "v2",
            wiring={"graphs": graphs},
            kind=kind,
            target=str(pair.target),
            draft=str(pair.draft),
            cases=CASES,
            mutations=None
            if graphs
            else {
                **dict.fromkeys(SHOWS_IN_OUTPUT["v2"], "mixed_batch"),
                "sampling_position": "seeded_samples",
            },
        )

    return report


@pytest.mark.parametrize("graphs", [None, DECODING])
@pytest.mark.parametrize("name", CASES)
def test_same_tokens(reports, graphs, name):
    case = reports(graphs)["cases"][name]
    assert case["same"], case["first_difference"]
    assert case["accepted"] > 0 and case["rejected"] > 0


@pytest.mark.parametrize("name", CASES)
def test_same_counts_with_and_without_graphs(reports, name):
    eager, got = (reports(graphs)["cases"][name] for graphs in (None, DECODING))
    for count in ("steps", "drafted", "accepted", "other_children", "tree_sizes"):
        assert got[count] == eager[count], count


def test_every_graph_was_replayed(reports):
    """But those of vLLM's own prefill, which is for batches of chains alone."""
    assert min(replays(reports(DECODING), name) for name in ("target", "compact", "decode")) > 20


@pytest.mark.parametrize("mutation", SHOWS_IN_OUTPUT["v2"])
def test_a_broken_step_is_noticed(reports, mutation):
    assert not reports(None)["mutations"][mutation]["same"]

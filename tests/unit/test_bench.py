"""The benchmark's figures, near ties and page, from made-up measurements: no engine here."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

from benchmarks.pages import __main__ as pages
from benchmarks.pages.bench import shaped, support
from vllm_msd.bench import ties
from vllm_msd.bench.arms import parse_arms
from vllm_msd.bench.charts import draw
from vllm_msd.bench.drive import Cell, Reply
from vllm_msd.bench.figures import Results, percentile, summary
from vllm_msd.bench.ideal import Bounds
from vllm_msd.bench.report import render
from vllm_msd.bench.table import closing_table, heading, line
from vllm_msd.tree.config import TreeConfig

ARMS = parse_arms(["chain:2", "auto"])
NAMES = [arm.name for arm in ARMS]
PROVENANCE = {
    "date": "2030-01-02 03:04 UTC",
    "command": "vllm-msd bench",
    "settings": {"target": "<b>mine", "wide": None, "passes": 2},
    "machine": {"processor": "a <fast> one"},
    "versions": {"vllm": "0.32.0"},
    "data": {"source": "q.json", "requests": 2, "left_out": 0, "kinds": {"a": 1, "<i>": 1}},
}
# One row costs 10 ms, each further one 1 ms; the draft 2 ms to read and 1 ms a level.
COSTS = {
    "step": [[1, 1, 0.010], [1, 11, 0.020]],
    "prefill": [[1, 0.002]],
    "level": [[1, 0.001]],
}
IDEAL = {
    "costs": {"auto": COSTS, "chain": COSTS},
    "widths": {"auto": 1, "chain": 1},
    "products": {"target": {"1": 5.0, "11": 10.0}, "draft": {"1": 0.5}},
    "profile": {
        "arm": "auto",
        "steps": 3,
        "milliseconds_per_step": {"target": 8.0, "rest of the step": 2.0, "whole step": 10.0},
    },
}


def _cell(seconds: float, tokens: list[list[int]], steps: list[list[float]], **more) -> Cell:
    replies = [Reply(ids, 0.1, 0.1 + seconds / 2, len(ids), "stop") for ids in tokens]
    return Cell(seconds, replies, full_steps=steps, **more)


@pytest.fixture
def results() -> Results:
    plain = [_cell(2.0, [[1, 2, 3], [4, 5]], [[0, 0, 10, 0.2, 10]]) for _ in range(2)]
    drafts = {"verifications": 4, "drafted": 8, "accepted": 6, "accepted_by_depth": [4, 2]}
    # Three tokens a step of three rows and two levels; the steps take twice what the costs say.
    fast = [[2, 2, 10, 10 * 0.030, 30]]
    chain = [_cell(s, [[1, 2, 3], [4, 9]], fast, **drafts) for s in (1.0, 0.5)]
    auto = [_cell(2.5, [[1, 2, 3], [4, 5]], [[0, 0, 10, 0.21, 10]]) for _ in range(2)]
    found = [
        ties.Difference(1, "chain:2", turn, 1, 1, 9, 5, [4], gap, is_near_tie=gap < 0.1)
        for turn, gap in enumerate((0.0001, 2.0))
    ]
    cells = dict(zip([(0.0, 1, name) for name in NAMES], (plain, chain, auto), strict=True))
    return Results(ARMS, cells, ["a", "<i>"], found, IDEAL)


def test_speed_is_the_median_of_the_passes_against_none_of_the_same_pass(results):
    one = summary(results)["cells"][0]["arms"]
    assert one["none"]["tokens_per_second_per_pass"] == [2.5, 2.5]
    assert one["chain:2"]["speedup_per_pass"] == [2.0, 4.0] and one["chain:2"]["speedup"] == 3.0
    assert one["chain:2"]["acceptance_length"] == 1 + 6 / 4
    assert one["chain:2"]["acceptance_rate_per_position"] == [1.0, 0.5]
    assert one["none"]["acceptance_length"] is None
    assert one["none"]["natural_ends"] == one["none"]["requests"] == 4


def test_shares_of_the_ideal(results):
    one = summary(results)["cells"][0]["arms"]
    # 3 tokens in (10 + 2 rows of 1) + (2 + 1) ms, against 1 in 10 ms: 2 times as fast.
    assert one["chain:2"]["ideal_speedup"] == pytest.approx(3 / 0.015 / 100)
    # Reached: 100 tokens/s against 50.
    assert one["chain:2"]["decode_speedup"] == pytest.approx(2.0)
    assert one["chain:2"]["share_of_ideal_speedup"] == pytest.approx(1.0)
    # Products: (5 + 2 rows of 0.5) + 0.5 to read + 0.5 for a level.
    assert one["chain:2"]["ideal_tokens_per_second"] == pytest.approx(3 / 0.007)
    assert one["none"]["share_of_ideal_tokens_per_second"] == pytest.approx(50 / 200)
    assert one["none"]["ideal_speedup"] == 1.0


def test_there_is_no_ideal_beyond_what_was_measured():
    wide, narrow = parse_arms(["tree:8x4x2", "tree:8x4x3"])[1:]
    measured = {**IDEAL, "costs": {**IDEAL["costs"], "tree": COSTS}}
    bounds = Bounds({**measured, "widths": {"auto": 2, "chain": 1, "tree": 2}})
    steps = [[2, 2, 10, 0.3, 30]]
    assert bounds.speedup(wide, 1, steps) and bounds.speedup(narrow, 1, steps) is None
    assert Bounds(IDEAL).speedup(wide, 1, steps) is None, "a chain's costs are not a tree's"
    assert bounds.speedup(ARMS[1], 1, steps) and bounds.speedup(ARMS[1], 2, steps) is None
    assert bounds.speedup(ARMS[0], 1, [[0, 0, 10, 0.2, 10]]) == pytest.approx(1.0)


def test_costs_kept_for_few_requests_are_not_those_of_many():
    from vllm_msd.vllm_plugin.cpu import cost_probe

    shape = TreeConfig(8, 8, 1)

    def config(requests: int, rows: int = 4096) -> MagicMock:
        return MagicMock(
            scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=rows)
        )

    def key(*limits: int) -> dict:
        found = cost_probe.table_key(config(*limits), shape)
        return {name: found[name] for name in ("requests", "rows")}

    assert key(4) != key(64) == key(256) and key(64, 64) != key(64)
    runner = MagicMock(
        vllm_config=config(8), kv_cache_config=SimpleNamespace(num_blocks=99, kv_cache_groups=[])
    )
    runner.vllm_config.num_lookahead_tokens, runner.max_model_len = 8, 4096
    assert {requests for requests, _ in cost_probe._points(runner, shape)} == {1, 4, 8}


def test_what_is_not_known_is_said_so(results):
    found = {
        **PROVENANCE,
        **summary(Results(**{**vars(results), "ideal": {"missing": "no <auto>"}})),
    }
    assert found["cells"][0]["arms"]["chain:2"]["share_of_ideal_speedup"] is None
    assert "no &lt;auto&gt;" in render(found)
    without = {**IDEAL, "profile": {"arm": "auto", "missing": "nothing <was> drafted"}}
    found = {**PROVENANCE, **summary(Results(**{**vars(results), "ideal": without}))}
    assert "nothing &lt;was&gt; drafted" in render(found)


def test_near_ties_are_counted_apart(results):
    found = summary(results)
    one = found["cells"][0]["arms"]["chain:2"]
    assert (one["identical"], one["near_ties"], one["differing"]) == (2, 1, 1)
    assert found["support"] == {
        "chain:2": {"1": {"identical": False, "not_slower": True}},
        "auto": {"1": {"identical": True, "not_slower": False}},
    }


@pytest.mark.parametrize(
    ("best", "dtype", "is_near"),
    [
        ({9: -0.7, 5: -0.7005}, "float32", True),
        ({9: -0.7, 5: -0.9}, "float32", False),
        ({9: -0.7, 5: -0.9}, "bfloat16", True),
        ({5: -0.7, 8: -0.7}, "bfloat16", False),  # the arm's token is none of the best
        ({8: -0.6, 5: -0.7, 9: -0.9}, "bfloat16", True),  # three as good as each other
        ({8: -0.1, 5: -0.7, 9: -0.7}, "bfloat16", False),  # close, and neither near the best
    ],
)
def test_a_near_tie_is_between_the_best(best, dtype, is_near):
    one = ties.Difference(1, "chain", 0, 0, 1, 9, 5, [4])
    assert ties._judged(one, best, dtype).is_near_tie is is_near


def test_differences_name_the_first_token():
    plain, replies = [Reply([1, 2, 3]), Reply([4]), Reply([5])], [Reply([1, 7, 3]), Reply([4, 6])]
    found = ties.differences(plain, [*replies, Reply([5])], 2, "auto", 1)
    assert [(d.request, d.position, d.token, d.plain, d.prefix) for d in found] == [
        (0, 1, 7, 2, [1]), (1, 1, 6, None, [4])
    ]  # fmt: skip


def test_percentiles():
    assert percentile([3, 1, 2], 50) == 2 and percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([], 50) is None


class _Checker(HTMLParser):
    """Counts open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "rect", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag


def test_page_table_and_charts(results, tmp_path):
    found = {**PROVENANCE, **summary(results)}
    page = render(json.loads(json.dumps(found)))
    checker = _Checker()
    checker.feed(page)
    assert not checker.open and "$" not in page
    assert "&lt;b&gt;mine" in page and "<b>mine" not in page and "<i>" not in page
    assert "1, 4 of 2 distinct ones" in page and "to 2 distinct requests" in page
    assert "median / p90" in page
    assert "2 of 4 +1 ties" in page and "other answers" in page and "slower" in page
    text = closing_table(found)
    assert "batch 1, temperature 0: 2 distinct requests" in text
    assert "3.00x" in text and "2.00 to 4.00" in text and "100%" in text
    cells = {name: results.cells[0.0, 1, name][0] for name in NAMES}
    assert "(2.00x)" in line(0.0, 1, 0, cells) and "chain:2" in heading(ARMS)
    for path in draw(found, tmp_path):
        assert Image.open(path).width > 500


def test_support_matrix_of_the_pages(results):
    text = support("bench.json", {**PROVENANCE, **summary(results)})
    assert "| MSD, chain of 2 | other answers, 3.00x, 1.00 of the ideal |" in text
    assert "| MSD, sizes that follow the load | slower, 0.80x, 0.95 of the ideal |" in text
    assert "Near ties, which count as the same answer: 1." in text and "2030-01-02" in text


def test_auto_beside_the_best_that_is_fixed(results):
    found = {**PROVENANCE, **summary(results)}
    auto = found["cells"][0]["auto"]
    assert auto["best_fixed"] == "chain:2" and auto["of_none"] == pytest.approx(0.8)
    # 2 tokens/s in both passes, against 5 and 10.
    assert auto["of_best_fixed_per_pass"] == pytest.approx([0.4, 0.2])
    assert auto["of_best_fixed"] == pytest.approx(0.3)
    assert "auto is 0.30x of chain:2" in closing_table(found)
    assert "0.20 to 0.40" in render(found)
    text = support("bench.json", found)
    assert "| of the best fixed size | 0.30 |" in text and "| which was | chain:2 |" in text
    assert "| share of the ideal speed-up | 0.95 |" in text


def test_pages_draw_the_matrix_of_both_targets(results, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    empty = pages.section("docs/benchmarks.md", tmp_path)
    assert empty == f"{pages.BEGIN}\n\n{pages.END}"
    found = {**PROVENANCE, **summary(results)}
    found["settings"] = {**found["settings"], "target": "/a/folder"}
    (folder / "real.json").write_text(json.dumps(found))
    wide = {**found, "settings": {"target": None, "wide": "350M", "passes": 2}}
    (folder / "bench.json").write_text(json.dumps(wide))
    text = pages.section("docs/benchmarks.md", tmp_path)
    assert "the demo pair widened to 350M" in text and "a real language model" in text
    assert "/a/folder" not in text
    assert text.count("| MSD, chain of 2 | other answers, 3.00x, 1.00 of the ideal |") == 2


def test_pages_and_report_say_where_acceptance_comes_from(results):
    shape = {
        "note": "acceptance from a table, cost from the true shape", "name": "<x>",
        "weights_gib": 14.0, "tokens_of_a_tree_of_60": 4.75, "first_choice_right": 0.7,
    }  # fmt: skip
    missing = {"missing": "nothing was asked"}
    other = Results(**{**vars(results), "ideal": missing, "compared": False})
    found = {**PROVENANCE, **summary(other), "shape": shape}
    assert found["support"] == {} and "identical" not in found["cells"][0]["arms"]["auto"]
    page = render(found)
    assert "Acceptance from a table" in page and "&lt;x&gt;" in page and "<x>" not in page
    assert "Not compared" in page and "100.0</td>" in page, "decoding speeds are shown"
    assert "not compared" in closing_table(found) and "from a table" in closing_table(found)
    text = shaped("bench_shape.json", found)
    assert text.startswith("**Acceptance from a table") and "2.00x (3.00x), 2.50 tokens" in text

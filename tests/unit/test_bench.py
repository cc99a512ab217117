"""The benchmark's settings, data, figures and page, from made-up measurements: no engine here."""

import json
import os
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

from benchmarks.pages.bench import support
from vllm_msd.bench import ties
from vllm_msd.bench.arms import parse_arms
from vllm_msd.bench.charts import draw
from vllm_msd.bench.data import Requests, load_requests
from vllm_msd.bench.drive import Cell, Reply
from vllm_msd.bench.engines import Engines, Models, check_memory, models_of
from vllm_msd.bench.figures import Results, percentile, summary
from vllm_msd.bench.ideal import Bounds
from vllm_msd.bench.report import render
from vllm_msd.bench.run import Place, Run, fingerprints, open_journal, order
from vllm_msd.bench.serving_file import content, write_requests
from vllm_msd.bench.settings import BenchSettings
from vllm_msd.bench.table import closing_table, heading, line
from vllm_msd.cli.bench_command import is_local
from vllm_msd.cli.main import main
from vllm_msd.demo.paths import demo_pair
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.measure.inputs import Sample
from vllm_msd.regenerate.journal import Journal
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


def test_arms_are_what_vllm_is_given():
    none, ngram, tree, auto = parse_arms(["ngram:3", "tree:8x4x2", "auto"])
    assert none.speculative_config("d") is None and none.depth == ngram.depth == 0
    assert ngram.speculative_config("d")["num_speculative_tokens"] == 3
    assert tree.speculative_config("d") == {
        "method": "msd", "model": "d", "num_speculative_tokens": 8, "tree_depth": 4, "tree_top_k": 2
    }  # fmt: skip
    assert (tree.depth, tree.width, auto.depth) == (4, 2, None)
    assert auto.speculative_config(None) == {"method": "msd"}


@pytest.mark.parametrize("names", [["fast"], ["chain:x"], ["tree:3"], ["chain:0"], ["auto:3"],
                                   ["chain", "chain"], ["tree:3x5x2"], ["chain", "chain:5"],
                                   ["chain:1_0"], ["chain: 3"], ["chain:"]])  # fmt: skip
def test_a_wrong_arm_is_refused(names):
    with pytest.raises(ConfigError, match=r"got"):
        parse_arms(names)


@pytest.mark.parametrize(
    "wrong",
    [
        {"arms": ("none",)},
        {"batch": (1, 1)},
        {"temperature": (-1.0,)},
        {"temperature": (float("nan"),)},
        {"temperature": (0.0, float("inf"))},
        {"seed": -1},
        {"image_root": (".",)},
        {"passes": 1},
        {"target": "/not/there"},
        {"draft": "mine"},
        {"target": "org/model", "wide": "350M"},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(wrong, tmp_path):
    with pytest.raises(ConfigError):
        BenchSettings(output=tmp_path, **wrong).check()
    BenchSettings(output=tmp_path, target="org/model", draft="org/draft").check()


def test_a_target_without_a_draft_or_a_config_is_refused_before_an_engine_starts(tmp_path):
    settings = BenchSettings(output=tmp_path, target=str(tmp_path))
    with pytest.raises(ConfigError, match="no MSD draft is known for the target"):
        models_of(settings)
    sample = Sample([], [{"role": "user", "content": []}], "a")
    with pytest.raises(ConfigError, match=r"--target.*cannot be read"):
        Engines(settings, Models(str(tmp_path), None, "float32"), [sample])


def test_the_command_tells_a_mistake_in_a_sentence(capsys, tmp_path):
    assert main(["bench", "--arms", "fast", "--output", str(tmp_path)]) == 2
    assert "expected some of none, ngram" in capsys.readouterr().err


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


class _Tied:
    """An engine of two best tokens, 0.2 apart; its dtype is what ``auto`` came to."""

    dtype = "bfloat16"

    def __init__(self) -> None:
        self.llm, self.asked = self, []

    def add_request(self, request, prompt, params):
        self.asked.append(request)

    def has_unfinished_requests(self):
        return bool(self.asked)

    def step(self):
        logprobs = [{9: SimpleNamespace(logprob=-0.7), 5: SimpleNamespace(logprob=-0.9)}]
        output = SimpleNamespace(logprobs=logprobs)
        return [SimpleNamespace(request_id=self.asked.pop(), outputs=[output])], None


def test_near_ties_are_those_of_the_engines_dtype_where_it_is_left_to_the_model(tmp_path):
    settings = BenchSettings(tmp_path, arms=("none", "chain"), batch=(1,), temperature=(0.0,))
    sample = Sample([], [{"role": "user", "content": "?"}], "a")
    requests = Requests([sample], "q", [])
    with Journal(tmp_path / "bench.json", {}) as journal:
        run = Run(settings, Models(str(demo_pair().target), None, "auto"), requests, journal)
        for number, place in enumerate(run.places):
            for turn in range(2):
                token = 5 if place.arm == "none" else 9
                journal.add(number, turn, **_cell(1.0, [[token]], []).to_dict())
        engine = _Tied()
        engine.prompt = lambda sample: {"prompt_token_ids": [1]}
        run._engines.get = lambda name: engine
        run._examine()
        found = journal[-1, 0]["differences"]
    assert [one["is_near_tie"] for one in found] == [True, True]
    with pytest.raises(ConfigError, match="--dtype: got auto"):
        ties.examine(engine, [], [], "auto")


def test_differences_name_the_first_token():
    plain, replies = [Reply([1, 2, 3]), Reply([4]), Reply([5])], [Reply([1, 7, 3]), Reply([4, 6])]
    found = ties.differences(plain, [*replies, Reply([5])], 2, "auto", 1)
    assert [(d.request, d.position, d.token, d.plain, d.prefix) for d in found] == [
        (0, 1, 7, 2, [1]), (1, 1, 6, None, [4])
    ]  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
def test_arms_take_turns_and_no_cell_is_left_out(apart):
    arms = ["none", "chain", "auto"]
    places = [Place(0.0, batch, arm) for batch in (1, 4) for arm in arms]
    found = order(places, arms, 2, apart)
    assert sorted(found) == [(number, turn) for number in range(6) for turn in range(2)]
    firsts = [places[number].arm for number, _ in found[:: 2 if apart else 3]]
    assert firsts == (
        ["none", "chain", "auto", "chain", "auto", "none"]  # each does both batches, then goes
        if apart
        else ["none", "chain", "chain", "auto"]  # of each batch, in the first and second pass
    )


def test_only_force_forgets_what_was_measured(tmp_path):
    with open_journal(tmp_path, {"seed": 0}, force=False) as journal:
        journal.add(0, 0, seconds=1.0)
    with open_journal(tmp_path, {"seed": 0}, force=False) as journal:
        assert journal.resumed == 1
    with pytest.raises(ConfigError, match="seed: 0, now 5"):
        open_journal(tmp_path, {"seed": 5}, force=False)
    with open_journal(tmp_path, {"seed": 0}, force=True) as journal:
        assert journal.resumed == 0 and (0, 0) not in journal
        journal.add(1, 0, seconds=2.0)
    with open_journal(tmp_path, {"seed": 0}, force=False) as journal:
        assert (journal.resumed, journal[1, 0]["seconds"]) == (1, 2.0)


def test_force_leaves_a_running_run_alone(tmp_path):
    with open_journal(tmp_path, {"seed": 0}, force=False) as journal:
        journal.add(0, 0, seconds=1.0)
        before = journal.path.read_bytes()
        for seed in (0, 5):
            with pytest.raises(ConfigError, match="another process is at work"):
                open_journal(tmp_path, {"seed": seed}, force=True)
        assert journal.path.read_bytes() == before


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


def _record(name: str, *turns: str, **more) -> dict:
    speakers = ("human", "gpt")
    spoken = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "conversations": spoken, **more}


def test_conversations_ask_the_last_question_after_what_was_said(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    records = [
        _record("1", "Hi", "Hello", "And <image>?", "Red", image="a.png", kind="vqa"),
        _record("2", "Alone"),
        _record("3", "", "", "no reply to the first", kind="bad"),
        _record("4", "One", "1", kind="vqa"),
    ]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    found = load_requests(str(path), (), 9)
    assert [sample.kind for sample in found.samples] == ["vqa", "q", "vqa"], "kinds in turn"
    first, alone, _ = found.samples
    assert [m["role"] for m in first.prompt] == ["user", "assistant", "user"]
    assert len(first.images) == 1 and first.prompt[0]["content"][0]["text"] == "Hi"
    assert alone.prompt == [{"role": "user", "content": [{"type": "text", "text": "Alone"}]}]
    assert len(found.left_out) == 1 and "line" in found.left_out[0]


def test_only_pictures_of_the_chosen_kinds_are_read(tmp_path):
    records = [_record("1", "And <image>?", image="gone.png", kind="vqa"), _record("2", "Hi")]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    (chosen,) = load_requests(str(path), (), 9, ["q"]).samples
    assert chosen.kind == "q" and not chosen.images
    with pytest.raises(DataError, match=r"got opera; expected some of q, vqa"):
        load_requests(str(path), (), 9, ["opera"])


def test_mmspec_asks_the_first_question_of_each_line(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    rows = [
        {"id": 1, "image": "a.png", "turns": ["What?", "And?"], "category": "vqa", "topic": "x"},
        {"id": 2, "image": None, "turns": ["Text"], "category": "chat"},
    ]
    file = tmp_path / "mmspec.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (tmp_path, file):
        first, second = load_requests(str(data), (), 5).samples
        assert first.kind == "vqa" and len(first.images) == 1 and not second.images
        assert first.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no question in it"),
        ("\n \n\n", "has no question in it"),
        ("{", "line 1: not valid JSON"),
        ('{"turns": []}', "expected a list of questions"),
        ('{"turns": ["a"], "image": 3}', "expected names of files"),
        ('{"turns": ["a"], "image": "no.png"}', "there is no such file.*--image-root"),
    ],
)
def test_wrong_mmspec_data_is_refused(tmp_path, text, reason):
    (tmp_path / "mmspec.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        load_requests(str(tmp_path), (), 5)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"without mmspec\.jsonl"):
        load_requests(str(tmp_path), (), 5)


def test_requests_for_vllms_load_generator(tmp_path):
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    earlier = [{"role": "user", "content": [image]}, {"role": "assistant", "content": [text]}]
    own = Sample([red, blue], [*earlier, {"role": "user", "content": [text, image]}], "a")
    inherited = Sample([red], [*earlier, {"role": "user", "content": [text]}], "a")
    kinds = [[part["type"] for part in content(one)] for one in (own, inherited)]
    assert kinds == [["text", "image_url"], ["image_url", "text"]]
    assert content(own)[1] != content(inherited)[0], "the second picture, not the first"
    path = tmp_path / "requests.jsonl"
    write_requests(path, [own, inherited])
    assert [json.loads(line)["content"] for line in path.open()] == [
        content(own),
        content(inherited),
    ]


def test_support_matrix_of_the_pages(results):
    text = support("bench.json", {**PROVENANCE, **summary(results)})
    assert "| MSD, chain of 2 | other answers, 3.00x, 1.00 of the ideal |" in text
    assert "| MSD, sizes that follow the load | slower, 0.80x, 0.95 of the ideal |" in text
    assert "Near ties, which count as the same answer: 1." in text and "2030-01-02" in text


def test_the_command_writes_requests(tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    arguments = ["--num-prompts", "7", "--output", str(tmp_path), "--write-requests"]
    assert main(["bench", *arguments, str(path), "--batch", "2"]) == 0
    assert "7 requests" in capsys.readouterr().out and len(path.read_text().splitlines()) == 7
    assert main(["bench", *arguments, str(path), "--batch", "2", "5"]) == 0
    assert "10 requests" in capsys.readouterr().out, "as many as the run asks of batch 5"
    assert main(["bench", *arguments, str(tmp_path / "requests.json")]) == 2
    assert "ends in .jsonl" in capsys.readouterr().err


def test_paths_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["bench", "--quick", "--output", "out", "--write-requests=~/r.jsonl"]) == 0
    assert (tmp_path / "r.jsonl").is_file()
    shutil.copytree(demo_pair().target, tmp_path / "target")
    settings = BenchSettings(tmp_path, target="~/target", arms=("none", "ngram"))
    settings.check()
    assert models_of(settings).target == str(tmp_path / "target")
    assert is_local(settings)


def test_a_draft_on_the_hub_is_asked_for_there(tmp_path):
    target = str(demo_pair().target)
    assert is_local(BenchSettings(tmp_path)), "the demo pair"
    assert is_local(BenchSettings(tmp_path, target=target, draft=str(demo_pair().draft)))
    settings = BenchSettings(tmp_path, target=target, draft="org/draft")
    assert not is_local(settings)
    assert is_local(replace(settings, arms=("none", "ngram"))), "which need no draft"
    assert not is_local(BenchSettings(tmp_path, target="llava-hf/llava-1.5-7b-hf"))


def test_another_model_or_other_data_behind_the_same_name_is_another_run(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"a")
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    asked = Sample([red], [{"role": "user", "content": [{"type": "image"}]}], "a")
    models = Models(str(model), str(model), "float32")
    requests = Requests([asked], "q.json", [])
    first = fingerprints(requests, models)
    assert first == fingerprints(requests, models) and len(first) == 3
    other = Requests([replace(asked, images=[blue])], "q.json", [])
    with open_journal(tmp_path, first, force=False) as journal:
        journal.add(0, 0, seconds=1.0)
    with pytest.raises(ConfigError, match="digest of the requests"):
        open_journal(tmp_path, fingerprints(other, models), force=False)
    (model / "model.safetensors").write_bytes(b"ab")
    with pytest.raises(ConfigError, match=r"digest of the target(.|\n)*digest of the draft"):
        open_journal(tmp_path, fingerprints(requests, models), force=False)


def test_what_there_is_no_memory_for_is_refused(tmp_path):
    models = Models(str(tmp_path), None, "bfloat16")
    settings = BenchSettings(tmp_path)
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    with pytest.raises(ConfigError, match=r"5 engines.*--max-model-len, or --engines apart"):
        check_memory(settings, models, share, 4096)  # five of a quarter each
    check_memory(replace(settings, engines="apart"), models, share, 4096)
    check_memory(replace(settings, arms=("none", "chain")), models, share, 4096)


@pytest.mark.parametrize("rest", [[], [-1], [-1, -2]])
def test_all_is_measured_only_when_all_is(tmp_path, capsys, monkeypatch, rest):
    settings = BenchSettings(tmp_path, arms=("none", "chain"), batch=(1,), temperature=(0.0,))
    requests = Requests([Sample([], [{"role": "user", "content": "?"}], "a")], "q", [])
    with Journal(tmp_path / "bench.json", {}) as journal:
        run = Run(settings, Models(str(demo_pair().target), None, "float32"), requests, journal)
        for number, turn in [(0, 0), (0, 1), (1, 0), (1, 1), *((record, 0) for record in rest)]:
            journal.add(number, turn)
        monkeypatch.setattr(run, "_examine", lambda: None)
        monkeypatch.setattr(run, "_measure_ideal", lambda: None)
        run.measure()
    assert ("everything is measured already" in capsys.readouterr().out) is (len(rest) == 2)

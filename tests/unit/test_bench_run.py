"""The benchmark's settings, journal and order of cells: no engine here."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from vllm_msd.bench import ties
from vllm_msd.bench.arms import parse_arms
from vllm_msd.bench.data import Requests
from vllm_msd.bench.drive import Cell, Reply
from vllm_msd.bench.engines import Engines, Models, check_memory, models_of
from vllm_msd.bench.run import Place, Run, fingerprints, open_journal, order
from vllm_msd.bench.settings import BenchSettings
from vllm_msd.cli.bench_command import is_local
from vllm_msd.cli.main import main
from vllm_msd.demo.paths import demo_pair
from vllm_msd.errors import ConfigError
from vllm_msd.measure.inputs import Sample
from vllm_msd.regenerate.journal import Journal


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
                cell = Cell(1.0, [Reply([token])])
                journal.add(number, turn, **cell.to_dict())
        engine = _Tied()
        engine.prompt = lambda sample: {"prompt_token_ids": [1]}
        run._engines.get = lambda name: engine
        run._examine()
        found = journal[-1, 0]["differences"]
    assert [one["is_near_tie"] for one in found] == [True, True]
    with pytest.raises(ConfigError, match="--dtype: got auto"):
        ties.examine(engine, [], [], "auto")


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

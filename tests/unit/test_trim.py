"""`vllm-msd trim`: which tokens a draft keeps, and what is refused."""

import json
import re

import numpy as np
import pytest

from tests.common import tiny
from tests.common.conversations import write_conversations
from vllm_msd.checkpoint import inspect_draft, load_draft, load_draft_vocabulary
from vllm_msd.cli.main import main
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.training import vocabulary
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.targets import load_renderer
from vllm_msd.training.vocabulary import choose, count_replies, covered, special_ids

FILES = ("model.safetensors", "config.json", "counts.json")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny pair, data with pictures, and the command that trims its draft."""
    folder = tmp_path_factory.mktemp("trim")
    pair = tiny.build_pair(folder / "pair", "llava")
    _, data = write_conversations(folder / "data", count=40)

    def run(output, *flags, draft=pair.draft):
        return main(["trim", str(draft), "--data", str(data), "--output", str(output), *flags])

    return pair, data, run


def rendered_counts(pair, data):
    """Tokens of the replies as training has them, pictures and all: counted and held out."""
    renderer, _ = load_renderer(pair.target)
    renderer.image_roots = [data.parent]
    counts = np.zeros((2, 320), np.int64)
    file = RecordFile(data)
    for number in range(len(file)):
        talk = renderer.render(file[number])
        ids = talk.input_ids[talk.answer_mask].numpy()
        np.add.at(counts[int(number % 10 == 9)], ids, 1)
    return counts, special_ids(renderer, 320)


def test_the_most_frequent_tokens_and_all_special_ones_are_kept(setting, tmp_path, capsys):
    pair, data, run = setting
    (counted, held_out), special = rendered_counts(pair, data)
    assert run(tmp_path / "d", "--size", "24") == 0
    kept = load_draft_vocabulary(tmp_path / "d").tolist()
    assert len(kept) == 24 and set(special) < set(kept)
    others = [i for i in kept if i not in special]
    left = [i for i in range(320) if i not in kept]
    assert min(counted[others]) >= max(counted[left])
    figures = json.loads((tmp_path / "d" / "provenance.json").read_text())["draft_vocabulary"]
    assert figures["covers_held_out"] == pytest.approx(held_out[kept].sum() / held_out.sum(), 1e-5)
    assert figures["tokens"] == counted.sum() + held_out.sum() > 0
    said = capsys.readouterr().out
    assert f"{figures['covers_held_out']:.2%}  <- kept" in said
    # The rest of the draft is as it was.
    config, state = load_draft(tmp_path / "d")
    before, weights = load_draft(pair.draft)
    assert config.hidden_size == before.hidden_size
    assert all((state[name] == x).all() for name, x in weights.items())


def test_coverage_takes_as_few_as_it_can(setting, tmp_path):
    pair, data, run = setting
    (counted, held_out), special = rendered_counts(pair, data)
    assert run(tmp_path / "d", "--coverage", "0.9") == 0
    kept = load_draft_vocabulary(tmp_path / "d").numpy()
    assert len(kept) % 64 == 0
    assert covered(held_out, kept) >= 0.9
    assert len(kept) == 64 or covered(held_out, choose(counted, special, len(kept) - 64)) < 0.9


def test_coverage_is_of_what_was_not_counted():
    counted, held_out = np.zeros(640, np.int64), np.zeros(640, np.int64)
    counted[:10] = 100
    held_out[[1, 300]] = 50
    assert len(choose(counted, [], coverage=0.9)) == 64
    assert len(choose(counted, [], coverage=0.9, judged=held_out)) == 320
    assert len(choose(counted, [], coverage=0.5, judged=held_out)) == 64


def test_a_published_draft_is_trimmed(setting, tmp_path):
    pair, _, run = setting
    assert run(tmp_path / "d", "--size", "64", "--target", pair.target, draft=pair.published) == 0
    found = inspect_draft(tmp_path / "d")
    assert found["problems"] == [] and found["config"]["draft_vocab_size"] == 64
    assert found["config"]["target"]["name_or_path"] == pair.target


def test_interrupted_anywhere_it_goes_on(setting, tmp_path, monkeypatch):
    _, _, run = setting
    assert run(tmp_path / "whole", "--size", "32") == 0
    expected = [(tmp_path / "whole" / name).read_bytes() for name in FILES]
    monkeypatch.setattr(vocabulary, "SAVE_SECONDS", 0.0)
    add = vocabulary.ReplyCounts.add
    for stop in (0, 1, 17, 39):
        calls = []

        def failing(self, *args, stop=stop, calls=calls):
            calls.append(self.done)
            if self.done == stop:
                raise KeyboardInterrupt
            add(self, *args)

        output = tmp_path / f"stopped-{stop}"
        monkeypatch.setattr(vocabulary.ReplyCounts, "add", failing)
        assert run(output, "--size", "32") == 130
        assert not (output / "config.json").exists()
        counted = []

        def counting(self, *args, counted=counted):
            counted.append(self.done)
            add(self, *args)

        monkeypatch.setattr(vocabulary.ReplyCounts, "add", counting)
        assert run(output, "--size", "32") == 0
        assert counted == list(range(stop, 40))
        assert [(output / name).read_bytes() for name in FILES] == expected


def test_counts_are_used_again_for_another_size(setting, tmp_path, monkeypatch):
    _, _, run = setting
    assert run(tmp_path / "d", "--size", "32") == 0
    monkeypatch.setattr(vocabulary.ReplyCounts, "add", None)  # nothing is counted
    assert run(tmp_path / "d", "--size", "40", "--force") == 0
    assert len(load_draft_vocabulary(tmp_path / "d")) == 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "321"], r"--size: got 321, expected \d+ \(all special tokens\) to 320"),
        (["--size", "1"], "--size: got 1, expected"),
        (["--target", "nowhere"], "target nowhere cannot be loaded"),
    ],
)
def test_refusals(setting, tmp_path, capsys, flags, message):
    _, _, run = setting
    assert run(tmp_path / "d", *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "d" / "config.json").exists()


def test_a_taken_folder_and_other_counts_are_refused(setting, tmp_path, capsys):
    pair, data, run = setting
    assert run(pair.target, "--size", "32") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(tmp_path / "d", "--size", "32") == 0
    assert run(tmp_path / "d", "--size", "32") == 2  # a draft is there
    capsys.readouterr()
    other = data.with_name("other.json")
    other.write_text(data.read_text().replace("nothing", "something"))
    flags = ["--output", str(tmp_path / "d"), "--size", "32", "--force"]
    assert main(["trim", str(pair.draft), "--data", str(other), *flags]) == 2
    assert "counts of other data" in capsys.readouterr().err
    (tmp_path / "d" / "counts.json").write_text('{"about": 1}')
    assert run(tmp_path / "d", "--size", "32", "--force") == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_draft_that_names_no_target_needs_one(setting, tmp_path, capsys):
    pair, _, run = setting
    assert run(tmp_path / "d", draft=pair.published) == 2
    assert "Give --target" in capsys.readouterr().err


def test_choice_at_equal_counts_and_impossible_sizes():
    counted = np.array([0, 5, 5, 0, 9, 0])
    assert choose(counted, [3], 2).tolist() == [3, 4]
    assert choose(counted, [3], 3).tolist() == [1, 3, 4]
    assert choose(counted, [3], 5).tolist() == [0, 1, 2, 3, 4]
    assert choose(counted, [3], coverage=0.5).tolist() == list(range(6))  # 64 are more than all
    for size in (0, 7):
        with pytest.raises(ConfigError, match="expected 1 "):
            choose(counted, [3], size)


def test_worker_processes_count_the_same(setting, tmp_path):
    """Held-out records and broken ones included, which depend on the order."""
    pair, _, _ = setting
    renderer, _ = load_renderer(pair.target)
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for i in range(40):
            said = f"{i} is " + "<image>" * (i % 7 == 6)
            turns = [{"from": "human", "value": "so?"}, {"from": "gpt", "value": said}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    here, there = (count_replies(renderer, [RecordFile(path)], 320, workers=n) for n in (0, 3))
    assert (here.counted == there.counted).all() and (here.held_out == there.held_out).all()
    assert here.bad == there.bad and here.done == there.done and here.held_out.any()


def test_no_reply_is_an_error(setting, tmp_path):
    pair, _, _ = setting
    renderer, _ = load_renderer(pair.target)
    path = tmp_path / "empty.jsonl"
    turns = [{"from": "human", "value": "so?"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps({"conversations": turns}))
    assert count_replies(renderer, [RecordFile(path)], 320).counted.sum() > 0
    renderer._reply_spans = lambda *_: []
    with pytest.raises(DataError, match="no reply"):
        count_replies(renderer, [RecordFile(path)], 320)

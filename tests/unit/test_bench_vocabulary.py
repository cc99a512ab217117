"""The benchmark of draft vocabularies: one draft over several sizes, its weights as they were."""

import argparse
import json

import pytest
import torch

import vllm_msd.demo.real.pair as real_pair
from benchmarks import bench_vocabulary
from vllm_msd.checkpoint import load_draft, load_draft_vocabulary
from vllm_msd.demo.paths import demo_pair
from vllm_msd.errors import ConfigError

WORDS = ["red", "circle", "the", "picture", "shows", "a", "large", "star"]


@pytest.fixture
def contest(monkeypatch, tmp_path):
    """`bench_vocabulary.real`, with the demo pair in the real one's place."""
    monkeypatch.setattr(real_pair, "real_pair", lambda report: demo_pair())
    monkeypatch.setattr(real_pair, "real_samples", lambda count: ["a question"] * count)
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": " ".join(WORDS)}]
    replies = tmp_path / "replies.json"
    replies.write_text(json.dumps([{"id": i, "conversations": talk} for i in range(20)]))

    def run(*sizes):
        args = argparse.Namespace(real=replies, sizes=list(sizes), num_prompts=2)
        return bench_vocabulary.real(args, tmp_path)

    return run


def test_one_draft_over_several_vocabularies(contest):
    target, samples, drafts = contest(64, 256)
    assert target == demo_pair().target and len(samples) == 2
    assert list(drafts) == ["whole", "64", "256", "as it comes"]
    assert drafts["as it comes"] == demo_pair().draft
    whole_config, whole = load_draft(drafts["whole"])
    assert whole_config.draft_vocab_size is None and "d2t" not in whole
    for size in (64, 256):
        config, state = load_draft(drafts[str(size)])
        assert config.draft_vocab_size == size == len(load_draft_vocabulary(drafts[str(size)]))
        assert all(torch.equal(state[name], weight) for name, weight in whole.items())
    kept = [set(load_draft_vocabulary(drafts[size]).tolist()) for size in ("64", "256")]
    assert kept[0] < kept[1]


def test_an_impossible_size_is_refused_before_tokens_are_counted(contest):
    with pytest.raises(ConfigError, match="--sizes: got 100000"):
        contest(100_000)


def test_the_command_line_wants_one_contest(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_vocabulary", "--target", "t", "--data", "d"])
    with pytest.raises(SystemExit):
        bench_vocabulary.parse()
    assert "--draft, --trimmed missing" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench_vocabulary", "--real", "r", "--draft", "d"])
    with pytest.raises(SystemExit):
        bench_vocabulary.parse()
    assert "Leave others out" in capsys.readouterr().err

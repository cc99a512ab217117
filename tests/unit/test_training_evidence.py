"""The evidence on training: runs of different settings are never mixed."""

import argparse
import json

import pytest

from benchmarks.training_evidence import check_work, summary
from vllm_msd.errors import ConfigError


def arguments(folder, **changes):
    config = folder / "draft.yaml"
    config.write_text("seed: 1\n")
    about = {"work": folder / "work", "steps": 4, "records": 5, "walks": 6, "config": config}
    return argparse.Namespace(**about | changes)


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    check_work(arguments(tmp_path))
    check_work(arguments(tmp_path))  # and a broken call goes on
    with pytest.raises(ConfigError, match="holds runs with other steps, walks"):
        check_work(arguments(tmp_path, steps=5, walks=0))
    other = tmp_path / "other.yaml"
    other.write_text("seed: 2\n")
    with pytest.raises(ConfigError, match="holds runs with other config"):
        check_work(arguments(tmp_path, config=other))
    assert json.loads((tmp_path / "work" / "settings.json").read_text())["steps"] == 4


def test_summary_keeps_the_seeds_apart():
    def run(seed, length):
        one = {"verifications": 10, "acceptance_length": length}
        all_kinds = {"acceptance_length": length, "accepted_at_depth": [length - 1]}
        counted = {"kinds": {"walk": one, "text": one | {"acceptance_length": 1}}, "all": all_kinds}
        return {"variant": "lk", "seed": seed, "eval": counted, "vllm": None}

    found = summary([run(0, 1.5), run(1, 1.75)])["lk"]
    assert list(found) == ["eval"]
    assert found["eval"]["lengths"]["multimodal"] == [1.5, 1.75]  # text is left out
    assert found["eval"]["at_depth"] == [[0.5], [0.75]]

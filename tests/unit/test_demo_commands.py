"""``vllm-msd demo``: what a user types and gets, without starting an engine."""

import json

import pytest

from vllm_msd.cli.main import main
from vllm_msd.demo.paths import cache_dir


def test_paths_are_json(capsys):
    assert main(["demo", "paths"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"target", "draft"}
    assert all(path.endswith(name) for name, path in found.items())


def test_another_pair_and_a_missing_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MSD_DEMO_PAIR", str(tmp_path))
    assert main(["demo", "paths"]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "vllm-msd demo build" in error


def test_bad_size_is_a_users_mistake(capsys):
    assert main(["demo", "paths", "--wide", "enormous"]) == 2
    assert "expected a number of parameters" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-2", "two"])
def test_bad_count_is_refused(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "run", "--num-prompts", value])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MSD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "vllm-msd"
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"

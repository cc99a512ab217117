"""``vllm-msd demo``: what a user types and gets, without starting an engine."""

import json

import pytest

from vllm_msd.cli.main import main
from vllm_msd.demo import paths, run
from vllm_msd.demo.paths import cache_dir
from vllm_msd.errors import CheckpointError


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


@pytest.mark.parametrize("command", ["data", "build"])
def test_the_factory_is_in_a_checkout_only(command, capsys, monkeypatch, tmp_path):
    installed = tmp_path / "site-packages" / "vllm_msd" / "demo" / "paths.py"
    monkeypatch.setattr(paths, "__file__", str(installed))
    assert main(["demo", command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkout" in error
    assert not (tmp_path / "out").exists()


def test_more_prompts_than_samples(capsys, monkeypatch):
    monkeypatch.setattr("vllm_msd.measure.engine.restart_tuned", lambda: None)
    assert main(["demo", "run", "--num-prompts", "1000"]) == 2
    assert "expected at most the 105" in capsys.readouterr().err


def test_a_real_model_that_cannot_be_had_costs_no_report(monkeypatch, capsys):
    def measure(*_):
        raise CheckpointError("another file <came>")

    monkeypatch.setattr(run, "measure_real", measure)
    settings = run.DemoSettings(1, 5, None, 6, 3, 8, wide=None, real=2)
    assert run._real(settings, "float32") == "another file <came>"
    assert "The real language model was left out: another file" in capsys.readouterr().out


def test_more_real_prompts_than_there_are(capsys, monkeypatch):
    monkeypatch.setattr("vllm_msd.measure.engine.restart_tuned", lambda: None)
    assert main(["demo", "run", "--real-prompts", "61"]) == 2
    assert main(["demo", "real", "--num-prompts", "61"]) == 2
    assert capsys.readouterr().err.count("expected at most the 60") == 2

"""The commands ``convert`` and ``inspect``, as a user calls them."""

import json

import pytest

from tests.common.drafts import write_published
from vllm_msd.cli.main import main


@pytest.fixture
def draft(tmp_path):
    write_published(tmp_path / "draft", "qwen2_vl")
    return tmp_path / "draft"


def test_convert_then_inspect(draft, tmp_path, capsys):
    dst = tmp_path / "own"
    assert main(["convert", str(draft), str(dst), "--target", "org/target"]) == 0
    printed = capsys.readouterr()
    assert f"wrote {dst}" in printed.out and "[1/" in printed.err
    assert main(["inspect", str(dst)]) == 0
    table = capsys.readouterr().out
    for part in ("msd, version 1", "org/target", "type qwen2", "fc.weight", "32x64", "belong"):
        assert part in table
    assert main(["inspect", str(dst), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "msd" and found["config"]["target"]["name_or_path"] == "org/target"


def test_a_published_name_tells_the_target(draft, tmp_path, capsys):
    named = draft.rename(tmp_path / "MSD-Qwen2VL-7B-Instruct")
    assert main(["convert", str(named), str(tmp_path / "own")]) == 0
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["target"]["name_or_path"] == "Qwen/Qwen2-VL-7B-Instruct"


def test_an_unknown_target_is_mentioned(draft, tmp_path, capsys):
    assert main(["convert", str(draft), str(tmp_path / "own")]) == 0
    assert "give --target" in capsys.readouterr().err


def test_user_errors_exit_2_without_a_traceback(draft, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for argv in (
        ["convert", str(draft), str(tmp_path / "taken")],
        ["convert", str(tmp_path / "nowhere"), str(tmp_path / "own")],
        ["inspect", str(tmp_path / "nowhere")],
    ):
        assert main(argv) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("vllm-msd: error: ") and "Traceback" not in printed.err
    assert main(["convert", str(draft), str(tmp_path / "taken"), "--force"]) == 0


def test_inspect_tells_a_broken_checkpoint(draft, capsys):
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    assert main(["inspect", str(draft)]) == 2
    assert "embed_tokens.weight: got shape (40, 32), expected (41, 32)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  vllm-msd {command} " in capsys.readouterr().out

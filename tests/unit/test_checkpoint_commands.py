"""The commands ``convert`` and ``inspect``, as a user calls them."""

import json

import pytest

from tests.common.drafts import QWEN25, write_published
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


def test_a_converted_draft_says_how_it_is_served(draft, tmp_path, capsys):
    command = ["convert", str(draft), str(tmp_path / "own"), "--format", "speculators"]
    assert main(command) == 2
    assert "Give --target" in capsys.readouterr().err
    assert main([*command, "--target", "org/target"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"vllm serve {tmp_path / 'own'}")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["speculators_model_type"] == "msd"
    found = config["speculators_config"]
    assert found["verifier"]["name_or_path"] == "org/target"
    assert found["proposal_methods"][0]["speculative_tokens"] == config["num_speculative_tokens"]
    assert config["transformer_layer_config"]["hidden_size"] == 32
    # Without our own key, as other tools write it.
    del config["model_type"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "own")]) == 0


def test_a_target_s_folder_is_named_in_full_where_vllm_reads_it(draft, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(QWEN25))

    def written(name, *flags):
        assert main(["convert", str(draft), str(tmp_path / name), *flags]) == 0
        return json.loads((tmp_path / name / "config.json").read_text())

    movable = written("movable", "--target", str(target))
    assert movable["target"]["name_or_path"] == "../target"
    assert "speculators_config" not in movable  # vLLM would look for it elsewhere
    assert main(["convert", str(tmp_path / "movable"), str(tmp_path / "kept")]) == 0
    flags = ("--format", "speculators")
    capsys.readouterr()
    found = written("found", "--target", str(target), *flags)
    assert found["speculators_config"]["verifier"]["name_or_path"] == str(target)
    assert f"vllm serve {target} --speculative-model" in capsys.readouterr().out
    draft = tmp_path / "movable"
    assert written("again", *flags)["speculators_config"] == found["speculators_config"]

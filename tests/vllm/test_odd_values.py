"""Values of the speculative config that cannot be meant: a sentence each, never a traceback."""

from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.common import tiny
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.vllm_plugin import plugin


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    plugin.register()
    return tiny.build_pair(tmp_path_factory.mktemp("pair"), "llava")


def configure(pair, config):
    arguments = EngineArgs(model=pair.target, max_model_len=512, speculative_config=config)
    return arguments.create_engine_config().speculative_config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": 7}, r"\['model'\]: got 7, expected the draft's folder or hub name"),
        ({"model": ""}, r"\['model'\]: got '', expected the draft's folder or hub name"),
        ({"model": " "}, r"\['model'\]: got ' ', expected"),
        ({"model": ["msd"]}, r"\['model'\]: got \['msd'\], expected"),
        ({"model": "x" * 5000}, "neither a folder nor a hub name"),
        ({"model": "a\0b"}, "neither a folder nor a hub name"),
        ({"model": "~nobody-of-that-name"}, "neither a folder nor a hub name"),
        ({"model": "a--b/c..d"}, "could not be fetched from the hub"),
        ({"revision": 7}, r"\['revision'\]: got 7, expected a branch"),
        ({"enforce_eager": "perhaps"}, r"\['enforce_eager'\]: got 'perhaps'. Input should be"),
        ({"max_model_len": "long"}, r"\['max_model_len'\]: got 'long'. Input should be"),
        ({"kv_cache_dtype": []}, r"\['kv_cache_dtype'\]: got \[\]. Input should be"),
        ({"attention_backend": "FAST"}, "FAST"),
        ({"draft_load_config": {"load_format": 3}}, r"\['draft_load_config"),
        ({"num-speculative-tokens": 3}, "contradicts 'num_speculative_tokens'=2"),
        ({"temperature": float("nan")}, "temperature"),  # not equal to itself
    ],
    ids=lambda value: str(value)[:40],
)
def test_one_setting(pair, keys, message, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = {"method": "msd", "model": pair.draft, "num_speculative_tokens": 2, **keys}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        configure(pair, config)


@pytest.mark.parametrize("config", ["msd", "", [], ["msd"], 7, [{"method": "msd"}]], ids=str)
def test_the_whole_config(pair, config):
    with pytest.raises(ConfigError, match="expected a table of settings"):
        configure(pair, config)


@pytest.mark.parametrize("text", ["msd", "", " ", "[]", '["msd"]', "7", "{'method': 'msd'}", "{"])
def test_the_command_line(pair, capsys, text):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--model", pair.target, "--speculative-config", text])
    error = capsys.readouterr().err
    assert f"got {text!r}, expected a JSON table of settings" in error
    assert "Traceback" not in error


def test_none_on_the_command_line_is_no_speculation(pair):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", pair.target, "--speculative-config", "None"])
    assert args.speculative_config is None


def test_a_path_is_a_folder(pair):
    config = configure(pair, {"method": "msd", "model": Path(pair.draft)})
    assert config.model == pair.draft

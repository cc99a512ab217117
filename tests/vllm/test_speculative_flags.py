"""From vLLM's command line to its configuration: `--speculative-model` and its siblings."""

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration import engine_args
from vllm_msd.vllm_plugin.configuration.auto_sizes import TREE

AUTO = TREE.num_nodes  # room for the largest that the plugin may choose

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(scope="module")
def parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        (["--speculative-model", "msd"], AUTO),
        (["--speculative-model=msd", "--num-speculative-tokens", "3"], 3),
        (["--speculative-model=msd", "--num-speculative-tokens", "auto"], AUTO),
        (["--speculative_model", "msd", "--num_speculative_tokens=3"], 3),
        (["--speculative-model", "DRAFT"], AUTO),
        (["--speculative-model", "PUBLISHED", "--spec-tokens", "2"], 2),
        (["--spec-method", "msd"], AUTO),
        (["--spec-method", "msd", "--spec-model", "DRAFT", "--spec-tokens", "4"], 4),
        (["--spec-model", "msd"], AUTO),
        (["--spec-model", "DRAFT"], AUTO),
        (["--speculative-config", '{"method": "msd", "num_speculative_tokens": 6}'], 6),
        (["--speculative-config", '{"method": "msd", "model": "DRAFT"}'], AUTO),
        (["--speculative-config.method", "msd", "--speculative-config.model", "DRAFT"], AUTO),
        (["--speculative-config", '{"num-speculative-tokens": 7}', "--speculative-model=msd"], 7),
        (["--speculative-config", '{"method": "msd"}', "--num-speculative-tokens", "1"], 1),
        (["--speculative-config", '{"method": "msd"}', "--speculative-model", "DRAFT"], AUTO),
    ],
    ids=str,
)
def test_command_lines(pair, parser, flags, tokens):
    flags = [f.replace("DRAFT", pair.draft).replace("PUBLISHED", pair.published) for f in flags]
    args = parser.parse_args(["--model", pair.target, "--max-model-len", "512", *flags])
    spec = AsyncEngineArgs.from_cli_args(args).create_engine_config().speculative_config
    assert (spec.method, spec.num_speculative_tokens) == ("eagle", tokens)
    assert spec.draft_model_config.architecture == "EagleMsdLlamaForCausalLM"
    assert spec.model == (pair.published if pair.published in flags else pair.draft)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--speculative-config", '{"method": "msd"}', "--spec-method", "eagle"],
            r"--spec-method eagle contradicts speculative_config\['method'\]='msd'",
        ),
        (
            ["--speculative-config", '{"method": "eagle"}', "--speculative-model", "msd"],
            r"--spec-method msd contradicts speculative_config\['method'\]='eagle'",
        ),
        (
            [
                "--speculative-config",
                '{"method": "msd", "num_speculative_tokens": 3}',
                "--num-speculative-tokens=4",
            ],
            r"--spec-tokens 4 contradicts speculative_config\['num_speculative_tokens'\]=3",
        ),
        (["--spec-method", "eagle", "--spec-model", "msd"], "Leave the method out or set it"),
        (["--speculative-model", "no-such-draft"], "neither a folder nor a hub name"),
        (["--speculative-model", "msd", "--num-speculative-tokens", "0"], "from 1 to 128"),
    ],
    ids=str,
)
def test_contradictions_are_named(pair, parser, flags, message):
    args = parser.parse_args(["--model", pair.target, *flags])
    with pytest.raises(ConfigError, match=message):
        AsyncEngineArgs.from_cli_args(args).create_engine_config()


def test_speculative_model_leaves_a_named_method_alone(parser):
    for flags in (
        ["--spec-method", "eagle", "--speculative-model", "org/head"],
        ["--speculative-model", "org/head", "--spec-method", "eagle"],
    ):
        args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "x", *flags]))
        assert (args.spec_method, args.spec_model) == ("eagle", "org/head")
        assert engine_args.gather_request(args) is None


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        ("org/unknown", "msd", "no MSD draft is known for the target org/unknown"),
        ("llava-hf/llava-1.5-7b-hf", "nonsense", "neither a folder nor a hub name"),
    ],
)
def test_serve_ends_at_a_wrong_draft_without_a_traceback(capsys, target, model, message):
    parser = FlexibleArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    parser = AsyncEngineArgs.add_cli_args(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([target, "--speculative-model", model])
    assert message in capsys.readouterr().err
    other = parser.parse_args([target, "--spec-method", "eagle", "--speculative-model", model])
    assert other.spec_method == "eagle"


def test_flags_are_in_the_help(parser, monkeypatch, capsys):
    for keyword, expected in [
        ("VllmConfig", ["--speculative-model", "--num-speculative-tokens", "--spec-method {msd,"]),
        ("speculative-model", ["--speculative-model msd|PATH|NAME"]),
    ]:
        monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
        with pytest.raises(SystemExit):
            parser.parse_args([f"--help={keyword}"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in expected)

"""The size of a tree, from a request or a draft to vLLM's configuration."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.common.configuring import configure, msd, tree
from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration import guards
from vllm_msd.vllm_plugin.configuration import tree_settings as settings

pytestmark = pytest.mark.usefixtures("registered")


def tree_of(speculative_config):
    vllm_config = SimpleNamespace(speculative_config=speculative_config)
    config = settings.tree_config(vllm_config)
    assert settings.wants_trees(vllm_config) == (not config.is_chain)
    return config.num_nodes, config.depth, config.top_k


@pytest.fixture
def tree_pair(pair, tmp_path):
    """A pair whose draft is served as a tree unless told otherwise."""
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(pair.draft).iterdir():
        (draft / file.name).symlink_to(file)
    config = json.loads((draft / "config.json").read_text())
    config["target"]["name_or_path"] = pair.target
    config |= tree(12, 4, 3)
    (draft / "config.json").unlink()
    (draft / "config.json").write_text(json.dumps(config))
    return dataclasses.replace(pair, draft=str(draft))


def test_without_tree_settings_a_chain(pair):
    assert tree_of(configure(pair.target, msd(pair, tree_top_k=1))) == (5, 5, 1)
    assert tree_of(configure(pair.target, msd(pair, num_speculative_tokens=3))) == (3, 3, 1)


def test_tree_of_the_request(pair):
    config = configure(pair.target, msd(pair, **tree(24, 5, 6)))
    assert tree_of(config) == (24, 5, 6)
    assert config.num_speculative_tokens == 24
    # It travels to the workers in the draft's config.
    assert tree_of(pickle.loads(pickle.dumps(config))) == (24, 5, 6)


def test_tree_of_the_draft_and_what_overrides_it(tree_pair):
    def asked(**keys):
        return tree_of(configure(tree_pair.target, msd(tree_pair, **keys)))

    assert asked() == (12, 4, 3)
    assert asked(num_speculative_tokens=20) == (20, 4, 3)
    assert asked(tree_depth=3) == (12, 3, 3)
    assert asked(tree_top_k=1) == (12, 12, 1)
    assert asked(tree_top_k=1, num_speculative_tokens=5) == (5, 5, 1)


class OnGPU:
    """The platform as it says of itself on a GPU; the engine's config is not built further."""

    def is_cuda(self):
        return True


def test_attention_backend_of_trees_on_a_gpu(pair, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", OnGPU())

    def backend(request=None, **engine):
        arguments = EngineArgs(model=pair.target, **engine)
        return guards.tree_attention_backend(arguments, request or {})

    assert backend().name == "TRITON_ATTN"
    assert backend(attention_backend="TRITON_ATTN").name == "TRITON_ATTN"
    assert backend(attention_config={"backend": "TRITON_ATTN"}).name == "TRITON_ATTN"
    for request, engine in (
        ({}, {"attention_backend": "FLASH_ATTN"}),
        ({}, {"attention_config": {"backend": "FLASH_ATTN"}}),
        ({"attention_backend": "FLASH_ATTN"}, {}),
    ):
        with pytest.raises(ConfigError, match="got FLASH_ATTN, but draft trees on a GPU need"):
            backend(request, **engine)


def test_min_p_and_logit_bias_only_with_trees(pair):
    chain = configure(pair.target, msd(pair, num_speculative_tokens=5))
    trees = configure(pair.target, msd(pair, **tree(12, 4, 3)))
    auto = configure(pair.target, msd(pair))
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={3: 2.0})):
        params._validate_spec_decode(trees)
        params._validate_spec_decode(auto)
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            params._validate_spec_decode(chain)


def test_tree_from_the_command_line(pair):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--speculative-model", pair.draft, "--num-speculative-tokens", "12"]
    flags += ["--speculative-config.tree_depth", "4", "--speculative-config.tree_top_k", "3"]
    args = parser.parse_args(["--model", pair.target, *flags])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert tree_of(config.speculative_config) == (12, 4, 3)

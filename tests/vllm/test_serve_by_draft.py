"""`vllm serve DRAFT`: vLLM finds the target from the draft, through its own speculators format."""

import asyncio
import json
import os
from pathlib import Path

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from demo_factory.world import sample
from tests.common.hub_cache import put_into_cache
from tests.common.server import ask, chat_messages, start_server
from vllm_msd.checkpoint import convert_draft
from vllm_msd.demo.paths import demo_pair
from vllm_msd.vllm_plugin.configuration.auto_sizes import TREE
from vllm_msd.vllm_plugin.patches.patching import vllm_version

TARGET = "org/target"
# 0.33 takes hub names alone, and this process may not reach the hub.
takes_folders = vllm_version().startswith("0.32")


@pytest.fixture
def draft(pair, tmp_path):
    """A draft that names its target's folder."""
    convert_draft(pair.draft, tmp_path / "draft", pair.target)
    return tmp_path / "draft"


def engine_config(draft, *flags):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(draft), "--max-model-len", "512", *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(not takes_folders, reason="vLLM 0.33 takes targets by their hub names alone")
@pytest.mark.parametrize(
    ("flags", "tokens", "depth"),
    [
        ([], 5, None),
        (["--num-speculative-tokens", "3"], 3, None),
        (["--speculative-config", '{"num_speculative_tokens": 4}'], 4, None),
        (
            ["--speculative-config",
             '{"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 3}'], 12, 4,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_target_is_found(pair, draft, flags, tokens, depth):
    config = engine_config(draft, *flags)
    assert config.model_config.model == config.model_config.tokenizer == pair.target
    spec = config.speculative_config
    assert (spec.model, spec.num_speculative_tokens) == (str(draft), tokens)
    hf_config = spec.draft_model_config.hf_config
    assert hf_config.architectures == ["EagleMsdLlamaForCausalLM"]
    assert depth is None or hf_config.msd_tree_depth == depth


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(not takes_folders, reason="vLLM 0.33 takes targets by their hub names alone")
def test_a_draft_without_our_own_key(pair, draft):
    """As the speculators library's tools write it."""
    config = json.loads((draft / "config.json").read_text())
    del config["model_type"]
    (draft / "config.json").write_text(json.dumps(config))
    spec = engine_config(draft).speculative_config
    assert spec.draft_model_config.hf_config.architectures == ["EagleMsdLlamaForCausalLM"]
    beside = EngineArgs(
        model=pair.target, max_model_len=512, speculative_config={"model": str(draft)}
    ).create_engine_config()
    assert beside.speculative_config.num_speculative_tokens == TREE.num_nodes  # sizes are open
    with pytest.raises(ValueError, match="Set the method to 'msd'"):
        EngineArgs(
            model=pair.target,
            max_model_len=512,
            speculative_config={"model": str(draft), "method": "eagle3"},
        ).create_engine_config()


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(takes_folders, reason="vLLM 0.32 takes a target's folder")
def test_a_folder_is_refused_with_what_to_do(draft):
    with pytest.raises(ValueError, match=r"Select local verifiers explicitly with --model"):
        engine_config(draft)


@pytest.mark.long
def test_served_by_its_own_name(tmp_path, fresh_process, msd_server):
    """The demo's draft, which names its target by a hub name: same texts as from its target."""
    pair = demo_pair()
    convert_draft(pair.draft, tmp_path / "draft", TARGET)
    cores = set(range(os.cpu_count() or 1))
    environment = fresh_process["env"] | put_into_cache(tmp_path / "hf", TARGET, Path(pair.target))
    options = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "268435456"]
    options += ["--served-model-name", "by-draft"]
    command = ("vllm", "serve", str(tmp_path / "draft"))
    server = start_server(tmp_path, environment, cores, options, command)
    questions = [sample(kind, 31_000, "test") for kind in ("vqa", "caption", "text")]

    async def texts(url, model):
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            asked = [
                {"model": model, "messages": chat_messages(q), "max_tokens": 32, "temperature": 0}
                for q in questions
            ]
            return [(await ask(client, "good", body)).text for body in asked]

    try:
        got = asyncio.run(texts(server.url, "by-draft"))
        metrics = server.metrics()
    finally:
        server.stop()
    assert got == asyncio.run(texts(msd_server.url, "msd-demo"))
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted < metrics["vllm:spec_decode_num_draft_tokens_total"]

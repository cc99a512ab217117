"""`vllm-msd eval` counts without an engine what vLLM's own counters say of the same requests."""

import json

import pytest

from demo_factory.write_data import write_data
from tests.common.worker import run_worker
from vllm_msd.cli.main import main
from vllm_msd.demo.paths import demo_pair

pytestmark = pytest.mark.long
MAX_TOKENS = 64
RECORDS = 6  # of text, and as many with an image
# By name: arguments of the engine, and flags of the command.
WAYS = {
    "chain": ({"spec_tokens": 4}, ["--num-speculative-tokens", "4"]),
    "tree": (
        {"spec_tokens": 8, "tree": (3, 3)},
        ["--num-speculative-tokens", "8", "--tree-depth", "3", "--tree-top-k", "3"],
    ),
}


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return [str(path) for path in write_data(folder, RECORDS, split="test").values()]


@pytest.fixture(scope="module")
def counted(requests):
    pair = demo_pair().as_dict()
    engines = {name: engine for name, (engine, _) in WAYS.items()}
    return run_worker(
        "acceptance_counters", "v1", data=requests, ways=engines, max_tokens=MAX_TOKENS, **pair
    )


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_agrees_with_vllm(way, requests, counted, tmp_path):
    """Within 3%: a near tie between two tokens may fall differently in the two implementations.

    Where none does, verifications and accepted tokens are the same to the last one.
    """
    vllm = counted[way]
    assert vllm["requests"] == 2 * RECORDS
    assert 0 < vllm["accepted_tokens"] < vllm["draft_tokens"]
    pair, figures = demo_pair(), tmp_path / "figures.json"
    command = ["eval", "--target", str(pair.target), "--draft", str(pair.draft)]
    options = ["--target-dtype", "float32", "--max-tokens", str(MAX_TOKENS), "--device", "cpu"]
    flags = [*options, "--json", str(figures), *WAYS[way][1]]
    assert main([*command, "--data", *requests, *flags]) == 0
    found = json.loads(figures.read_text())["all"]
    print(vllm, found)
    length = 1 + vllm["accepted_tokens"] / vllm["drafts"]
    assert found["acceptance_length"] == pytest.approx(length, rel=0.03)
    assert found["verifications"] == pytest.approx(vllm["drafts"], rel=0.03)
    shares = [count / vllm["drafts"] for count in vllm["accepted_tokens_per_pos"]]
    depth = len(found["accepted_at_depth"])
    assert found["accepted_at_depth"] == pytest.approx(shares[:depth], abs=0.03)

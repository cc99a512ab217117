"""vLLM's own acceptance counters count MSD's drafts, from an engine in a spawned process.

Spawning also proves that the configuration with our draft in it survives pickling.
"""

import pytest
from vllm import LLM, SamplingParams

from tests.common import tiny

TOKENS = 4  # speculative tokens
OUTPUT = 48  # generated tokens of each request


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Counters after two requests, one with an image; values by name without the prefix."""
    pair = tiny.build_pair(tmp_path_factory.mktemp("pair"), "llava")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        environment.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        environment.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        llm = LLM(
            model=pair.target,
            speculative_config={"method": "msd", "num_speculative_tokens": TOKENS},
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=2,
            kv_cache_memory_bytes=64 << 20,
            limit_mm_per_prompt={"image": 1},
            disable_log_stats=False,
        )
    prompts = [tiny.prompt("llava", "{} what", [tiny.image(0)]), tiny.prompt("llava", "hello")]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    )
    assert all(len(o.outputs[0].token_ids) == OUTPUT for o in outputs)
    prefix = "vllm:spec_decode_num_"
    found = {m.name.removeprefix(prefix): m for m in llm.get_metrics() if m.name.startswith(prefix)}
    llm.llm_engine.engine_core.shutdown()
    return {name: getattr(m, "value", getattr(m, "values", None)) for name, m in found.items()}


def test_drafts_are_counted(metrics):
    """Every token but the first of a request comes from a verification: its accepted drafts and
    one more. A request may end inside its last one."""
    assert 0 < metrics["accepted_tokens"] < metrics["draft_tokens"]
    assert metrics["draft_tokens"] <= TOKENS * metrics["drafts"]
    verified = metrics["drafts"] + metrics["accepted_tokens"]
    assert 2 * (OUTPUT - 1) <= verified <= 2 * (OUTPUT - 1 + TOKENS)


def test_acceptance_by_position(metrics):
    positions = metrics["accepted_tokens_per_pos"]
    assert len(positions) == TOKENS
    assert sum(positions) == metrics["accepted_tokens"]
    assert positions == sorted(positions, reverse=True)

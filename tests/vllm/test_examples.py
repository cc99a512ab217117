"""The examples run as their help says, on the demo pair: one server for all that need one."""

import json
import subprocess
import sys

import pytest

from demo_factory.world import sample
from tests.common.worker import HANGS, REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def run(fresh_process):
    """Runs an example; returns its output. ``check=False`` for the ones that must fail."""

    def run(name: str, *arguments: str, code: int = 0) -> str:
        starter = ["bash"] if name.endswith(".sh") else [sys.executable]
        done = subprocess.run(
            [*starter, str(EXAMPLES / name), *arguments],
            capture_output=True,
            text=True,
            timeout=HANGS,
            cwd=REPOSITORY,
            check=False,
            **fresh_process,
        )
        assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    "name",
    [
        "offline_inference.py",
        "serve.sh",
        "openai_client.py",
        "multi_image.py",
        "benchmark_serving.py",
    ],
)
def test_help(run, name):
    assert "examples/" in run(name, "--help")


@pytest.mark.long
@pytest.mark.parametrize(
    "drafting",
    [(), ("--num-speculative-tokens", "8", "--tree-depth", "5", "--tree-top-k", "2")],
    ids=["chain", "tree"],
)
def test_offline_inference(run, tmp_path, drafting):
    image = tmp_path / "scene.png"
    sample("caption", 3, "test").images[0].save(image)
    options = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 512,
        "limit_mm_per_prompt": {"image": 1},
    }
    out = run(
        "offline_inference.py",
        *("--image", str(image), "--question", "What do you see?", "--max-tokens", "24"),
        *("--dtype", "float32", "--engine-options", json.dumps(options)),
        *drafting,
    )
    assert "question: What do you see?" in out
    length = float(out.split("tokens per verification:")[1].split()[0])
    assert 1 <= length <= 6


@pytest.mark.long
def test_openai_client(run, msd_server):
    out = run("openai_client.py", "--base-url", f"{msd_server.url}/v1", "--max-tokens", "24")
    assert len(out.split("msd-demo: ")[1].strip()) > 10


@pytest.mark.long
def test_multi_image(run, msd_server):
    before = msd_server.metrics()["vllm:spec_decode_num_drafts_total"]
    out = run("multi_image.py", "--base-url", f"{msd_server.url}/v1", "--max-tokens", "24")
    assert "What is in these pictures?" in out and "Which colours do you see?" in out
    assert msd_server.metrics()["vllm:spec_decode_num_drafts_total"] > before


@pytest.mark.long
def test_benchmark_serving(run, msd_server, tmp_path):
    result = tmp_path / "result.json"
    out = run(
        "benchmark_serving.py",
        *("--base-url", msd_server.url, "--num-prompts", "14", "--request-rate", "20"),
        *("--max-concurrency", "4", "--max-tokens", "24", "--output", str(result)),
    )
    figures = json.loads(result.read_text())
    assert figures["completed requests"] == 14 and figures["failed requests"] == 0
    assert figures["TTFT median ms"] > 0 and figures["TPOT median ms"] > 0
    assert figures["output tokens/s"] > 0
    assert 1 <= figures["tokens per verification"] <= 6
    assert "tokens per verification" in out


def test_a_missing_server_is_said_so(run):
    for name in ("openai_client.py", "multi_image.py", "benchmark_serving.py"):
        out = run(name, "--base-url", "http://127.0.0.1:9", code=1)
        assert "start one with examples/serve.sh" in out and "Traceback" not in out

"""The examples run as their help says, on the demo pair: one server for all that need one."""

import importlib.util
import json
import math
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
    result, chart = tmp_path / "result.json", tmp_path / "sweep.png"
    out = run(
        "benchmark_serving.py",
        *("--base-url", msd_server.url, msd_server.url, "--num-prompts", "8"),
        *("--concurrency", "4", "--max-tokens", "24"),
        *("--output", str(result), "--chart", str(chart)),
    )
    servers = json.loads(result.read_text())
    assert len(servers) == 2
    for (figures,) in servers.values():
        assert figures["load"] == "4 at a time"
        assert figures["completed"] == 8 and figures["failed"] == 0
        assert figures["median_ttft_ms"] > 0 and figures["median_tpot_ms"] > 0
        assert figures["output_throughput"] > 0
        assert 1 <= figures["spec_decode_acceptance_length"] <= 9
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "over the second's" in out
    assert "leaked" not in out and "Namespace" not in out, "a table of its own"


def test_loads_of_a_sweep(monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", EXAMPLES / "benchmark_serving.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = ["sweep", "--concurrency", "1", "8", "--request-rate", "2"]
    monkeypatch.setattr(sys, "argv", options)
    assert example.loads(example.parse_args()) == [(1, math.inf), (8, math.inf), (8, 2.0)]


def test_benchmark_serving_refuses_what_cannot_work(run):
    out = run("benchmark_serving.py", "--concurrency", "0", code=2)
    assert "above 0" in out
    out = run("benchmark_serving.py", "--kinds", "opera", code=1)
    assert "expected some of caption, chart" in out and "Traceback" not in out


def test_a_missing_server_is_said_so(run):
    for name in ("openai_client.py", "multi_image.py", "benchmark_serving.py"):
        out = run(name, "--base-url", "http://127.0.0.1:9", code=1)
        assert "start one with examples/serve.sh" in out and "Traceback" not in out

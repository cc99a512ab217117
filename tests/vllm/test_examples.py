"""The examples run as their help says, on the demo pair: one server for all that need one."""

import importlib.util
import json
import math
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def example():
    """`examples/benchmark_serving.py` as a module."""
    spec = importlib.util.spec_from_file_location("sweep", EXAMPLES / "benchmark_serving.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_a_started_server_keeps_nothing_and_the_first_load_does_not_count(
    example, monkeypatch, tmp_path
):
    asked = []

    def popen(command, **options):
        asked.append(command)
        return SimpleNamespace(poll=lambda: 0)

    answers = iter([False, True])
    monkeypatch.setattr(example, "is_up", lambda url: next(answers))
    monkeypatch.setattr(example.subprocess, "Popen", popen)
    with example.started({}, 8123, tmp_path / "log"):
        pass
    assert "--no-enable-prefix-caching --mm-processor-cache-gb 0" in " ".join(asked[0])

    measured = []

    def measure(url, requests, load, count, args):
        measured.append((load, count))
        return dict.fromkeys(example.COLUMNS, "")

    monkeypatch.setattr(example, "measure", measure)
    monkeypatch.setattr(example, "served_model", lambda url: ("m", "m"))
    monkeypatch.setattr(sys, "argv", ["sweep", "--concurrency", "1", "4"])
    found = example.sweep("a", "url", tmp_path, example.parse_args())
    assert measured == [((4, math.inf), 4), ((1, math.inf), 50), ((4, math.inf), 50)]
    assert len(found) == 2


def test_a_server_that_does_not_end_is_killed(example, capsys):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-uc", deaf], stdout=subprocess.PIPE, start_new_session=True
    )
    process.stdout.readline()
    example.stop(process, 0.2)
    assert process.returncode == -9 and "killed" in capsys.readouterr().err
    process.stdout.close()


def test_nothing_answered_is_no_ratio(example):
    one, none = {"output_throughput": 2.0}, {"output_throughput": 0.0}
    assert [example.ratio(one, one), example.ratio(one, none)] == ["1.00x", "-"]


def test_loads_of_a_sweep(example, monkeypatch):
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

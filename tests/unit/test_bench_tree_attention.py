"""What of the kernel benchmark runs without a GPU: all of it, with small shapes; not its times.

What could go wrong unnoticed: an alternative that is asked something else (another mask, keys of
another request), bytes counted twice, a summary that counts what was not measured, an alternative
that vanishes from the record, a target that passes because nobody measured it.

Covered by the rehearsal: the kernels and vLLM's unified kernel in Triton's interpreter, PyTorch's
two calls on the CPU. xformers and mslk where they are installed. Not covered: FlashInfer, which
compiles for a GPU, CUDA graphs, and FlexAttention compiled.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.tree_attention.problem import MODELS, Model
from tests.common.worker import INTERPRETER

ROOT = Path(__file__).parents[2]
SPLIT_K = ("xformers", "mslk")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setitem(MODELS, "small", Model(heads=4, kv_heads=2, head_size=64, layers=2))
    return importlib.import_module("benchmarks.tree_attention.__main__")


def test_bytes_and_operations(bench):
    """Written out: K and V of 8 x 4157 keys, q and out of 8 x 61 rows, two bytes each."""
    case = bench.TARGET
    row = 32 * 128 * 2
    assert case.bytes == 2 * 8 * 4157 * row + 2 * 8 * 61 * row
    assert case.operations == 4 * 8 * 61 * 4157 * 32 * 128
    grouped = bench.Case("qwen2-vl-7b", 1, 256, 1)
    assert grouped.bytes == 2 * 258 * 4 * 128 * 2 + 2 * 2 * 28 * 128 * 2


@pytest.mark.parametrize("nodes", [1, 20, 63])
@pytest.mark.parametrize("name", ["ours", "ours, causal", "sdpa, dense"])
def test_contestants_answer_what_is_asked(bench, name, nodes):
    problem = bench.Problem.make(bench.Case("small", 3, 45, nodes), "cpu", torch.float32)
    assert len(problem.caches) == 32
    rival = bench.RIVALS[name]
    calls = rival.make(problem)
    result = calls[0]().clone()
    assert problem.worst_error(result, rival.tree) <= 2
    assert not torch.allclose(result, calls[1]()), "the second cache is another one"
    if nodes > 1:
        assert problem.worst_error(result, not rival.tree) > 2, "the mask made no difference"
    result[-1] += 1e-3  # the last row, or the last request where the result is a view
    assert problem.worst_error(result, rival.tree) > 2


def test_what_cannot_be_measured_is_in_the_record(bench, monkeypatch):
    monkeypatch.setattr(bench, "seconds_per_call", lambda calls, device: 1e-3)
    case = bench.Case("small", 2, 20, 7)
    problem = bench.Problem.make(case, "cpu", torch.float32)
    right = bench.measure("ours", problem, 1e9)
    assert right["microseconds"] == 1000
    assert right["share_of_copy"] == round(case.bytes / 1e-3 / 1e9, 4)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    missing = bench.measure("flashinfer", problem, 1e9)
    assert missing["reason"].startswith("ModuleNotFoundError") and "microseconds" not in missing
    wrong = bench.RIVALS["sdpa, dense"]._replace(tree=False)
    monkeypatch.setitem(bench.RIVALS, "sdpa, dense", wrong)
    assert bench.measure("sdpa, dense", problem, 1e9)["reason"] == "wrong result"


@pytest.mark.parametrize("broken", ["settle", "accept"])
def test_wrong_kernels_are_not_timed(bench, monkeypatch, broken):
    def nothing(*args, out=None):
        if out is not None:
            for t in out:
                t.zero_()

    monkeypatch.setattr(bench, "seconds_per_call", lambda calls, device: 1e-3)
    rows = [bench.measure_settle("small", 2, 1e9, "cpu"), bench.measure_accept(2, "cpu")]
    assert [row["microseconds"] for row in rows] == [1000, 1000]
    monkeypatch.setattr(bench, broken, nothing)
    rows = [bench.measure_settle("small", 2, 1e9, "cpu"), bench.measure_accept(2, "cpu")]
    row = rows[broken == "accept"]
    assert row["reason"] == "wrong result" and "microseconds" not in row


def sample_record() -> dict:
    rows = []
    for context in (256, 4096):
        where = {"model": "llava-1.5-7b", "batch": 8, "context": context, "nodes": 60}
        for name, time in (("ours", 10.0), ("ours, causal", 9.8), ("sdpa, dense", 8 + context)):
            row = {"name": name, **where, "bytes": 10**6 * context, "microseconds": time}
            rows.append({**row, "share_of_copy": 8 / time})
        rows.append({"name": "flashinfer", **where, "reason": "out of time"})
    rows[2]["microseconds"] = 9.0
    settle = {"model": "llava-1.5-7b", "batch": 8, "microseconds": 29.0, "bound_microseconds": 21.0}
    return {"device": "a GPU", "date": "2026-01-01", "attention": rows, "settle": [settle]}


def test_summary_and_criteria(bench):
    record = sample_record()
    found = bench.summary(record)
    assert found["share_of_copy_at_target"] == 0.8
    assert found["masks_cost_worst"] == pytest.approx(0.0204)
    assert (found["cases_with_alternatives"], found["fastest_in"]) == (2, 1)
    assert found["alternatives"] == ["sdpa, dense"]
    assert found["settle_limit_microseconds"] == 31.0
    assert [c["passed"] for c in bench.criteria(found)] == [True, True, False, True]

    record["settle"][0]["bound_microseconds"] = 9.8
    record["settle"][0]["microseconds"] = 30.5
    record["attention"][4]["microseconds"] = 10.4  # at the target
    record["attention"][4]["share_of_copy"] = 0.74
    record["attention"][5]["microseconds"] = 9.0
    assert [c["passed"] for c in bench.criteria(bench.summary(record))] == [False] * 4
    lines = [bench.describe(c) for c in bench.criteria(bench.summary(record))]
    assert lines[3].startswith("FAILED") and "30.5 (limit <= 30.0)" in lines[3]
    nothing = bench.criteria(bench.summary({"attention": [], "settle": []}))
    assert all(bench.describe(c).startswith("NOT MEASURED") for c in nothing)


def run_script(*arguments, **env):
    command = [sys.executable, "-m", "benchmarks.tree_attention", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_rehearsal(tmp_path):
    """The whole script: checks, times, record, targets and plot; every alternative that is here."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    path = os.pathsep.join(filter(None, [str(INTERPRETER), os.environ.get("PYTHONPATH")]))
    out = tmp_path / "tiny.json"
    done = run_script("--tiny", "--out", str(out), PYTHONPATH=path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record = json.loads(out.read_text())
    measured = {}
    for row in record["attention"]:
        if "microseconds" in row:
            assert row["error_over_rounding"] <= 2
            measured[row["name"]] = measured.get(row["name"], 0) + 1
    always = {"ours", "ours, causal", "sdpa, dense", "flex, dense"}
    always |= {"vllm unified, causal"} if find_spec("vllm") else set()
    assert {name: measured.get(name) for name in always} == dict.fromkeys(always, 4)
    others = [r for r in record["attention"] if r["name"] not in always]
    assert all("reason" in row or row["name"].split(",")[0] in SPLIT_K for row in others)
    assert {"flashinfer", "xformers, dense", "mslk, dense"} <= {row["name"] for row in others}
    assert [c["passed"] is None for c in record["criteria"]] == [False] * 4
    assert all("microseconds" in row for row in record["settle"] + record["accept"])
    assert record["versions"]["triton"] == version("triton")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "FAILED       share of copy bandwidth" in done.stdout


@pytest.mark.parametrize("package", SPLIT_K)
def test_tree_attention_of_other_libraries(package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9):
        pytest.skip(f"the kernel of {package} uses block pointers, which Triton 3.9 removed")
    command = [sys.executable, "-m", "tests.common.rivals_on_cpu", package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2 and 0.05 < max(errors) <= 2


def test_a_clone_that_is_not_installed(tmp_path):
    """As on a GPU machine with PyTorch and Triton only: no editable install to find the kernels."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"sys.path.insert(0, {str(ROOT)!r}); import benchmarks.tree_attention; "
        "import vllm_msd.kernels as k; from vllm_msd.kernels import settle; print(k.__path__[0])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "kernels"


def test_command_line():
    listed = run_script(
        "--dry-run", "--models", "llava-1.5-7b", "--batch", "1", "8", "--nodes", "60"
    )
    lines = listed.stdout.splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[1] == "llava-1.5-7b 8 4096 60 552.9 33.2 128.6", "the target's case comes first"
    refused = run_script("--dry-run", "--nodes", "64")
    assert refused.returncode == 2 and "expected 1 to 63" in refused.stderr
    refused = run_script("--tiny")
    assert refused.returncode == 2 and "--tiny: give --out" in refused.stderr
    if not torch.cuda.is_available():
        without = run_script()
        assert without.returncode == 2 and "no CUDA device" in without.stderr

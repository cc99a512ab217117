"""What of the kernel benchmark runs without a GPU: cases, counts, the alternatives' answers, plot.

What could go wrong unnoticed: an alternative that is asked something else (another mask, keys of
another request), bytes counted twice, a summary that counts what was not measured, an alternative
that vanishes from the record.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "bench_tree_attention.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("bench_tree_attention", "tree_attention_problem", "tree_attention_rivals"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("bench_tree_attention")
    model = importlib.import_module("tree_attention_problem").Model
    monkeypatch.setitem(module.MODELS, "small", model(heads=4, kv_heads=2, head_size=64, layers=2))
    return module


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
    result[-1] += 1e-3
    assert problem.worst_error(result, rival.tree) > 2


def test_what_cannot_be_measured_is_in_the_record(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    make = bench.Problem.make
    monkeypatch.setattr(bench.Problem, "make", lambda case: make(case, "cpu", torch.float32))
    monkeypatch.setattr(bench, "replay_time", lambda calls: 1e-3)
    case = bench.Case("small", 2, 20, 7)
    right = bench.measure("ours", case, 1e9)
    assert right["microseconds"] == 1000
    assert right["share_of_copy"] == round(case.bytes / 1e-3 / 1e9, 4)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    missing = bench.measure("flashinfer", case, 1e9)
    assert missing["reason"].startswith("ModuleNotFoundError") and "microseconds" not in missing
    wrong = bench.RIVALS["sdpa, dense"]._replace(tree=False)
    monkeypatch.setitem(bench.RIVALS, "sdpa, dense", wrong)
    assert bench.measure("sdpa, dense", case, 1e9)["reason"] == "wrong result"


def sample_rows() -> list[dict]:
    rows = []
    for context in (256, 4096):
        where = {"model": "llava-1.5-7b", "batch": 8, "context": context, "nodes": 60}
        for name, time in (("ours", 10.0), ("ours, causal", 9.8), ("sdpa, dense", 8 + context)):
            row = {"name": name, **where, "bytes": 10**6 * context, "microseconds": time}
            rows.append({**row, "share_of_copy": 1 / time})
        rows.append({"name": "flashinfer", **where, "reason": "out of time"})
    rows[2]["microseconds"] = 9.0
    return rows


def test_summary(bench):
    found = bench.summary(sample_rows())
    assert found["share_of_copy_at_target"] == 0.1
    assert found["masks_cost_worst"] == pytest.approx(0.0204)
    assert (found["cases_with_alternatives"], found["fastest_in"]) == (2, 1)
    assert bench.summary([])["fastest_share"] is None


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    result = tmp_path / "result.json"
    record = {"device": "a GPU", "date": "2026-01-01", "attention": sample_rows()}
    result.write_text(json.dumps(record))
    picture = bench.plot(result)
    assert picture.suffix == ".svg" and "sdpa, dense" in picture.read_text()


def test_command_line():
    def call(*arguments):
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = call("--dry-run", "--models", "llava-1.5-7b", "--batch", "1", "8", "--nodes", "60")
    lines = listed.stdout.splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[1] == "llava-1.5-7b 8 4096 60 552.9 33.2 128.6", "the target's case comes first"
    refused = call("--dry-run", "--nodes", "64")
    assert refused.returncode == 2 and "expected 1 to 63" in refused.stderr
    if not torch.cuda.is_available():
        without = call()
        assert without.returncode == 2 and "no CUDA device" in without.stderr

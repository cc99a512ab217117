"""The benchmark of a CPU's environment: which servers it starts, and what the page says of them."""

import argparse
import os
from contextlib import contextmanager

import pytest

from benchmarks import cpu_environment as benchmark
from benchmarks.pages.serving import environment


class Example:
    """Stands in for the example that drives servers."""

    def __init__(self) -> None:
        self.started_with: list[tuple[dict, list[str]]] = []

    def write_requests(self, path, data, kinds, count):
        path.write_text("")

    @contextmanager
    def started(self, environment, port, log, command):
        self.started_with.append((environment, command))
        yield "http://there"

    def sweep(self, name, url, requests, args):
        rate = 100.0 * len(self.started_with)
        return [
            {"load": f"{n} at a time", "output_throughput": rate * n, "failed": 0}
            for n in args.concurrency
        ]


@pytest.mark.parametrize("emulated", [False, True])
def test_four_servers_and_their_page(emulated, monkeypatch):
    monkeypatch.setattr(benchmark, "emulates", lambda dtype: emulated)
    monkeypatch.setattr(benchmark, "tuned", lambda environ: {"LD_PRELOAD": "libiomp5.so"})
    example = Example()
    args = argparse.Namespace(concurrency=[1, 8], num_prompts=3, port=1)
    found = benchmark.measure(example, args)
    assert [(one["environment"], one["msd"]) for one in found] == [
        (name, msd) for name in (benchmark.PLAIN, benchmark.TUNED) for msd in (False, True)
    ]
    after = "float32" if emulated else "bfloat16"
    assert [one["dtype"] for one in found] == ["bfloat16", "bfloat16", after, after]
    for number, (given, command) in enumerate(example.started_with):
        assert ("LD_PRELOAD" in given) == (number >= 2)
        assert ("--speculative-config" in command) == (number % 2 == 1)
        assert ("--dtype" in command) == (emulated and number >= 2)
    caches = {given["VLLM_CACHE_ROOT"] for given, _ in example.started_with}
    assert len(caches) == 4, "each times its own costs"
    text = environment(
        "cpu_environment.json",
        {
            "date": "2026-01-01", "machine": {"cores": 2}, "versions": {"vllm": "0.32.0"},
            "settings": {"num_prompts": 3, "max_tokens": 9}, "servers": found,
        },
    )  # fmt: skip
    assert "| environment | dtype | drafting | 1 at a time | 8 at a time |" in text
    assert "| as it comes | bfloat16 | MSD, what pays | 200 (2.00x) | 1600 (2.00x) |" in text
    assert (
        f"| with `vllm-msd env` | {after} | MSD, what pays | 400 (1.33x) | 3200 (1.33x) |" in text
    )


def test_no_server_inherits_what_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    seen = {}
    monkeypatch.setattr(benchmark, "load_example", lambda: None)
    monkeypatch.setattr(
        benchmark,
        "measure",
        lambda *_: seen.update({k: os.environ.get(k) for k in benchmark.VARIABLES}) or [],
    )
    output = tmp_path / "new" / "result.json"
    monkeypatch.setattr("sys.argv", ["cpu_environment.py", "--output", str(output)])
    assert benchmark.main() == 0 and output.is_file()
    assert set(seen.values()) == {None}

"""The command in a result file is what a user can type again."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from vllm_msd.provenance import command_line


@pytest.mark.parametrize(
    ("module", "script", "typed"),
    [
        (None, "benchmarks/bench_demo.py", "python benchmarks/bench_demo.py"),
        (None, "/usr/bin/vllm-msd", "vllm-msd"),
        ("tests.long.soak", "tests/long/soak.py", "python -m tests.long.soak"),
        (
            "benchmarks.tree_attention.__main__",
            "benchmarks/tree_attention/__main__.py",
            "python -m benchmarks.tree_attention",
        ),
    ],
)
def test_command_line(module, script, typed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path / "a file.json")])
    assert command_line() == f"{typed} --output 'a file.json'"

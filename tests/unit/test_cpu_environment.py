"""What a shell should export before vLLM starts on a CPU, and what a server says it lacks."""

from pathlib import Path

import pytest

from vllm_msd import cpu_environment
from vllm_msd.cli.main import main
from vllm_msd.cpu_environment import RESERVED, shortcomings, tuned


@pytest.fixture
def machine(monkeypatch):
    """Two cores, with both libraries."""
    libraries = [Path("/x/libtcmalloc_minimal.so.4"), Path("/x/libiomp5.so")]
    monkeypatch.setattr(cpu_environment, "libraries", lambda: libraries)
    monkeypatch.setattr(cpu_environment, "_cores", lambda: 2)
    return libraries


def test_what_is_missing_is_exported(machine):
    found = tuned({})
    assert found["LD_PRELOAD"] == "/x/libtcmalloc_minimal.so.4:/x/libiomp5.so"
    assert found[RESERVED] == "0" and found["OMP_WAIT_POLICY"] == "PASSIVE"


def test_what_is_there_stays(machine):
    """A preloaded library keeps its place behind ours, and no variable is changed."""
    found = tuned({"LD_PRELOAD": "/y/libiomp5.so:/y/else.so", RESERVED: "1"})
    assert found["LD_PRELOAD"] == "/x/libtcmalloc_minimal.so.4:/y/libiomp5.so:/y/else.so"
    assert RESERVED not in found
    assert tuned({**tuned({}), "PATH": "/bin"}) == {}


def test_a_large_machine_spares_a_core(machine, monkeypatch):
    monkeypatch.setattr(cpu_environment, "_cores", lambda: 64)
    assert RESERVED not in tuned({})


def test_shortcomings_say_what_to_do(machine, monkeypatch):
    monkeypatch.setattr(cpu_environment, "emulates", lambda dtype: dtype == "bfloat16")
    preload, core, dtype = shortcomings({}, "bfloat16")
    assert preload.startswith("libtcmalloc_minimal.so.4 and libiomp5.so not preloaded")
    assert "one of 2 cores" in core and "--dtype float32" in dtype
    assert all("vllm-msd env" in line for line in (preload, core))
    assert shortcomings(tuned({}), "float32") == []


def test_the_command_prints_exports(machine, monkeypatch, capsys):
    for name in tuned({}):
        monkeypatch.delenv(name, raising=False)
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"export {RESERVED}=0" in lines and len(lines) == len(tuned({}))
    for line in lines:
        name, _, value = line.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, value)
    main(["env"])
    assert capsys.readouterr().out == ""

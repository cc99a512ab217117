"""What a result was measured on: date, machine, versions, command. Kept beside every figure."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vllm_msd

_PACKAGES = ("vllm", "torch", "transformers", "accelerate")


def provenance(**settings: Any) -> dict[str, Any]:
    """A table for the top of a result file; ``settings`` are the run's own, seeds among them."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


def command_line() -> str:
    """The command as a user would type it, without this machine's folders."""
    arguments = [a.replace(os.getcwd() + os.sep, "") for a in sys.argv[1:]]
    if (spec := sys.modules["__main__"].__spec__) is not None:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *arguments])
    script = Path(sys.argv[0])
    if script.suffix == ".py":
        name = script.resolve().as_posix().removeprefix(Path.cwd().as_posix() + "/")
        return shlex.join(["python", name, *arguments])
    return shlex.join([script.name, *arguments])


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it stands on."""
    found = {"python": platform.python_version(), "vllm-msd": vllm_msd.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor or GPU, cores this process may use, memory.

    Ask before an engine starts in this process: vLLM binds its threads to cores.
    """
    import torch

    facts: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        facts["cores"] = len(os.sched_getaffinity(0))
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["memory_gib"] = round(memory / 2**30)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

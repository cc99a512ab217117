"""Runs a losslessness job in a process of its own: ``run_worker("greedy", "v2", ...)``.

Model Runner V2 needs Triton's interpreter switched on before Python starts, and the wrong
acceptance rules that serve as negative controls must not reach anybody else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Seconds after which a process counts as hung: many times what it takes, as others may be at work.
HANGS = 1800
INTERPRETER = REPOSITORY / "tests" / "common" / "triton_interpreter"
JOBS = {
    "auto": "tests.common.auto_drafting:auto_drafting",
    "acceptance_counters": "tests.common.acceptance_counters:acceptance_counters",
    "chain": "tests.common.chain_identity:chain_identity",
    "count_launches": "tests.common.cuda_graphs.operations:count_launches",
    "draft_rows": "tests.common.draft_rows:draft_rows",
    "graph_answers": "tests.common.cuda_graphs.answers:graph_answers",
    "greedy": "tests.common.lossless:greedy_identity",
    "near_ties": "tests.common.near_ties:near_ties",
    "random": "tests.common.tree_identity:random_identity",
    "replayed_acceptance": "tests.common.replayed_acceptance:replayed_acceptance",
    "launches_by_batch": "tests.common.cuda_graphs.operations:launches_by_batch",
    "requests": "tests.common.request_identity:request_identity",
    "sampling": "tests.common.sampling:sampled_distribution",
    "soak": "tests.common.soak:soak",
    "step_operations": "tests.common.cuda_graphs.operations:step_operations",
    "variants": "tests.common.variants:engine_variants",
    "tree": "tests.common.tree_identity:tree_identity",
    "vocabulary": "tests.common.vocabularies:vocabulary_identity",
}


def run_worker(
    job: str,
    runner: str,
    timeout: float = HANGS,
    show_errors: bool = False,
    wiring: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Run a job of ``JOBS`` in a fresh process under the given model runner; returns its report.

    ``wiring``: arguments of `cuda_graphs.engines.gpu_wiring` for the job's engines, under ``v2``;
    None leaves them the CPU's attention.

    ``show_errors`` lets its standard error through as it comes, with the progress bars of long
    jobs.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed last.
    """
    # What is already on the path stays: it may hold another version of vLLM.
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    if runner == "v2":
        path.insert(0, str(INTERPRETER))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR" if show_errors else "WARNING",
        "HF_HUB_OFFLINE": "1",
        # One thread each, bound to no core: vLLM would bind every process to the same one, and
        # each tensor parallel rank to a NUMA node of its own.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environment.pop("TRITON_INTERPRET", None)
    if runner == "v2":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        order = json.dumps(
            {"job": job, "wiring": wiring, "arguments": {"runner": runner, **arguments}}
        )
        command = [sys.executable, "-m", "tests.common.worker", order, str(report)]
        process = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None if show_errors else subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if process.returncode or not report.exists():
            raise RuntimeError(
                f"{job} under {runner} ended with {process.returncode}:\n{process.stdout[-6000:]}"
            )
        return json.loads(report.read_text())


def engines_on(wiring: dict[str, Any] | None, runner: str) -> AbstractContextManager:
    """Where a job's engines run; interpreted kernels have stand-ins unless ``wiring`` asks."""
    if wiring is not None:
        from tests.common.cuda_graphs.engines import gpu_wiring

        return gpu_wiring(**wiring)
    if runner == "v2":
        from tests.common.cuda_graphs.fast_kernels import fast_growing

        return fast_growing()
    return nullcontext()


def main() -> None:
    """The worker: one job, given as JSON, its report written to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.common.worker")
    parser.add_argument("order", help='{"job": ..., "wiring": ..., "arguments": {...}}')
    parser.add_argument("report", type=Path, help="file to write")
    options = parser.parse_args()
    order = json.loads(options.order)
    module, _, function = JOBS[order["job"]].partition(":")
    job = getattr(importlib.import_module(module), function)
    with engines_on(order["wiring"], order["arguments"]["runner"]):
        report = job(**order["arguments"])
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()

"""Reports of worker processes by tiny pair and model runner, made when first asked for."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.common import tiny
from tests.common.worker import run_worker


def pair_reports(
    folder: Path,
    job: str,
    arguments: Callable[[str, str, tiny.TinyPair], dict[str, Any]],
    decoys: int = 0,
) -> Callable[[str, str], dict[str, Any]]:
    """A function of kind and model runner that gives the report of a `run_worker` job.

    Args:
        folder: where the pairs are built, one for each kind.
        job: of `worker.JOBS`.
        arguments: by kind, runner and pair, what the job takes besides the pair.
        decoys: of `tiny.build_pair`.
    """

    @cache
    def pair_of(kind: str) -> tiny.TinyPair:
        return tiny.build_pair(folder / kind, kind, decoys=decoys)

    @cache
    def report(kind: str, runner: str) -> dict[str, Any]:
        pair = pair_of(kind)
        of_pair = {"kind": kind, "target": pair.target, "draft": pair.draft}
        return run_worker(job, runner, **{**of_pair, **arguments(kind, runner, pair)})

    return report

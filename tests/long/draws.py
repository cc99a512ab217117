"""The chi-square tests of sampled sequences, in the numbers that the long runs want."""

import tempfile
from pathlib import Path
from typing import Any

from tests.common import small_vocabulary
from tests.common.worker import run_worker


def draws(
    runner: str,
    *,
    count: int,
    control: int,
    timeout: float,
    wide_heads: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """`tests.common.sampling.sampled_distribution` in a process of its own.

    Args:
        runner: model runner, ``v1`` or ``v2``.
        count: sequences drawn for each setting.
        control: for each setting of a wrong acceptance rule.
        timeout: seconds.
        wide_heads: the pair has heads of 64, which the tree kernel takes.
        more: further arguments of `sampled_distribution`, and of `run_worker`.
    """
    with tempfile.TemporaryDirectory() as folder:
        target, draft = small_vocabulary.build(Path(folder), wide_heads=wide_heads)
        return run_worker(
            "sampling",
            runner,
            timeout=timeout,
            show_errors=True,
            show_progress=True,
            target=target,
            draft=draft,
            draws=count,
            control_draws=control,
            **more,
        )

"""Drafts with vocabularies of their own, and how they draft and answer in real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.common.chain_identity import (
    CASES,
    Run,
    answers_of_plain_engine,
    check_case,
    engine_options,
    require_runner,
)
from tests.common.fp32_engine import acceptance, counted, running_engine
from tests.common.tree_identity import TREE_CASES
from vllm_msd.checkpoint import load_draft, save_draft, with_vocabulary


def trimmed(draft: str | Path, folder: Path, token_ids: list[int]) -> str:
    """A copy of a draft in ``folder`` that proposes these tokens alone."""
    config, state = load_draft(draft)
    return str(save_draft(folder, *with_vocabulary(config, state, torch.tensor(token_ids))))


def vocabulary_identity(
    *,
    runner: str,
    kind: str,
    target: str,
    drafts: dict[str, str],
    cases: list[str],
    ways: dict[str, dict[str, Any]],
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """Run cases without speculation, and with every draft in every way.

    Args:
        runner: ``v1`` or ``v2``.
        kind, target: of a tiny pair.
        drafts: folders by name.
        cases: of `chain_identity` and `tree_identity`.
        ways: arguments of `open_engine` by name.
        tensor_parallel_size: of the engines with drafts.

    Returns:
        by way and draft, `check_case`'s of each case, the answers themselves, and ``proposed``, all
        tokens that were drafted (on one rank).
    """
    chosen = {name: {**CASES, **TREE_CASES}[name] for name in cases}
    expected, shared = answers_of_plain_engine(target, kind, runner, chosen)
    report: dict[str, Any] = {}
    options = engine_options(kind) | {"tensor_parallel_size": tensor_parallel_size}
    for way, settings in ways.items():
        report[way] = {}
        for name, draft in drafts.items():
            with running_engine(target, draft, **{**options, **settings}) as engine:
                proposed: set[int] = set()
                if tensor_parallel_size == 1:
                    require_runner(engine, runner)
                    engine.collective_rpc(lambda worker, seen=proposed: _watch(worker, seen))
                found = {
                    case: check_case(Run(engine, kind, shared[case]), run, expected[case])
                    for case, run in chosen.items()
                }
                report[way][name] = {
                    "cases": found,
                    "proposed": sorted(proposed),
                    **counted(acceptance(engine)),
                }
    return report


def _watch(worker: Any, seen: set[int]) -> None:
    """Note every token that a worker's drafter proposes for a request."""
    runner = worker.model_runner
    drafter = getattr(runner, "speculator", None) or runner.drafter
    propose = drafter.propose

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = propose(*args, **kwargs)
        if not kwargs.get("dummy_run"):
            seen.update(tokens.flatten().tolist())
        return tokens

    drafter.propose = watched

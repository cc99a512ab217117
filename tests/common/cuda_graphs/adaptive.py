"""vLLM's adaptive verification on a CPU: with costs by a formula instead of timed steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def adaptive_verification(free_rows: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Engines inside believe that rows of a step cost nothing up to a number, and then each a lot.

    Yields what was decided, a pair for each step with drafts: how many of them are verified, and
    how many each request had.

    Args:
        free_rows: of a step.
    """
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as module

    manager, decided = module.AdaptiveVerificationManager, []
    get_num_tokens = manager.get_num_tokens

    def set_costs(self: Any, samples: Any) -> None:
        rows = [(1, 1.0), (free_rows, 1.0), (16 * free_rows, 16.0)]
        self.set_cost_curves([(1, 0.1), (64, 0.1)], _every_row(rows))

    def noted(self: Any, num_tokens: dict[str, int], drafts: dict[str, list[int]]) -> int:
        rows = get_num_tokens(self, num_tokens, drafts)
        decided.append((self._batch_budget[2], np.array([len(d) for d in drafts.values()])))
        return rows

    with (
        mock.patch.object(manager, "batches_to_profile", lambda *_: iter(())),
        mock.patch.object(manager, "set_initial_cost_curves", set_costs),
        mock.patch.object(manager, "get_num_tokens", noted),
        # Compiling it takes longer than the test.
        mock.patch.object(
            module, "_assign_draft_token_budget_compiled", module._assign_draft_token_budget
        ),
    ):
        yield decided


def _every_row(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Between its points vLLM takes the next one's cost: here a straight line."""
    sizes, costs = zip(*curve, strict=True)
    rows = range(1, sizes[-1] + 1)
    return [(n, float(np.interp(n, sizes, costs))) for n in rows]

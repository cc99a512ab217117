"""Sums over the steps between two lines of a run's log, and what they say."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_msd.training.data.plan import MULTIMODAL, DataPlan
from vllm_msd.training.losses import EPSILON

PHASES = ("data", "target", "draft")
# Sums that the objective gives by drafting step: smooth L1, nats, probability, share of rows.
FIGURES = ("regression", "cross_entropy", "acceptance", "agreement")


class Window:
    """Sums over the steps since the last line of the log."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps: list[int] = []
        self.sums = [0.0] * (len(FIGURES) * depth)
        self.loss = self.count = self.tokens = self.places = self.norm = 0.0

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a part of a step."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[name] += time.perf_counter() - started

    def add(
        self,
        step: int,
        sums: list[float],
        loss: float,
        count: float,
        tokens: float,
        places: float,
        norm: float,
    ) -> None:
        """Add a step's sums over all processes; places: of the batches, padding included."""
        self.steps.append(step)
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.loss, self.count = self.loss + loss, self.count + count
        self.tokens, self.places = self.tokens + tokens, self.places + places
        self.norm += norm

    def row(self, step: int, rate: float, plan: DataPlan) -> dict[str, Any]:
        """A line of the log: means over the rows that counted."""
        count = self.count + EPSILON
        parts = {
            name: [value / count for value in self.sums[i * self.depth : (i + 1) * self.depth]]
            for i, name in enumerate(FIGURES)
        }
        kinds = [kind for s in self.steps for kind, _ in plan.records(s)]
        return {
            "step": step,
            "loss": self.loss / count,
            **parts,
            "multimodal": sum(kind == MULTIMODAL for kind in kinds) / len(kinds),
            "learning_rate": rate,
            "gradient_norm": self.norm / len(self.steps),
            "padding": 1 - self.tokens / max(1.0, self.places),
            "tokens_per_second": self.tokens / max(1e-9, sum(self.seconds.values())),
            "seconds": {name: round(t, 4) for name, t in self.seconds.items()},
        }


def not_learning(row: dict[str, Any], vocab_size: int) -> str:
    """A warning if a line of the log is no better than guessing, else nothing.

    Args:
        row: made after the warm-up (see `Window.row`).
        vocab_size: tokens that the draft chooses from; a uniform guess costs their logarithm.
    """
    surprise, uniform = row["cross_entropy"][0], math.log(vocab_size)
    if surprise < uniform:
        return ""
    return (
        f"step {row['step']}: the draft's cross-entropy is {surprise:.2f} nats, that of a uniform "
        f"guess {uniform:.2f}: it has not learned. Try another --learning-rate (now "
        f"{row['learning_rate']:.1e}), --init random or target, --loss kl, or a smaller "
        "--regression-weight, and look at the data: are the replies such as the target gives?"
    )

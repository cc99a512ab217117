"""Training an MSD draft for a target of one's own.

    from vllm_msd.training import TrainSettings, train

    train(TrainSettings.load("run.yaml", output="drafts/mine"))

`settings` is the one table of options, `data` reads and renders conversations, `targets` runs the
frozen target, `measure` and `start` find where to begin, `engine` is the loop; `losses`,
`curriculum`, `units` and `unroll` are the mathematics.
"""

from typing import Any

from vllm_msd.training.settings import TrainSettings

__all__ = ["TrainSettings", "train"]


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a draft (see `engine.train`); importing torch waits until here."""
    from vllm_msd.training import engine

    return engine.train(settings)

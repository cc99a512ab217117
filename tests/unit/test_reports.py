"""Where a run's figures go as they come."""

import pytest

from vllm_msd.errors import ConfigError
from vllm_msd.training import curves


class Journal:
    """Stands in for the part of `Accelerator` that a tracker uses."""

    def __init__(self) -> None:
        self.told, self.trackers = [], [self]

    def init_trackers(self, project: str, config: dict) -> None:
        self.told.append((project, config))

    def log(self, values: dict, step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("end")


def test_a_tracker_gets_settings_and_one_curve_per_drafting_step():
    journal = Journal()
    tracker = curves.Tracker(journal, {"loss": "lk", "seed": 3, "text_data": ["a", "b"]})
    tracker.write({"step": 5, "loss": 1.5, "agreement": [0.5, 0.25], "lengths": {"all": 2.0}})
    tracker.close()
    values = {
        "loss": 1.5, "agreement/depth1": 0.5, "agreement/depth2": 0.25, "lengths/all": 2.0,
    }  # fmt: skip
    assert journal.told == [
        ("vllm-msd", {"loss": "lk", "seed": 3, "text_data": "['a', 'b']"}),
        (5, values),
        "end",
    ]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to: wandb is not installed"):
        curves.check_report("wandb")
    curves.check_report("none")

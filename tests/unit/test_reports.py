"""Where a run's figures go as they come."""

import pytest
from accelerate import Accelerator

from vllm_msd.errors import ConfigError
from vllm_msd.training import curves
from vllm_msd.training.settings import TRACKERS


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


@pytest.mark.parametrize("name", TRACKERS)
def test_a_real_tracker_keeps_the_curves(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # None of them may ask for a server. Trackio looks when it is imported.
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pytest.importorskip(name, reason=f"{name} is not installed")
    tracker = curves.Tracker(Accelerator(cpu=True, log_with=name), {"seed": 3, "text_data": ["a"]})
    tracker.write({"step": 5, "agreement": [0.5, 0.25], "acceptance_length": {"é | ../x": 2.0}})
    tracker.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"agreement/depth2" in kept and b"acceptance_length/_ _ ___x" in kept

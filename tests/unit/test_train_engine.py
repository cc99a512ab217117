"""The training loop: losses that no split of the work changes, and resuming after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.common import tiny
from tests.common.conversations import write_conversations
from tests.common.worker import HANGS
from vllm_msd.checkpoint import load_draft
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.training import TrainSettings
from vllm_msd.training.engine import Trainer
from vllm_msd.training.losses import draft_loss, row_distances, token_losses
from vllm_msd.training.targets import Target


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_losses_equal_the_definition(chunk):
    torch.manual_seed(0)
    head, target = torch.randn(50, 8), torch.randn(7, 8)
    predicted = torch.randn(2, 7, 8, requires_grad=True)
    surprise, agrees = token_losses(predicted, target, head, chunk)
    total = row_distances(predicted, target).mean() + 0.1 * surprise.mean()
    gradient = torch.autograd.grad(total, predicted)[0]
    wanted = [draft_loss(p, target, p @ head.T, target @ head.T, torch.ones(7)) for p in predicted]
    expected = (wanted[0].total + wanted[1].total) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected, predicted)[0], atol=1e-6)
    assert torch.equal(agrees, (predicted @ head.T).argmax(-1) == (target @ head.T).argmax(-1))


def losses(run: Path) -> list[float]:
    """The losses that a run has logged."""
    log = run / "log.jsonl"
    # A line may be there in part while another process writes.
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny target, data, and a function that trains with them and returns the losses."""
    folder = tmp_path_factory.mktemp("training")
    pair = tiny.build_pair(folder / "pair", "llava")
    text, multimodal = write_conversations(folder / "data")
    target = Target.load(pair.target, "float32")

    def run(name: str, **changes) -> list[float]:
        settings = TrainSettings(**{
            "target": pair.target, "output": str(folder / name), "text_data": [str(text)],
            "multimodal_data": [str(multimodal)], "steps": 6, "batch_size": 4, "warmup_steps": 2,
            "learning_rate": 1e-4, "precision": "no", "device": "cpu", "eval_records": 0,
            "save_every": 2, "log_every": 1, "length_pool": 2, "curriculum_epochs": 4,
            "draft_steps": 2, **changes,
        })  # fmt: skip
        Trainer(settings, target).run()
        return losses(folder / name)

    run.folder = folder
    run.expected = run("whole")
    return run


def test_training_lowers_the_loss_and_writes_a_draft(setting):
    assert len(setting.expected) == 6
    config, state = load_draft(setting.folder / "whole" / "last")
    assert config.target.architecture == "LlavaForConditionalGeneration"
    assert all(weight.isfinite().all() for weight in state.values())
    assert (setting.folder / "whole" / "curves.png").stat().st_size > 1000
    note = json.loads((setting.folder / "whole" / "best" / "provenance.json").read_text())
    assert note["settings"]["seed"] == 0
    assert len(note["data"][0]["sha256"]) == 64


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 1}, {"gradient_checkpointing": True}],
    ids=["micro-batches", "checkpointing"],
)
def test_split_of_the_work_changes_no_loss(setting, changes):
    assert setting("-".join(changes), **changes) == pytest.approx(setting.expected, rel=1e-4)


@pytest.mark.long
def test_killed_run_resumes_with_the_same_losses(setting):
    """`vllm-msd train` killed at a random step, in the middle of what it does there."""
    folder, steps = setting.folder, 40
    unbroken = setting("unbroken", steps=steps, save_every=5)
    values = json.loads((folder / "unbroken" / "run.json").read_text())["settings"]
    (folder / "killed.yaml").write_text(json.dumps(values | {"output": str(folder / "killed")}))
    command = ["train", "--config", str(folder / "killed.yaml")]
    process = subprocess.Popen([sys.executable, "-m", "vllm_msd.cli.main", *command])
    wanted = random.SystemRandom().randint(3, steps // 2)
    while len(losses(folder / "killed")) < wanted and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert wanted <= len(losses(folder / "killed")) < steps
    with pytest.raises(ConfigError, match="holds a run already"):
        setting("killed", steps=steps)
    with pytest.raises(ConfigError, match=r"learning_rate: got 0\.5, the run has 0\.0001"):
        setting("killed", steps=steps, resume=True, learning_rate=0.5)
    assert setting("killed", steps=steps, resume=True) == pytest.approx(unbroken, rel=1e-5), wanted


def test_cached_features_give_the_same_losses(setting):
    cache = {"cache_features": str(setting.folder / "cache")}
    assert setting("cold", **cache) == pytest.approx(setting.expected, rel=1e-4)
    assert setting("warm", **cache) == pytest.approx(setting.expected, rel=1e-4)
    assert list(Path(cache["cache_features"]).glob("shard-*.safetensors"))
    with pytest.raises(ConfigError, match="another max_length"):
        setting("other", max_length=100, **cache)


def test_too_many_broken_pictures_stop_the_run(setting):
    text, multimodal = write_conversations(setting.folder / "broken")
    for i in range(0, 12, 2):
        (setting.folder / "broken" / f"{i}.png").write_bytes(b"torn")
    data = {"text_data": [str(text)], "multimodal_data": [str(multimodal)]}
    with pytest.raises(DataError, match="max_bad_fraction"):
        setting("stopped", curriculum="multimodal", **data)
    assert len(setting("skipping", curriculum="multimodal", max_bad_fraction=0.5, **data)) == 6
    listed = (setting.folder / "skipping" / "skipped.jsonl").read_text().splitlines()
    assert 0 < len(listed) <= 6
    assert json.loads(listed[0])["line"] > 1


def test_two_processes_have_the_losses_of_one(setting):
    """Through the command line under torchrun, with the settings of the whole run in a file."""
    folder = setting.folder
    values = json.loads((folder / "whole" / "run.json").read_text())["settings"]
    values["output"] = str(folder / "two")
    (folder / "two.yaml").write_text(json.dumps(values))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "vllm_msd.cli.main", "train", "--config", str(folder / "two.yaml"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder / "two") == pytest.approx(setting.expected, rel=1e-4)

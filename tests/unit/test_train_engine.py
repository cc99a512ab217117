"""The training loop: losses that no split of the work changes, and resuming after a kill."""

import json
import os
import random
import shutil
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
from vllm_msd.training.losses import draft_loss, lk_weights, row_distances, token_losses
from vllm_msd.training.settings import LOSSES
from vllm_msd.training.targets import Target


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_losses_equal_the_definition(chunk):
    torch.manual_seed(0)
    head, target = torch.randn(50, 8), torch.randn(7, 8)
    predicted = torch.randn(2, 7, 8, requires_grad=True)
    tokens = token_losses(predicted, target, head, chunk=chunk)
    total = row_distances(predicted, target).mean() + 0.1 * tokens.loss.mean()
    gradient = torch.autograd.grad(total, predicted)[0]
    wanted = [draft_loss(p, target, p @ head.T, target @ head.T, torch.ones(7)) for p in predicted]
    expected = (wanted[0].total + wanted[1].total) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected, predicted)[0], atol=1e-6)


KL_WEIGHTS = [0.7, 0.2]


def full_matrix_losses(predicted, target, head, name, ids):
    """`token_losses` as its docstring puts it: the loss for autograd, and the other figures."""
    p = (target @ head.T).softmax(-1)
    choice = p.argmax(-1)
    ids = torch.arange(len(head)) if ids is None else ids
    p, logits = p[:, ids], predicted @ head[ids].T
    log_q = logits.log_softmax(-1)
    surprise, acceptance = -(p * log_q).sum(-1), torch.minimum(p, log_q.exp()).sum(-1)
    divergence = (p * (p.log() - log_q)).sum(-1)
    weight = torch.tensor(KL_WEIGHTS)[:, None]
    hybrid = weight * divergence + (1 - weight) * (1 - acceptance)
    loss = {"msd": surprise, "kl": divergence, "lk": hybrid}[name]
    return loss, surprise, acceptance, ids[logits.argmax(-1)] == choice


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("vocabulary", [None, 20], ids=["whole vocabulary", "draft vocabulary"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_autograd_on_the_full_matrix(name, vocabulary, chunk):
    torch.manual_seed(0)
    head, target = 0.7 * torch.randn(50, 8), torch.randn(7, 8)
    predicted = (target + 0.5 * torch.randn(2, 7, 8)).requires_grad_()
    ids = None if vocabulary is None else torch.randperm(50)[:vocabulary]
    found = token_losses(predicted, target, head, name, ids, chunk, KL_WEIGHTS)
    expected = full_matrix_losses(predicted, target, head, name, ids)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.allclose(got.float(), wanted.float(), atol=1e-5)
    weights = torch.rand(2, 7)
    gradient = torch.autograd.grad((weights * found.loss).sum(), predicted)[0]
    wanted = torch.autograd.grad((weights * expected[0]).sum(), predicted)[0]
    assert torch.allclose(gradient, wanted, atol=1e-5)
    assert gradient.abs().max() > 1e-2


def test_a_draft_vocabulary_of_everything_changes_nothing():
    torch.manual_seed(0)
    head, target, predicted = torch.randn(50, 8), torch.randn(7, 8), torch.randn(1, 7, 8)
    for name in LOSSES:
        whole = token_losses(predicted, target, head, name, kl_weights=[0.5])
        again = token_losses(predicted, target, head, name, torch.arange(50), kl_weights=[0.5])
        assert all(map(torch.equal, whole, again))


def test_rows_whose_token_cannot_be_drafted_do_not_count():
    target, head = torch.eye(4)[:1] * 30, torch.eye(4)  # sure of token 0
    predicted = torch.randn(1, 1, 4, requires_grad=True)
    found = token_losses(predicted, target, head, "msd", torch.tensor([2, 3]))
    assert found.loss.item() == pytest.approx(0, abs=1e-6)
    assert not found.agrees.any() and found.acceptance.item() < 1e-6


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="got 'l2', expected one of msd, kl, lk"):
        token_losses(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(5, 4), "l2")
    with pytest.raises(ValueError, match="kl_weights: got 0, expected 1"):
        token_losses(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(5, 4), "lk")


def test_lk_turns_from_kl_to_acceptance_by_the_mean_of_a_drafting_step():
    assert lk_weights([], 2) == [1, 1]
    assert lk_weights([0.0, 0.5], 2) == pytest.approx([1, 0.22313], abs=1e-5)


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
    [
        {"micro_batch_size": 1},
        {"gradient_checkpointing": True},
        {"packing": True},
        {"packing": True, "gradient_checkpointing": True},
    ],
    ids=["micro-batches", "checkpointing", "packing", "packing and checkpointing"],
)
def test_split_of_the_work_changes_no_loss(setting, changes):
    assert setting("-".join(changes), **changes) == pytest.approx(setting.expected, rel=1e-4)


def test_split_of_the_work_changes_no_lk_loss(setting):
    whole = setting("lk", loss="lk")
    assert setting("lk-micro", loss="lk", micro_batch_size=1) == pytest.approx(whole, rel=1e-4)
    assert whole != pytest.approx(setting.expected, rel=0.1)
    # What the last step accepted weighs KL in the next one, and is kept with a checkpoint.
    shutil.rmtree(max((setting.folder / "lk" / "checkpoints").iterdir()))
    assert setting("lk", loss="lk", resume=True) == pytest.approx(whole, rel=1e-6)
    row = json.loads((setting.folder / "lk" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < row["acceptance"][0] < 1 and 0 <= row["padding"] < 1


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


def in_two_processes(folder: Path, name: str, *flags: str) -> list[float]:
    """Through the command line under torchrun, with the settings of the whole run in a file."""
    values = json.loads((folder / "whole" / "run.json").read_text())["settings"]
    values |= {"output": str(folder / name), "device": "auto"}
    (folder / f"{name}.yaml").write_text(json.dumps(values))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "vllm_msd.cli.main", "train", "--config", str(folder / f"{name}.yaml"), *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder / name)


def test_two_processes_have_the_losses_of_one(setting):
    assert in_two_processes(setting.folder, "two") == pytest.approx(setting.expected, rel=1e-4)


@pytest.mark.long
def test_a_sharded_draft_has_the_losses_of_a_whole_one(setting):
    """On two processes, with micro-batches; and on from a checkpoint, to the same draft."""
    folder = setting.folder
    found = in_two_processes(folder, "sharded", "--fsdp", "--micro-batch-size", "1")
    assert found == pytest.approx(setting.expected, rel=1e-4)
    _, once = load_draft(folder / "sharded" / "last")
    _, whole = load_draft(folder / "whole" / "last")
    assert once.keys() == whole.keys()
    for name, weight in whole.items():
        # bf16, in which a draft is written, after six steps that moved it by up to 1e-4 each.
        assert torch.allclose(once[name].float(), weight.float(), rtol=2**-7, atol=1e-4), name
    shutil.rmtree(max((folder / "sharded" / "checkpoints").iterdir()))
    again = in_two_processes(folder, "sharded", "--fsdp", "--micro-batch-size", "1", "--resume")
    assert again == pytest.approx(found, rel=1e-6)
    _, resumed = load_draft(folder / "sharded" / "last")
    assert all(torch.equal(resumed[name], weight) for name, weight in once.items())
    with pytest.raises(ConfigError, match="fsdp: got one process"):
        setting("alone", fsdp=True)

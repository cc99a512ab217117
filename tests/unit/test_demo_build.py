"""`vllm-msd demo build`: the target's training; from a trained target on data, draft, figures."""

import json
import shutil

import pytest
import torch

from demo_factory.build import DRAFT_SETTINGS
from demo_factory.train_target import TargetTrainer, TargetTraining
from vllm_msd.checkpoint import load_draft
from vllm_msd.cli.main import main
from vllm_msd.demo.paths import PAIR, demo_pair
from vllm_msd.errors import CheckpointError, ConfigError


def test_a_finished_training_of_the_target_stays_as_it_is(tmp_path, capsys):
    settings = TargetTraining(str(tmp_path), max_steps=1, processes=1, batch_size=1)
    TargetTrainer(settings).run()
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    trainer = TargetTrainer(settings)
    trainer.run()
    assert "resumed at step 1" in capsys.readouterr().out
    assert trainer.step == 1 and trainer.elapsed > 0
    assert saved and all(path.read_bytes() == content for path, content in saved.items())


def test_workers_of_several_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got 4 and 2 processes"):
        TargetTraining(str(tmp_path), processes=2, workers=4)


def test_a_run_of_another_model_is_not_gone_on_with(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="of another model"):
        TargetTrainer(TargetTraining(str(tmp_path), processes=1))


@pytest.mark.long
def test_a_build_goes_on_from_its_target(tmp_path, capsys):
    shutil.copytree(demo_pair().target, tmp_path / "work" / "target" / "model")
    settings = tmp_path / "draft.yaml"
    text = DRAFT_SETTINGS.read_text().replace("steps: 2000", "steps: 2")
    settings.write_text(text.replace("batch_size: 16", "batch_size: 4"))
    options = ["--records", "6", "--per-kind", "2", "--draft-config", str(settings)]
    assert main(["demo", "build", "--output", str(tmp_path), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {name: str(tmp_path / name) for name in ("target", "draft")}
    config, _ = load_draft(tmp_path / "draft")
    assert config.target.name_or_path == "../target"
    note = json.loads((tmp_path / "draft" / "provenance.json").read_text())
    assert note["steps"] == 2 and note["settings"]["draft_steps"] == 3
    # The committed pair's files have the same keys.
    figures, committed = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, PAIR)
    )
    for table in ("accuracy", "acceptance", "acceptance_wrong_image_in_draft"):
        assert figures[table].keys() == committed[table].keys()
    old = json.loads((PAIR / "draft" / "provenance.json").read_text())
    assert old.keys() - note.keys() <= {"note"}

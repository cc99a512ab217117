"""`vllm-msd train --dry-run`: figures from configs and data files, against those of a run."""

import pytest
import torch

from tests.common import tiny
from tests.common.conversations import write_conversations
from vllm_msd.cli.main import main
from vllm_msd.training import TrainSettings, dry_run
from vllm_msd.training.initial import draft_config
from vllm_msd.training.targets import Target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    pair = tiny.build_pair(folder / "pair", "llava")
    text, multimodal = write_conversations(folder / "data", 40)
    return {
        "target": pair.target, "output": str(folder / "run"), "text_data": [str(text)],
        "multimodal_data": [str(multimodal)], "device": "cpu",
    }  # fmt: skip


def test_figures_are_those_of_the_run(place):
    settings = TrainSettings(**place, epochs=4, batch_size=4, eval_records=2, curriculum="mixed")
    found = dry_run.estimate(settings)
    target = Target.load(place["target"], "float32")
    real = sum(p.numel() for p in target.model.parameters())
    assert found["memory"]["target"] == 4 * real
    shapes = draft_config(target).weight_shapes().values()
    draft = sum(torch.Size(shape).numel() for shape in shapes)
    assert found["memory"]["draft and optimizer"] == pytest.approx(16 * draft, rel=0.02)
    assert found["records"] == {"text": 38, "multimodal": 38, "held out": 4}
    assert found["steps"] == 76
    assert found["drawn"]["text"] + found["drawn"]["multimodal"] == 76 * 4
    assert found["tokens"] == pytest.approx(76 * 4 * found["tokens_per_record"], rel=0.05)
    capped = dry_run.estimate(TrainSettings(**place, curriculum="mixed", max_length=20))
    assert capped["tokens_per_record"] == 20


def test_nothing_is_loaded_or_written(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Target, "load", lambda *_: pytest.fail("the target was loaded"))
    flags = [
        "train", "--target", place["target"], "--output", str(tmp_path / "run"), "--text-data",
        place["text_data"][0], "--multimodal-data", place["multimodal_data"][0], "--dry-run",
        "--steps", "80",
        "--device", "cpu",
    ]  # fmt: skip
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "multimodal share 0% at the start, 100% at the end" in said
    assert "GFLOP/s measured here" in said
    assert not (tmp_path / "run").exists()
    assert main([*flags[:2], str(tmp_path), *flags[3:]]) == 2
    assert "its config.json cannot be read" in capsys.readouterr().err

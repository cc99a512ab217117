"""What a user can get wrong around a run: targets, places to write to, files that are damaged."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from tests.common import tiny
from tests.common.conversations import write_conversations
from tests.common.drafts import write_published
from vllm_msd.checkpoint import load_draft
from vllm_msd.cli.main import main
from vllm_msd.errors import CheckpointError, ConfigError, StorageError
from vllm_msd.training import TrainSettings, curves
from vllm_msd.training.engine import Trainer
from vllm_msd.training.initial import draft_config
from vllm_msd.training.results import Results
from vllm_msd.training.targets import Target, complete_processor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pair and data."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.build_pair(folder / "pair", "llava")
    write_conversations(folder / "data")
    return folder


def settings(place: Path, output: Path, **changes) -> dict:
    return {
        "target": str(place / "pair" / "target"), "output": str(output),
        "text_data": [str(place / "data" / "text.jsonl")],
        "multimodal_data": [str(place / "data" / "multimodal.json")], "steps": 4, "batch_size": 2,
        "precision": "no", "device": "cpu", "eval_records": 0, "save_every": 1, "log_every": 1,
        **changes,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Curves are drawn elsewhere; here they would take most of the time."""
    monkeypatch.setattr(curves, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def run(place):
    """Trains with a target that is loaded once."""
    target = Target.load(place / "pair" / "target", "float32")

    def start(output: Path, **changes) -> dict:
        return Trainer(TrainSettings(**settings(place, output, **changes)), target).run()

    return start


def told(capsys, *arguments: str) -> str:
    """What a command says that ends with exit code 2."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "vllm-msd: error: " in error and "Traceback" not in error
    return error.partition("vllm-msd: error: ")[2]


# Targets ----------------------------------------------------------------------------------------


def edited(name: str, **changes):
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def written(name: str, content: bytes | None):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def cut(name: str):
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return change


def without_a_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if "q_proj" in name)]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


WRONG_TARGETS = {
    "another family": (edited("config.json", model_type="llava_llama"), "got a model of type 'lla"),
    "no model": (emptied, "got a model of type None|cannot be loaded"),
    "no tokenizer": (written("tokenizer.json", None), "cannot be loaded: "),
    "tokenizer of another kind": (written("tokenizer.json", b"[]"), "cannot be loaded: "),
    "cut tokenizer": (cut("tokenizer.json"), "cannot be loaded: "),
    "tokenizer not UTF-8": (written("tokenizer.json", b'"\xe9"'), "cannot be loaded: "),
    "no processor": (written("processor_config.json", None), "cannot be loaded: "),
    "processor of another kind": (written("processor_config.json", b"[]"), "cannot be loaded: "),
    "cut config": (cut("config.json"), "cannot be loaded: "),
    "no weights": (written("model.safetensors", None), "cannot be loaded: "),
    "cut weights": (cut("model.safetensors"), "cannot be loaded: "),
    "pointer": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "cannot be loaded: .*Git LFS",
    ),
    "a weight missing": (without_a_weight, "weights are missing: .*q_proj"),
    "no end": (
        lambda folder: [
            edited("generation_config.json", eos_token_id=None)(folder),
            edited("tokenizer_config.json", eos_token=None)(folder),
        ],
        "no token ends a reply",
    ),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_targets_that_are_not_what_they_say(name, place, tmp_path):
    change, message = WRONG_TARGETS[name]
    shutil.copytree(place / "pair" / "target", tmp_path / "target")
    change(tmp_path / "target")
    with pytest.raises(CheckpointError, match=message) as caught:
        Target.load(tmp_path / "target", "float32")
    assert str(tmp_path / "target") in str(caught.value) and len(str(caught.value)) < 700


def test_a_language_model_of_another_build(place):
    target = Target.load(place / "pair" / "target", "float32")
    target.text = SimpleNamespace(model_type="phi", hidden_size=8)
    with pytest.raises(CheckpointError, match=r"language model \(phi\) has no intermediate_size"):
        draft_config(target)


def test_train_and_eval_say_so_with_exit_code_2(place, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    data = str(place / "data" / "text.jsonl")
    target = ("--target", str(tmp_path / "target"))
    text = ("--curriculum", "text", "--text-data", data, "--device", "cpu")
    assert "target" in told(capsys, "train", *target, "--output", str(tmp_path / "o"), *text)
    draft = ("--draft", str(place / "pair" / "draft"))
    assert "target" in told(capsys, "eval", *target, *draft, "--data", data)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_missing_fields_of_a_processor_come_from_the_config(kind, tmp_path):
    folder = Path(tiny.build_pair(tmp_path / "pair", kind).target)
    whole, config = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    about = json.loads((folder / "processor_config.json").read_text())
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens",
             "num_image_tokens")  # fmt: skip
    left = {k: v for k, v in about.items() if k not in names}
    assert len(left) < len(about)
    (folder / "processor_config.json").write_text(json.dumps(left))
    filled = AutoProcessor.from_pretrained(folder)
    complete_processor(filled, config)
    for name in names:
        assert getattr(filled, name, None) == getattr(whole, name, None), name
    picture = [tiny.picture(kind, 0)]
    one, other = (
        p(images=picture, text=["<image> what?"], return_tensors="pt") for p in (whole, filled)
    )
    assert torch.equal(one["input_ids"], other["input_ids"])


def test_a_processor_of_another_model_is_told(place, tmp_path):
    shutil.copytree(place / "pair" / "target", tmp_path / "target")
    edited("processor_config.json", patch_size=7)(tmp_path / "target")
    target = Target.load(tmp_path / "target", "float32")
    changes = {"curriculum": "multimodal", "target": str(tmp_path / "target")}
    with pytest.raises(CheckpointError, match="other numbers of visual tokens than its model"):
        Trainer(TrainSettings(**settings(place, tmp_path / "o", **changes)), target).run()


# Places and files -------------------------------------------------------------------------------


def test_places_are_checked_before_the_target_is_loaded(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "latin.yaml").write_bytes(b"target: caf\xe9\n")
    monkeypatch.setattr(Target, "load", lambda *_: pytest.fail("loaded"))
    given = json.dumps(settings(place, tmp_path / "file"))
    (tmp_path / "run.yaml").write_text(given)
    error = told(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert "file is a file, expected a folder" in error
    for changes, message in (
        ({"cache_features": str(tmp_path / "file")}, "cache_features: .*expected a folder"),
        ({"init": str(tmp_path / "nowhere")}, "there is no such folder"),
        ({"image_root": [str(tmp_path / "nowhere")]}, "image_root: .*not a folder"),
    ):
        given = json.dumps(settings(place, tmp_path / "new", **changes))
        (tmp_path / "run.yaml").write_text(given)
        assert re.search(message, told(capsys, "train", "--config", str(tmp_path / "run.yaml")))
    assert "not UTF-8" in told(capsys, "train", "--config", str(tmp_path / "latin.yaml"))
    (tmp_path / "dates.yaml").write_text("target: 2024-99-99\n")
    assert "not valid YAML" in told(capsys, "train", "--config", str(tmp_path / "dates.yaml"))
    pair = ("--target", str(place / "pair" / "target"), "--draft", str(place / "pair" / "draft"))
    data = ("--data", str(place / "data" / "text.jsonl"))
    missing = str(tmp_path / "nowhere" / "a.json")
    assert "does not exist" in told(capsys, "eval", *pair, *data, "--json", missing)
    output = ("--output", str(tmp_path / "file"))
    assert "expected a folder" in told(capsys, "demo", "data", *output)
    write_published(tmp_path / "draft", "llava")
    error = told(capsys, "convert", str(tmp_path / "draft"), str(tmp_path / "file" / "x"))
    assert "expected a folder" in error
    with pytest.raises(SystemExit) as stop:
        main(["eval", *pair, *data, "--batch-size", "0"])
    assert stop.value.code == 2


def test_what_is_damaged_in_a_runs_folder_does_not_keep_it_from_going_on(place, run, tmp_path):
    """A cut log, a cut or missing list of records, a damaged checkpoint: the result is the same."""
    run(tmp_path / "whole")
    expected = load_draft(tmp_path / "whole" / "last")[1]
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    shutil.rmtree(broken / "last")
    shutil.rmtree(broken / "best")
    checkpoints = sorted((broken / "checkpoints").iterdir())
    assert [c.name for c in checkpoints] == ["step-00000003", "step-00000004"]
    (checkpoints[1] / "optimizer.bin").write_bytes(b"\0" * 100)
    (broken / "log.jsonl").write_text((broken / "log.jsonl").read_text()[:-20])
    (broken / "skipped.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(broken)
    figures = run(broken, resume=True)
    assert figures["steps"] == 4
    rows = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    got = load_draft(broken / "last")[1]
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (broken / "skipped.jsonl").read_text() == ""
    # Once more, when nothing is left to do: the figures are those of the last step.
    assert run(broken, resume=True)["loss"] == figures["loss"]


def test_a_run_without_a_whole_checkpoint_is_told(run, tmp_path):
    run(tmp_path / "run", steps=1)
    for path in (tmp_path / "run" / "checkpoints").glob("*/trainer.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read\. Delete"):
        run(tmp_path / "run", steps=1, resume=True)
    (tmp_path / "run" / "run.json").write_text('{"settings": 3')
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        run(tmp_path / "run", steps=1, resume=True)


def test_left_out_records_are_listed_again(place, run, tmp_path):
    """Also those that were left out because of their form, which are found when files are read."""
    shutil.copytree(place / "data", tmp_path / "data")
    with (tmp_path / "data" / "text.jsonl").open("a") as file:
        file.write('\n{"conversations": 7}')
    data = {
        "text_data": [str(tmp_path / "data" / "text.jsonl")], "max_bad_fraction": 0.5, "steps": 1,
    }  # fmt: skip
    run(tmp_path / "run", **data)
    listed = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert '"line": 13' in listed
    for content in (None, listed[:-10], listed + "\n[1]\n" + listed[:5]):
        (tmp_path / "run" / "skipped.jsonl").unlink()
        if content is not None:
            (tmp_path / "run" / "skipped.jsonl").write_text(content)
        run(tmp_path / "run", resume=True, **data)
        assert (tmp_path / "run" / "skipped.jsonl").read_text() == listed


@pytest.mark.parametrize("moment", ["log", "save"])
def test_a_full_disk_ends_a_run_that_goes_on_later(run, tmp_path, monkeypatch, moment):
    run(tmp_path / "whole")
    method = getattr(Results, moment)
    calls = []

    def full(self, *arguments):
        calls.append(moment)
        if len(calls) != 3:
            return method(self, *arguments)
        with monkeypatch.context() as limited:
            limited.setattr(self.accelerator, "save_state", _write_to_a_full_disk)
            limited.setattr(self.folder, "log", Path("/dev/full"))
            return method(self, *arguments)

    monkeypatch.setattr(Results, moment, full)
    with pytest.raises(StorageError) as caught:
        run(tmp_path / "run")
    assert "No space left on device" in str(caught.value) and "--resume" in str(caught.value)
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    expected, got = (load_draft(tmp_path / name / "last")[1] for name in ("whole", "run"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def _write_to_a_full_disk(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path("/dev/full").write_text("x")

"""Checkpoints: both layouts round trip, and every published form is read."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.common.drafts import (
    FORMS,
    LAYOUTS,
    LLAVA,
    QWEN25,
    resave,
    same_weights,
    small_draft,
    write_published,
)
from vllm_msd.checkpoint import (
    convert_draft,
    inspect_draft,
    load_draft,
    load_draft_config,
    save_draft,
)
from vllm_msd.draft import MSDDraft, TargetInfo
from vllm_msd.errors import CheckpointError


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_form_is_read(tmp_path, layout, write):
    state = write_published(tmp_path, layout, torch.bfloat16)
    (tmp_path / "pytorch_model.bin").unlink()
    write(tmp_path, state)
    assert load_draft_config(tmp_path).layer_type == {"llava": "llama"}.get(layout, "qwen2")
    config, loaded = load_draft(str(tmp_path))
    assert same_weights(loaded, state)
    assert MSDDraft.from_state_dict(config, loaded).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_keeps_weights_and_function(tmp_path, layout):
    state = write_published(tmp_path / "src", layout)
    lines = []
    config = convert_draft(tmp_path / "src", tmp_path / "dst", "org/target", progress=lines.append)
    loaded_config, loaded = load_draft(tmp_path / "dst")
    assert same_weights(loaded, state) and loaded_config == config
    assert len(lines) == len(state) + 1
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written["model_type"] == "msd" and written["target"]["name_or_path"] == "org/target"
    assert written["torch_dtype"] == "float32"  # of the weights, whatever the source says

    draft = MSDDraft.from_state_dict(config, loaded)
    x = torch.randn(2, 1, 4, 32)
    rest = (torch.tensor([[False, True, True, False]]), torch.arange(4)[None])
    assert torch.equal(draft(*x, *rest), small_draft(layout)(*x, *rest))


def test_convert_records_a_local_target(tmp_path):
    write_published(tmp_path / "src", "llava")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(LLAVA))
    beside = convert_draft(tmp_path / "src", tmp_path / "draft", tmp_path / "target").target
    expected = TargetInfo("../target", "LlavaForConditionalGeneration", 32, 48)
    assert beside == expected
    inside = convert_draft(tmp_path / "src", tmp_path / "target" / "msd", tmp_path / "target")
    assert inside.target == replace(expected, name_or_path="..")
    (tmp_path / "far").mkdir()
    far = convert_draft(tmp_path / "src", tmp_path / "far" / "draft", tmp_path / "target").target
    assert far.name_or_path == str(tmp_path / "target")

    (tmp_path / "target" / "config.json").write_text(json.dumps(QWEN25))
    with pytest.raises(CheckpointError, match="family"):
        convert_draft(tmp_path / "src", tmp_path / "other", tmp_path / "target")
    assert not (tmp_path / "other").exists()


def test_convert_overwrites_only_when_told(llava, tmp_path):
    folder, _ = llava
    convert_draft(folder, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="not empty"):
        convert_draft(folder, tmp_path / "dst")
    convert_draft(folder, tmp_path / "dst", force=True)
    with pytest.raises(CheckpointError, match="source"):
        convert_draft(folder, folder, force=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        convert_draft(folder, tmp_path / "other", target=tmp_path / "nowhere")


def test_own_format_may_leave_out_the_embedding(tmp_path):
    draft = small_draft("llava")
    state = {k: v for k, v in draft.state_dict().items() if k != "embed_tokens.weight"}
    save_draft(tmp_path, draft.config, state, {"name_or_path": "org/target"})
    config, loaded = load_draft(tmp_path)
    assert same_weights(loaded, state) and config.target.name_or_path == "org/target"
    assert not inspect_draft(tmp_path)["has_embedding"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_refuses_weights_of_another_draft(tmp_path):
    draft = small_draft("llava")
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj\.bias"):
        save_draft(tmp_path, small_draft("qwen2_vl").config, draft.state_dict())
    assert not list(tmp_path.iterdir())


def test_derived_rotary_tables_are_passed_over(llava):
    folder, state = llava
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    resave(folder, state | extra)
    assert same_weights(load_draft(folder)[1], state)
    assert [t["name"] for t in inspect_draft(folder)["tensors"] if t["ignored"]] == list(extra)


def test_hub_names(llava, monkeypatch):
    """A name that is no folder goes to the hub; a failure there is told without a traceback."""
    folder, state = llava
    monkeypatch.chdir(folder)
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "org/gone":
            raise ConnectionError("no route\nmore lines")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same_weights(load_draft("org/draft", revision="v1")[1], state)
    assert asked == [("org/draft", "v1")]
    with pytest.raises(CheckpointError, match=r"org/gone: .*\(no route\)\. Check the name"):
        load_draft_config("org/gone")


def test_inspect_describes_without_problems(llava):
    folder, state = llava
    found = inspect_draft(folder)
    assert found["problems"] == [] and found["layout"] == "llava" and found["has_embedding"]
    assert found["num_parameters"] == sum(x.numel() for x in state.values())
    assert found["bytes"] == 4 * found["num_parameters"]
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {
        k: list(v.shape) for k, v in state.items()
    }
    json.dumps(found)


def test_saved_file_is_plain_safetensors(llava, tmp_path):
    folder, state = llava
    convert_draft(folder, tmp_path / "dst")
    assert same_weights(load_file(tmp_path / "dst" / "model.safetensors"), state)

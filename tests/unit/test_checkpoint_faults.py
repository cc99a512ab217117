"""Drafts as users have them: saved buffers, no fusion bias, stray files, conversions cut short."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.common.drafts import LAYOUTS, PUBLISHED, small_draft, write_published
from vllm_msd.checkpoint import convert_draft, inspect_draft, load_draft, save_draft
from vllm_msd.checkpoint.weights import is_derived
from vllm_msd.draft import MSDDraft
from vllm_msd.errors import CheckpointError
from vllm_msd.training.evaluate import _trained_visual_rows

DERIVED = (
    "layers.0.self_attn.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "layers.0.self_attn.rotary_emb.original_inv_freq",
    "layers.0.self_attn.rotary_emb.cos_cached",
    "layers.0.self_attn.rotary_emb.sin_cached",
)


@pytest.mark.parametrize("layout", ["own", *LAYOUTS])
def test_saved_buffers_are_read_by_no_reader_and_saved_by_none(layout, tmp_path):
    state = write_published(tmp_path / "a", "llava" if layout == "own" else layout)
    if layout == "own":
        convert_draft(tmp_path / "a", tmp_path / "own")
        (tmp_path / "own").rename(tmp_path / "a" / "own")
    folder = tmp_path / "a" / "own" if layout == "own" else tmp_path / "a"
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    extra = {name: torch.ones(4) for name in DERIVED}
    save_file(state | extra, folder / "model.safetensors")
    config, loaded = load_draft(folder)
    assert loaded.keys() == state.keys()
    assert inspect_draft(folder)["problems"] == []
    save_draft(tmp_path / "saved", config, state | extra)
    assert load_draft(tmp_path / "saved")[1].keys() == state.keys()
    assert not any(t["ignored"] for t in inspect_draft(tmp_path / "saved")["tensors"])
    assert not is_derived("layers.0.rotary_emb.weight") and not is_derived("my_rotary_emb.inv_freq")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_draft_without_a_fusion_bias(layout, tmp_path):
    state = write_published(tmp_path / "a", layout)
    del state["fc.bias"]
    torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"missing: fc\.bias"):
        load_draft(tmp_path / "a")
    for bias, message in ((True, r"missing: fc\.bias"), ("no", "fc_bias: got 'no'"), (False, None)):
        (tmp_path / "a" / "config.json").write_text(json.dumps(PUBLISHED[layout] | {"bias": bias}))
        if message:
            with pytest.raises(CheckpointError, match=message):
                load_draft(tmp_path / "a")
    config = convert_draft(tmp_path / "a", tmp_path / "own")
    assert not config.fc_bias
    draft = MSDDraft.from_state_dict(*load_draft(tmp_path / "own"))
    assert draft.fc.bias is None and torch.equal(draft.fc.weight, state["fc.weight"])


def test_a_damaged_number_of_layers_is_told_at_once(tmp_path):
    write_published(tmp_path, "llava")
    config = PUBLISHED["llava"] | {"num_hidden_layers": 10**30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers: got 1000.*expected at most 256"):
        load_draft(tmp_path)


def test_other_weight_files_are_not_written_beside(tmp_path):
    draft = small_draft("llava")
    for name in ("model-1-of-2.safetensors", "model.safetensors.index.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"got {name}, which would be read"):
            save_draft(folder, draft.config, draft.state_dict())
        write_published(tmp_path / "source", "llava")
        with pytest.raises(CheckpointError, match=f"got {name}, which would be read"):
            convert_draft(tmp_path / "source", folder, force=True)


def test_a_conversion_cut_short_is_no_draft_and_starts_again(tmp_path):
    write_published(tmp_path / "a", "llava")
    convert_draft(tmp_path / "a", tmp_path / "b")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    (tmp_path / "b" / "config.json").unlink()
    (tmp_path / "b" / "config.json.partial").mkdir()
    (tmp_path / "b" / "config.json.partial" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_draft(tmp_path / "b")
    convert_draft(tmp_path / "a", tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == expected


def test_a_kill_between_weights_and_config_leaves_no_draft(tmp_path, monkeypatch):
    """Over another draft of the same shapes, where new weights would fit the old config."""
    old = replace(small_draft("llava", 1).config, rope_theta=5.0)
    save_draft(tmp_path / "b", old, small_draft("llava", 1).state_dict())
    write_published(tmp_path / "a", "llava")
    moved = os.replace

    def stopped(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        moved(source, target)

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert_draft(tmp_path / "a", tmp_path / "b", force=True)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_draft(tmp_path / "b")
    convert_draft(tmp_path / "a", tmp_path / "b")
    assert load_draft(tmp_path / "b")[0].rope_theta == 10000.0


def test_a_damaged_provenance_is_told(tmp_path):
    assert _trained_visual_rows(tmp_path) == "decoupled"
    note = tmp_path / "provenance.json"
    for content, message in (
        ("{", "cannot be read as JSON"),
        ('{"settings": {"visual_rows": "x"}}', "visual_rows: got 'x', expected one of decoupled"),
    ):
        note.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            _trained_visual_rows(tmp_path)
    note.write_text('{"settings": []}')
    assert _trained_visual_rows(tmp_path) == "decoupled"

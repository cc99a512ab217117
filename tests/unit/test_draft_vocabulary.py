"""A draft's own vocabulary in its checkpoint: written, read, shown; a wrong one refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.common.drafts import small_draft, write_published
from vllm_msd.checkpoint import (
    convert_draft,
    inspect_draft,
    load_draft,
    load_draft_config,
    load_draft_vocabulary,
    save_draft,
    with_vocabulary,
)
from vllm_msd.cli.main import main
from vllm_msd.draft import MSDDraft, TargetInfo
from vllm_msd.draft.vocabulary import offsets_of, token_ids_of
from vllm_msd.errors import CheckpointError, ConfigError

IDS = [3, 0, 7, 39]


@pytest.fixture
def folder(tmp_path):
    """A draft of 40 tokens that proposes four of them."""
    draft = small_draft("llava")
    state = {k: v for k, v in draft.state_dict().items() if k != "embed_tokens.weight"}
    return save_draft(tmp_path / "draft", *with_vocabulary(draft.config, state, torch.tensor(IDS)))


def change(folder, weights=(), **config):
    """Write other weights (None: without it) or config keys over a draft's."""
    state = load_file(folder / "model.safetensors")
    for name, x in dict(weights).items():
        state.pop(name, None)
        if x is not None:
            state[name] = x
    save_file(state, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))


def test_written_and_read(folder):
    assert load_draft_vocabulary(folder).tolist() == sorted(IDS)
    config, state = load_draft(folder)
    assert config.draft_vocab_size == 4
    # As EAGLE-3's loaders read it: what to add to the draft's own id.
    assert load_file(folder / "model.safetensors")["d2t"].tolist() == [0, 2, 5, 36]
    draft = MSDDraft.from_state_dict(config, state)
    assert draft.token_ids.tolist() == sorted(IDS)
    assert draft.to(torch.bfloat16).token_ids.tolist() == sorted(IDS)


def test_offsets_and_ids_are_each_others_inverse():
    ids = torch.randperm(50)[:20]
    assert torch.equal(token_ids_of(offsets_of(ids)), ids)


def test_a_draft_without_one(tmp_path):
    write_published(tmp_path, "llava")
    assert load_draft_vocabulary(tmp_path) is None
    assert MSDDraft(load_draft_config(tmp_path)).token_ids is None


def test_conversion_keeps_it(folder, tmp_path):
    assert convert_draft(folder, tmp_path / "copy").draft_vocab_size == 4
    assert load_draft_vocabulary(tmp_path / "copy").tolist() == sorted(IDS)


def test_inspect_shows_it(folder, capsys):
    assert inspect_draft(folder)["problems"] == []
    assert main(["inspect", str(folder)]) == 0
    assert "4 of the target's 40 tokens" in capsys.readouterr().out


def test_narrow_integers_are_read(folder):
    change(folder, {"d2t": torch.tensor([0, 2, 5, 36], dtype=torch.int32)})
    assert load_draft_vocabulary(folder).tolist() == sorted(IDS)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 5], r"d2t: got shape \(3,\), expected \(4,\)"),
        ([0, 2, 5, 37], "got the token id 40, expected 0 to 39"),
        ([-1, 2, 5, 36], "got the token id -1, expected 0 to 39"),
        ([0, -1, 5, 36], "got the token id 0 more than once"),
        ([0.0, 2.0, 5.0, 36.0], "d2t: got float32, expected one of int64, int32"),
        (None, "missing: d2t"),
    ],
)
def test_wrong_maps_are_refused(folder, capsys, offsets, message):
    change(folder, {"d2t": offsets and torch.tensor(offsets)})
    for read in (load_draft_config, load_draft, load_draft_vocabulary):
        with pytest.raises(CheckpointError, match=message):
            read(folder)
    assert main(["inspect", str(folder)]) == 2
    assert "cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, "got a draft vocabulary, but config.json has no draft_vocab_size"),
        (3, r"d2t: got shape \(4,\), expected \(3,\)"),
        (0, "draft_vocab_size: got 0, expected a positive whole number"),
        ("4", "draft_vocab_size: got '4', expected a positive whole number"),
        (41, "draft_vocab_size: got 41, expected at most 40"),
    ],
)
def test_wrong_sizes_are_refused(folder, size, message):
    change(folder, draft_vocab_size=size)
    with pytest.raises(CheckpointError, match=message):
        load_draft_config(folder)


def test_a_target_may_have_more_tokens_than_its_draft_lists(tmp_path):
    """As LLaVA-1.5 as published for Transformers."""
    draft = small_draft("llava", target=TargetInfo(vocab_size=48))
    config, state = with_vocabulary(draft.config, draft.state_dict(), torch.tensor([1, 47]))
    save_draft(tmp_path / "draft", config, state)
    assert load_draft_vocabulary(tmp_path / "draft").tolist() == [1, 47]


def test_wrong_ids_are_refused_before_they_are_written(tmp_path):
    draft = small_draft("llava")
    for ids, message in (([1, 40], "token id 40"), ([1, 1], "more than once")):
        with pytest.raises(ConfigError, match=message):
            with_vocabulary(draft.config, draft.state_dict(), torch.tensor(ids))
    config, state = with_vocabulary(draft.config, draft.state_dict(), torch.tensor([1, 2]))
    with pytest.raises(CheckpointError, match="more than once"):
        save_draft(tmp_path / "draft", config, {**state, "d2t": torch.tensor([1, 0])})

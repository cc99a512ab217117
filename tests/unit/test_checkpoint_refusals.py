"""Everything that is wrong with a checkpoint is told clearly, and nothing in it is executed."""

import json
import os
import pickle

import pytest
import torch

from tests.common.drafts import FORMS, PUBLISHED, resave, small_draft, write_published
from vllm_msd.checkpoint import convert_draft, inspect_draft, load_draft, load_draft_config
from vllm_msd.errors import CheckpointError


@pytest.mark.parametrize("name", sorted(small_draft("qwen2_vl").state_dict()))
def test_every_weight_is_missed(tmp_path, name):
    state = write_published(tmp_path, "qwen2_vl")
    del state[name]
    resave(tmp_path, state)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_draft_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": torch.ones(40, 32)}, "not expected: lm_head.weight"),
        (
            {"fc.weight": torch.ones(32, 63)},
            r"fc.weight: got shape \(32, 63\), expected \(32, 64\)",
        ),
        ({"embed_tokens.weight": torch.ones(41, 32)}, r"\(41, 32\), expected \(40, 32\)"),
        ({"fc.bias": torch.ones(32, dtype=torch.int8)}, "fc.bias: got int8, expected one of"),
    ],
)
def test_wrong_weights(llava, changes, message):
    folder, state = llava
    resave(folder, state | changes)
    with pytest.raises(CheckpointError, match=message):
        load_draft_config(folder)
    assert any(inspect_draft(folder)["problems"])


def test_weights_of_the_other_layout(tmp_path):
    write_published(tmp_path, "qwen2_vl")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llava"]))
    with pytest.raises(CheckpointError, match=r"not expected: layers\.0\.input_layernorm"):
        load_draft(tmp_path)


def test_numbers_that_are_not_finite(llava):
    folder, state = llava
    state["fc.weight"][3, 5] = float("nan")
    resave(folder, state)
    load_draft_config(folder)  # the headers are fine
    with pytest.raises(CheckpointError, match=r"fc\.weight holds NaN"):
        load_draft(folder)


class Payload:
    """Writes a file when it is unpickled by a loader that runs code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_code_in_a_pickle_is_refused_and_not_run(llava, tmp_path, zipped):
    folder, state = llava
    mark = tmp_path / "executed"
    bad = state | {"extra": Payload(mark)}
    torch.save(bad, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for read in (load_draft_config, load_draft, inspect_draft):
        with pytest.raises(CheckpointError, match="something other than tensors"):
            read(folder)
    with pytest.raises(CheckpointError, match="something other than tensors"):
        convert_draft(folder, tmp_path / "dst")
    assert not mark.exists()
    # The payload is live: a plain load would have run it.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


def test_a_plain_pickle_is_refused(llava, tmp_path):
    folder, _ = llava
    mark = tmp_path / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Payload(mark)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_draft(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"fc.weight": [1.0]},
        {"fc.weight": 3},
        {5: torch.ones(2)},
        {"fc.weight": torch.ones(32, 64).to_sparse()},
        [torch.ones(2)],
        torch.ones(2),
    ],
)
def test_pickles_with_anything_but_tensors(llava, content):
    folder, _ = llava
    resave(folder, content)
    with pytest.raises(CheckpointError, match=r"expected (a table|nothing but dense)"):
        load_draft_config(folder)


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("keep", [0, 10, 0.5, -8])
def test_files_cut_short(tmp_path, write, keep):
    state = write_published(tmp_path, "llava")
    (tmp_path / "pytorch_model.bin").unlink()
    write(tmp_path, state)
    file = max((*tmp_path.glob("*.bin"), *tmp_path.glob("*.safetensors")))
    data = file.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=file.name):
        load_draft(tmp_path)


def test_a_git_lfs_pointer(llava):
    folder, _ = llava
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_draft_config(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map"),
        ({"fc.weight": "../../secret.bin"}, "same folder"),
        ({"fc.weight": "model.safetensors"}, "expected a .bin file"),
        ({"fc.weight": "nowhere.bin"}, "nowhere.bin is missing"),
        ({"fc.weight": 3}, "expected a .bin file"),
        ({"nothing": "part.bin"}, "places nothing in part.bin"),
    ],
)
def test_bad_indexes(llava, weight_map, message):
    folder, _ = llava
    (folder / "pytorch_model.bin").rename(folder / "part.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        load_draft_config(folder)


def test_a_weight_in_two_shards(llava):
    folder, state = llava
    for part in ("a.bin", "b.bin"):
        torch.save(state, folder / part)
    (folder / "pytorch_model.bin").unlink()
    weight_map = dict.fromkeys(state, "a.bin") | {"fc.bias": "b.bin"}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="expected it once"):
        load_draft_config(folder)


def test_missing_pieces(llava, tmp_path):
    folder, _ = llava
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*found config\.json"):
        load_draft_config(folder)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "got list"), ("\udc80", "JSON")):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=message):
            load_draft_config(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(CheckpointError, match=r"config\.json: .*fields missing: hidden_size"):
        load_draft_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_draft_config(folder)
    with pytest.raises(CheckpointError, match=r"there is no such folder\. Give"):
        load_draft_config(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="got a file"):
        load_draft_config(tmp_path / "file")

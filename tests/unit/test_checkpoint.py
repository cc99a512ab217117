"""Checkpoints: both layouts round trip, and everything that is wrong with one is told clearly."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.common.drafts import LAYOUTS, PUBLISHED, small_draft, write_published
from vllm_msd.checkpoint import (
    check_draft_fits_target,
    convert_draft,
    inspect_draft,
    load_draft,
    load_draft_config,
    save_draft,
)
from vllm_msd.draft import MSDDraft, TargetInfo
from vllm_msd.errors import CheckpointError

LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {
        "model_type": "llama", "hidden_size": 32, "vocab_size": 48, "num_attention_heads": 4,
    },
}  # fmt: skip
QWEN25 = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 32,
    "vocab_size": 48,
    "num_attention_heads": 4,
}


@pytest.fixture
def llava(tmp_path):
    """A published llava draft and its weights."""
    return tmp_path / "draft", write_published(tmp_path / "draft", "llava")


def resave(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- reading and writing -------------------------------------------------------------------


def as_pickle(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def as_old_pickle(folder, state):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_safetensors(folder, state):
    save_file(state, folder / "model.safetensors")


def as_shards(folder, state, kind="pytorch_model", suffix="bin", save=torch.save):
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"{kind}-{number:05}-of-00002.{suffix}"
        save({n: state[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


def as_safetensors_shards(folder, state):
    as_shards(folder, state, "model", "safetensors", save_file)


FORMS = [as_pickle, as_old_pickle, as_safetensors, as_shards, as_safetensors_shards]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_form_is_read(tmp_path, layout, write):
    state = write_published(tmp_path, layout, torch.bfloat16)
    (tmp_path / "pytorch_model.bin").unlink()
    write(tmp_path, state)
    assert load_draft_config(tmp_path).layer_type == {"llava": "llama"}.get(layout, "qwen2")
    config, loaded = load_draft(str(tmp_path))
    assert equal(loaded, state)
    assert MSDDraft.from_state_dict(config, loaded).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_keeps_weights_and_function(tmp_path, layout):
    state = write_published(tmp_path / "src", layout)
    lines = []
    config = convert_draft(tmp_path / "src", tmp_path / "dst", "org/target", progress=lines.append)
    loaded_config, loaded = load_draft(tmp_path / "dst")
    assert equal(loaded, state) and loaded_config == config
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
    assert equal(loaded, state) and config.target.name_or_path == "org/target"
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
    assert equal(load_draft(folder)[1], state)
    assert [t["name"] for t in inspect_draft(folder)["tensors"] if t["ignored"]] == list(extra)


# ---- what is wrong with a checkpoint ---------------------------------------------------------


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
    assert equal(load_draft("org/draft", revision="v1")[1], state)
    assert asked == [("org/draft", "v1")]
    with pytest.raises(CheckpointError, match=r"org/gone: .*\(no route\)\. Check the name"):
        load_draft_config("org/gone")


# ---- fitting a target ------------------------------------------------------------------------


def test_a_target_with_more_rows_fits():
    """As LLaVA-1.5: 32064 rows in the target, 32000 in the published draft."""
    draft = replace(small_draft("llava").config, hidden_size=4096, vocab_size=32000)
    from transformers import LlavaConfig

    target = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    target.text_config.vocab_size = 32064
    check_draft_fits_target(draft, target)
    # As llava-hf publishes it: sizes that are transformers' defaults are left out.
    published = {**LLAVA, "text_config": {"model_type": "llama", "vocab_size": 32064}}
    check_draft_fits_target(draft, published)
    check_draft_fits_target(small_draft("qwen2_vl").config, QWEN25)


@pytest.mark.parametrize(
    ("layout", "changes", "target", "message"),
    [
        ("llava", {"hidden_size": 64}, LLAVA, "hidden size: got 64 .* target's 32"),
        ("llava", {"vocab_size": 49}, LLAVA, "vocabulary: got 49 .* target's 48"),
        ("llava", {}, QWEN25, "family llava, got Qwen2_5_VL"),
        ("qwen2_vl", {}, LLAVA, "family qwen2_vl, got Llava"),
        (
            "llava",
            {},
            {**LLAVA, "architectures": ["LlavaNextForConditionalGeneration"]},
            "llava, got",
        ),
        ("qwen2_vl", {}, {"model_type": "qwen3_vl"}, "family qwen2_vl, got qwen3_vl"),
        ("llava", {}, {"model_type": "llama", "hidden_size": 32}, "got llama, expected one of"),
        ("llava", {}, {"model_type": "unheard-of"}, "model that transformers knows"),
        (
            "llava",
            {"target": TargetInfo(architecture="Qwen2VLForConditionalGeneration")},
            LLAVA,
            "family qwen2_vl",
        ),
    ],
)
def test_targets_that_do_not_fit(layout, changes, target, message):
    with pytest.raises(CheckpointError, match=message):
        check_draft_fits_target(replace(small_draft(layout).config, **changes), target)


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
    assert equal(load_file(tmp_path / "dst" / "model.safetensors"), state)

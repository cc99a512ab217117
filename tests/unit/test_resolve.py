"""Which draft `msd` finds for a target, and what is said when there is none."""

import json
from pathlib import Path

import pytest

from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration import resolve


def write_config(folder: Path, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    return write_config(tmp_path / "target", model_type="llava")


@pytest.mark.parametrize("model", [None, "msd"])
@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("llava-hf/llava-1.5-7b-hf", "lucylyn/MSD-LLaVA1.5-7B"),
        ("llava-hf/llava-1.5-13b-hf", "lucylyn/MSD-LLaVA1.5-13B"),
        ("Qwen/Qwen2-VL-7B-Instruct", "lucylyn/MSD-Qwen2VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Cloudriver/MSD-Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_published_targets(name, draft, model):
    assert resolve.find_draft(name, model) == draft


def test_target_in_the_hub_cache_is_known_by_its_name(tmp_path):
    """Offline, vLLM replaces a hub name by the cached snapshot's folder."""
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123abc"
    write_config(snapshot, model_type="llava")
    assert resolve.find_draft(str(snapshot), "msd") == "lucylyn/MSD-LLaVA1.5-7B"


def test_draft_in_the_targets_folder_msd(target):
    draft = write_config(target / "msd", model_type="msd")
    assert resolve.find_draft(str(target), "msd") == str(draft)


@pytest.mark.parametrize("named", ["../elsewhere/draft", "absolute", "org/draft"])
def test_draft_named_by_the_targets_config(tmp_path, named):
    draft = write_config(tmp_path / "elsewhere" / "draft", model_type="msd")
    value = str(draft) if named == "absolute" else named
    target = write_config(tmp_path / "target", model_type="llava", msd_draft=value)
    expected = named if named == "org/draft" else str(draft)
    assert resolve.find_draft(str(target), "msd") == expected


@pytest.mark.parametrize("relative", [True, False])
def test_draft_beside_the_target_that_names_it(tmp_path, target, relative):
    path = "../target" if relative else str(target)
    draft = write_config(tmp_path / "draft", model_type="msd", target={"name_or_path": path})
    write_config(tmp_path / "other", model_type="msd", target={"name_or_path": "../another"})
    write_config(tmp_path / "plain", model_type="llama", target={"name_or_path": "../target"})
    assert resolve.find_draft(str(target), "msd") == str(draft)


def test_two_drafts_beside_the_target(tmp_path, target):
    for name in ("draft-a", "draft-b"):
        write_config(tmp_path / name, model_type="msd", target={"name_or_path": "../target"})
    with pytest.raises(ConfigError, match=r"several MSD drafts.*draft-a.*draft-b"):
        resolve.find_draft(str(target), "msd")


def test_unknown_target_lists_what_is_known_and_how_to_train():
    with pytest.raises(ConfigError) as caught:
        resolve.find_draft("org/unknown-vlm", "msd")
    message = str(caught.value)
    assert "org/unknown-vlm" in message
    for target, draft in resolve.PUBLISHED_DRAFTS.items():
        assert f"{target}: {draft}" in message
    assert "train" in message and "msd_draft" in message and "msd/" in message
    assert "If this is a copy" not in message


def test_copy_of_a_published_target_is_recognised(tmp_path):
    target = write_config(tmp_path / "llava-1.5-7b-hf", model_type="llava")
    with pytest.raises(ConfigError, match=r"copy of llava-hf/llava-1\.5-7b-hf.*MSD-LLaVA1\.5-7B"):
        resolve.find_draft(str(target), "msd")


def test_given_draft_is_taken_as_it_is(tmp_path, target):
    write_config(target / "msd", model_type="msd")
    other = write_config(tmp_path / "other", model_type="llava")
    assert resolve.find_draft(str(target), str(other)) == str(other)
    assert resolve.find_draft(str(target), "org/draft") == "org/draft"


@pytest.mark.parametrize("model", ["nonsense", "./missing", "a/b/c", "/no/such/folder"])
def test_given_draft_that_is_neither_folder_nor_hub_name(target, model):
    with pytest.raises(ConfigError, match="neither a folder nor a hub name"):
        resolve.find_draft(str(target), model)


def test_which_models_mean_msd_without_a_method(tmp_path, target):
    draft = write_config(tmp_path / "draft", model_type="msd")
    assert resolve.is_msd_draft("msd")
    assert resolve.is_msd_draft(str(draft))
    assert resolve.is_msd_draft("lucylyn/MSD-LLaVA1.5-13B")
    assert not resolve.is_msd_draft(str(target))
    assert not resolve.is_msd_draft("org/some-eagle-head")


def test_broken_config_is_named(tmp_path):
    target = write_config(tmp_path / "target")
    (target / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"target/config.json is not valid JSON"):
        resolve.find_draft(str(target), "msd")

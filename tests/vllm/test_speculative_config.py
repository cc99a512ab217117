"""From a speculative config to vLLM's own configuration, without starting an engine."""

import json
import pickle
from pathlib import Path

import pytest
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from tests.common import tiny
from tests.common.configuring import configure, msd
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError
from vllm_msd.vllm_plugin.configuration import resolve

pytestmark = pytest.mark.usefixtures("registered")
ARCHITECTURES = {
    "llava": ("EagleMsdLlamaForCausalLM", "LlamaConfig"),
    "llava_next": ("EagleMsdLlamaForCausalLM", "LlamaConfig"),
    "llava_onevision": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen2_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen2_5_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen3_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in tiny.KINDS for layout in ("draft", "msd")]
    + [(kind, "published") for kind in tiny.PUBLISHED_KINDS],
)
def test_each_layout_becomes_our_draft_class(pairs, kind, layout):
    pair = pairs[kind]
    model = "msd" if layout == "msd" else getattr(pair, layout)
    spec = configure(pair.target, {"method": "msd", "model": model})
    hf_config = spec.draft_model_config.hf_config
    architecture, class_name = ARCHITECTURES[kind]

    assert spec.method == "eagle" and spec.use_eagle()
    assert spec.model == (pair.published if layout == "published" else pair.draft)
    assert hf_config.architectures == [architecture]
    assert spec.draft_model_config.architecture == architecture
    assert type(hf_config.model).__name__ == class_name
    assert hf_config.vocab_size == spec.target_model_config.get_vocab_size()
    assert not spec.draft_model_config.uses_mrope
    draft = MSDDraftConfig.from_dict(hf_config.msd_draft)
    assert draft.hidden_size == hf_config.hidden_size == tiny.HIDDEN
    assert hf_config.rope_parameters["rope_theta"] == draft.rope_theta


def test_number_of_tokens_comes_from_the_draft_where_a_chain_is_asked_for(pair, tmp_path):
    config = json.loads((Path(pair.draft) / "config.json").read_text())
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").symlink_to(Path(pair.draft) / "model.safetensors")
    (draft / "config.json").write_text(json.dumps({**config, "num_speculative_tokens": 4}))
    request = {"method": "msd", "model": str(draft), "tree_top_k": 1}
    assert configure(pair.target, request).num_speculative_tokens == 4
    request["num_speculative_tokens"] = 2
    assert configure(pair.target, request).num_speculative_tokens == 2


def test_positions_of_a_short_draft_grow_with_the_target(pair, tmp_path):
    """Published LLaVA drafts say 2048 positions, their targets have 4096."""
    config = json.loads((Path(pair.published) / "config.json").read_text())
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(pair.published).iterdir():
        if file.name != "config.json":
            (draft / file.name).symlink_to(file)
    (draft / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    spec = configure(pair.target, {"method": "msd", "model": str(draft)})
    assert spec.draft_model_config.hf_config.max_position_embeddings == 512
    assert spec.draft_model_config.max_model_len == 512


def test_config_travels_to_a_spawned_process(pair):
    """The spawned engine unpickles it; the override is pickled by its qualified name."""
    config = EngineArgs(model=pair.target, speculative_config=msd(pair)).create_engine_config()
    copy = pickle.loads(pickle.dumps(config)).speculative_config.draft_model_config
    assert (
        copy.hf_config.msd_draft == config.speculative_config.draft_model_config.hf_config.msd_draft
    )
    assert copy.hf_overrides is not None
    override = SpeculativeConfig.hf_config_override
    assert pickle.loads(pickle.dumps(override)) is override


def test_arguments_can_be_used_twice(pair):
    args = EngineArgs(model=pair.target, speculative_config={"model": "msd"}, spec_tokens=3)
    for _ in range(2):
        spec = args.create_engine_config().speculative_config
        assert (spec.method, spec.num_speculative_tokens) == ("eagle", 3)
    assert args.speculative_config == {"model": "msd"} and args.spec_tokens == 3


def test_other_methods_are_left_alone(pair):
    spec = configure(pair.target, {"method": "ngram", "num_speculative_tokens": 2})
    assert spec.method == "ngram"
    assert configure(pair.target, None) is None


def test_hub_draft_that_cannot_be_fetched(pair, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name, **_):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"org/draft could not be fetched.*no network"):
        configure(pair.target, {"method": "msd", "model": "org/draft"})


def test_hub_draft_is_checked_in_the_cache_and_served_by_name(pair, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, **kwargs):
        calls.append((name, kwargs["revision"], kwargs["cache_dir"]))
        return pair.draft

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    draft = resolve.read_draft("org/draft", "v1", "/cache")
    assert draft.hidden_size == tiny.HIDDEN
    assert calls == [("org/draft", "v1", "/cache")]

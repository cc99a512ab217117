"""Draft configs: reading both kinds, and what is refused."""

import json

import pytest

from tests.common.drafts import LAYOUTS, PUBLISHED, small_config
from vllm_msd.draft import MSDDraft, MSDDraftConfig, TargetInfo
from vllm_msd.errors import ConfigError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_json(layout):
    target = TargetInfo("../target", "LlavaForConditionalGeneration", 32, 48)
    config = small_config(layout, target=target, num_speculative_tokens=3, rope_theta=5e5)
    text = json.dumps(config.to_dict())
    assert MSDDraftConfig.from_dict(json.loads(text)) == config
    own = json.loads(text)
    assert own["model_type"] == "msd" and own["format_version"] == 1
    # As transformers rewrites a config.
    own["dtype"] = own.pop("torch_dtype")
    assert MSDDraftConfig.from_dict(own) == config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_shapes_are_those_of_the_model(layout):
    config = small_config(layout, num_hidden_layers=2, head_dim=16, fc_bias=layout == "llava")
    state = MSDDraft(config, with_embedding=True).state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes.pop("embed_tokens.weight") == config.embedding_shape()
    assert shapes == config.weight_shapes()


def test_layouts_imply_their_conventions():
    llama, qwen = small_config("llava"), small_config("qwen2_vl")
    assert (llama.layer_type, llama.attention_bias, llama.input_norm) == ("llama", False, False)
    assert (qwen.layer_type, qwen.attention_bias, qwen.input_norm) == ("qwen2", True, True)
    assert (llama.rope_theta, qwen.rope_theta) == (1e4, 1e6)
    without = {k: v for k, v in PUBLISHED["qwen2_vl"].items() if k != "rope_theta"}
    assert MSDDraftConfig.from_dict(without).rope_theta == 1e6
    new_style = without | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert MSDDraftConfig.from_dict(new_style).rope_theta == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: got 'llama', expected one of"),
        ({"model_type": ["llava"]}, "model_type"),
        ({"hidden_size": None}, "fields missing: hidden_size"),
        ({"hidden_size": 30}, "hidden_size: got 30, expected a multiple"),
        ({"hidden_size": "32"}, "hidden_size: got '32'"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim: got 7"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: got type 'linear'"),
        ({"rope_scaling": [1]}, "expected a table"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"torch_dtype": "int8"}, "torch_dtype: got 'int8'"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_published_configs(layout, changes, message):
    with pytest.raises(ConfigError, match=message):
        MSDDraftConfig.from_dict(PUBLISHED[layout] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: got 2, this release reads 1"),
        ({"layer_type": "gpt2"}, "layer_type"),
        ({"input_norm": 1}, "input_norm: got 1"),
        ({"fc_bias": None}, "fields missing: fc_bias"),
        ({"target": "llava"}, "target: got str"),
        ({"target": {"hidden_size": "big"}}, "target.hidden_size"),
        ({"target": {"name_or_path": ""}}, "target.name_or_path"),
    ],
)
def test_bad_own_configs(changes, message):
    with pytest.raises(ConfigError, match=message):
        MSDDraftConfig.from_dict(small_config("llava").to_dict() | changes)


def test_not_a_table():
    with pytest.raises(ConfigError, match="got list"):
        MSDDraftConfig.from_dict([])

"""Widening keeps the function: logits of target (with an image) and draft, in fp32, to 1e-4.

Not covered: the speed of the widened shape, and bf16, where rounding differs with the shape.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vllm_msd.checkpoint import load_draft, save_draft
from vllm_msd.demo import paths
from vllm_msd.draft import MSDDraft, MSDDraftConfig, TargetInfo
from vllm_msd.errors import ConfigError
from vllm_msd.measure import widen
from vllm_msd.measure.inputs import Pair
from vllm_msd.measure.widen import Shape

IMAGE_TOKEN, VISUAL_TOKENS = 3, 4
BASE = Shape(32, 48, 2, 4, 2, 8)
WIDE = Shape(128, 160, 5, 16, 8, 8)


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough that a misplaced block shows, norms away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else 0.2 * noise)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """A small random pair with grouped key-value heads."""
    folder = tmp_path_factory.mktemp("pair")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=64, rms_norm_eps=1e-3, **asdict(BASE)),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=VISUAL_TOKENS,
    )
    target = LlavaForConditionalGeneration(config)
    _randomise(target, 0)
    target.save_pretrained(folder / "target")
    (folder / "target" / "tokenizer.json").write_text("{}")

    info = TargetInfo("../target", "LlavaForConditionalGeneration", 32, 64)
    draft_config = MSDDraftConfig(
        layer_type="llama",
        rms_norm_eps=1e-3,
        rope_theta=10000.0,
        vocab_size=64,
        max_position_embeddings=128,
        attention_bias=True,
        input_norm=True,
        target=info,
        **asdict(replace(BASE, num_hidden_layers=1)),
    )
    draft = MSDDraft(draft_config)
    _randomise(draft, 1)
    save_draft(folder / "draft", draft_config, draft.state_dict(), info)
    return Pair(folder / "target", folder / "draft")


@pytest.fixture(scope="module")
def wide(pair, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("wide")
    made = Pair(folder / "target", folder / "draft")
    widen.widen_target(pair.target, made.target, WIDE, torch.float32, seed=0)
    widen.widen_draft(pair.draft, made.draft, WIDE, torch.float32, seed=1)
    return made


def _target_outputs(path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last hidden states for a prompt with one image."""
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 9, *[IMAGE_TOKEN] * VISUAL_TOKENS, 20, 33, 41, 7]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    return out.logits, out.hidden_states[-1]


def test_target_logits_are_equal(pair, wide):
    logits, hidden = _target_outputs(pair.target)
    wide_logits, wide_hidden = _target_outputs(wide.target)
    assert wide_hidden.shape[-1] == WIDE.hidden_size
    assert logits.std() > 0.1, "the oracle must not be flat"
    torch.testing.assert_close(wide_logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(wide_hidden[..., :32], hidden, atol=1e-4, rtol=0)
    assert not wide_hidden[..., 32:].any(), "the padding of the residual stream must stay zero"


def test_draft_outputs_are_equal(pair, wide):
    generator = torch.Generator().manual_seed(6)
    embeds, hidden = (torch.randn(2, 7, 32, generator=generator) for _ in range(2))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    positions = torch.arange(7).expand(2, 7)
    outputs = []
    for folder in (pair.draft, wide.draft):
        config, state = load_draft(folder)
        draft = MSDDraft(config).eval()
        draft.load_state_dict(state)
        pad = (0, config.hidden_size - 32)
        inputs = [torch.nn.functional.pad(x, pad) for x in (embeds, hidden)]
        with torch.no_grad():
            outputs.append(draft(*inputs, mask, positions))
    small, large = outputs
    assert small.std() > 0.1
    torch.testing.assert_close(large[..., :32], small, atol=1e-4, rtol=0)
    assert not large[..., 32:].any()


def test_added_weights_are_random_where_they_cost_nothing(wide):
    """A zero matrix would be no honest cost on hardware that skips zeros."""
    state = load_file(wide.target / "model.safetensors")
    added = {name: w for name, w in state.items() if ".layers.4." in name}
    assert len(added) == 9
    for name, weight in added.items():
        zero = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert bool(weight.any()) != zero, name


def test_cache_is_reused_only_for_the_same_pair(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path))
    lines: list[str] = []
    first = paths.wide_pair("8M", pair=pair, report=lines.append)
    again = paths.wide_pair("8M", pair=pair, report=lines.append)
    assert first == again and len(lines) == 1
    provenance = json.loads((first.target.parent / "provenance.json").read_text())
    assert abs(provenance["parameters"] / 8e6 - 1) < 0.3
    assert provenance["dtype"] == "bfloat16"
    before = load_file(first.target / "model.safetensors")

    # A folder whose provenance does not hold what it should is made again, with equal weights.
    (first.target.parent / "provenance.json").write_text("{}")
    paths.wide_pair("8M", pair=pair, report=lines.append)
    assert len(lines) == 2
    after = load_file(first.target / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.name for p in tmp_path.iterdir()] == [first.target.parent.name], "leftovers"


@pytest.mark.parametrize(("size", "hidden"), [("350M", 1024), ("1B", 2048)])
def test_sizes(size, hidden):
    base = Shape(256, 704, 6, 4, 4, 64)
    shape = widen.choose_shape(base, widen.parse_parameters(size), 2048)
    assert shape.hidden_size == hidden
    assert shape.parameters(2048) == pytest.approx(widen.parse_parameters(size), rel=0.05)
    widen.check_widens(base, shape)


@pytest.mark.parametrize("size", ["", "many", "-3M", "0M", "1T"])
def test_bad_size_is_refused(size):
    with pytest.raises(ConfigError, match="expected a number of parameters"):
        widen.parse_parameters(size)


def test_impossible_shapes_are_refused():
    with pytest.raises(ConfigError, match="too few to hold"):
        widen.choose_shape(Shape(256, 704, 6, 4, 4, 64), 1_000_000, 2048)
    with pytest.raises(ConfigError, match="head_dim"):
        widen.check_widens(BASE, replace(WIDE, head_dim=16))
    with pytest.raises(ConfigError, match="heads per key-value head"):
        widen.check_widens(BASE, replace(WIDE, num_key_value_heads=16))

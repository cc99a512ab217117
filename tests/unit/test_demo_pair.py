"""The committed demo pair: it loads, fits, and agrees with its training data."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from demo_factory.data import encode, pixels
from demo_factory.evaluate import acceptance, replies_by_kind, with_other_images
from demo_factory.target_model import VISUAL_TOKENS
from demo_factory.world import IMAGE_KINDS, sample
from vllm_msd.checkpoint import check_draft_fits_target, load_draft
from vllm_msd.demo.paths import PAIR, demo_pair
from vllm_msd.draft import MSDDraft
from vllm_msd.training.acceptance import summary
from vllm_msd.training.targets import Target

LIMIT_MB = 25


@pytest.fixture(scope="module")
def target():
    path = demo_pair().target
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(demo_pair().target)


def test_pair_is_small_and_says_where_it_comes_from():
    size = sum(path.stat().st_size for path in PAIR.rglob("*") if path.is_file())
    assert size < LIMIT_MB * 1e6
    for part in ("target", "draft"):
        record = json.loads((PAIR / part / "provenance.json").read_text())
        assert record["command"]
        assert record["versions"]["torch"]


def test_weights_are_bfloat16_under_the_published_names():
    with safe_open(demo_pair().target / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    for prefix in (
        "vision_tower.vision_model.embeddings.",
        "multi_modal_projector.",
        "language_model.model.layers.0.",
        "language_model.lm_head.",
    ):
        assert any(name.startswith(prefix) for name in names), prefix


def test_transformers_finds_every_weight():
    _, report = LlavaForConditionalGeneration.from_pretrained(
        demo_pair().target, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("kind", ["conversation", "text"])
def test_chat_template_gives_the_ids_of_training(kind, processor):
    for seed in range(4):
        item = sample(kind, seed)
        text = processor.apply_chat_template(item.messages)
        got = processor(images=item.images or None, text=text, return_tensors="pt")
        ids, _ = encode(item, processor.tokenizer, 10**6)
        assert got["input_ids"][0].tolist() == ids
        if item.images:
            assert ids.count(processor.image_token_id) == VISUAL_TOKENS
            array = torch.frombuffer(bytearray(item.images[0].tobytes()), dtype=torch.uint8)
            ours = pixels(array.view(1, *item.images[0].size, 3))
            assert torch.allclose(got["pixel_values"], ours, atol=1e-5)
        prompt = processor.apply_chat_template(item.prompt, add_generation_prompt=True)
        assert text.startswith(prompt)
        plain = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in item.messages]
        assert processor.apply_chat_template(plain) == text.replace("<image>\n", "")


@pytest.mark.long
def test_draft_fits_and_another_image_does_not_help_it(target):
    config, state = load_draft(demo_pair().draft)
    check_draft_fits_target(config, target.config)
    assert (demo_pair().draft / config.target.name_or_path).resolve() == demo_pair().target
    draft = MSDDraft.from_state_dict(config, {k: v.float() for k, v in state.items()}).eval()
    whole = Target.load(demo_pair().target, "float32")
    replies = replies_by_kind(whole, 3, IMAGE_KINDS, max_tokens=48)
    right, wrong = (
        summary(acceptance(whole, draft, replies, seen))["all"]["acceptance_length"]
        for seen in (None, with_other_images)
    )
    assert 2.0 < right < 5.9
    # The first pair's draft hardly looks at images, so equal is what a small sample shows.
    assert wrong <= right + 0.1

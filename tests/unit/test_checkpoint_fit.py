"""Whether a draft fits its target."""

from dataclasses import replace

import pytest

from tests.common.drafts import LLAVA, QWEN25, small_draft
from vllm_msd.checkpoint import check_draft_fits_target
from vllm_msd.draft import TargetInfo
from vllm_msd.errors import CheckpointError


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
        (
            "llava",
            {"draft_vocab_size": 9, "target": TargetInfo(vocab_size=50)},
            LLAVA,
            "draft vocabulary: it was chosen among 50 tokens, and the target has 48",
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

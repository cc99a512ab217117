"""Training against the reference: padded batches, losses, gradients, curriculum and noise."""

import re

import pytest
import torch
from torch.testing import assert_close

from vllm_msd.training.curriculum import add_noise, visual_ratio
from vllm_msd.training.losses import draft_loss

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def batch_rows(training_ref, ref):
    """Arguments of the draft for the recorded batch of this draft's model."""
    model = ref.info["model"]
    ids = training_ref[f"{model}.batch.input_ids"]
    placeholder = ref.info["config"].get("image_token_id")
    visual = ids == placeholder if placeholder is not None else torch.zeros_like(ids).bool()
    for row, count in enumerate(training_ref.info["batch_image_tokens_num"][model]):
        if count and placeholder is None:
            # Ids were padded on the left to the expanded length, so the image's one id stands
            # where its last embedding is.
            last = int((ids[row] < 0).nonzero())
            visual[row, last - count + 1 : last + 1] = True
        assert int(visual[row].sum()) == count
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    embeds = training_ref[f"{model}.batch.inputs_embeds"]
    hidden = training_ref[f"{model}.batch.hidden_states"]
    mask = training_ref[f"{model}.batch.attention_mask"].bool()
    return embeds, hidden, visual, positions, mask


def recorded_drafts(training_ref, draft_references):
    """Drafts of which a training batch was recorded."""
    recorded = training_ref.matches(r"(.+)\.predict")
    drafts = [ref for ref in draft_references if ref.info["model"] in recorded]
    assert drafts
    return drafts


def test_padded_batch_forward(training_ref, draft_references):
    for ref in recorded_drafts(training_ref, draft_references):
        out = ref.draft(*batch_rows(training_ref, ref))
        assert_close(out, training_ref[f"{ref.info['model']}.predict"], **TOLERANCE)


def test_losses_and_gradients(training_ref, draft_references):
    """Both losses and every trainable parameter's gradient, in float32 throughout."""
    for ref in recorded_drafts(training_ref, draft_references):
        model = ref.info["model"]
        target = training_ref[f"{model}.batch.target"]
        mask = training_ref[f"{model}.batch.loss_mask"]
        weights = training_ref.info["loss_weights"]
        expected = training_ref.info["loss"][model]
        assert int(mask.sum()) == expected["loss_mask_sum"]
        named = {n: p for n, p in ref.draft.named_parameters() if p.requires_grad}
        assert not set(named) & set(expected["params_without_grad"])
        with torch.enable_grad():
            out = ref.draft(*batch_rows(training_ref, ref))
            loss = draft_loss(
                out, target, ref.head(out), ref.head(target), mask, weights["v_w"], weights["p_w"]
            )
            gradients = torch.autograd.grad(loss.total, list(named.values()))
        recorded = expected["pure_float32"]
        for value, name in zip(loss, ("loss", "vloss", "ploss"), strict=True):
            assert value.item() == pytest.approx(recorded[name], rel=2e-5, abs=2e-5), name
        assert set(named) == set(training_ref.matches(rf"{model}\.grad\.(.+)"))
        for name, gradient in zip(named, gradients, strict=True):
            recorded = training_ref[f"{model}.grad.{name}"]
            assert_close(
                gradient, recorded, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_curriculum(training_ref):
    ramps = dict(training_ref.info["curriculum_ratio_other_totals"])
    by_epoch = training_ref.info["curriculum_ratio_by_epoch_1based"]
    assert training_ref["curriculum_ratio"].tolist() == by_epoch
    ramps[len(by_epoch)] = by_epoch
    for total, ratios in ramps.items():
        ramp = [visual_ratio(epoch, int(total)) for epoch in range(1, len(ratios) + 1)]
        assert ramp == pytest.approx(ratios, abs=1e-12), total
    after = training_ref.info[f"curriculum_ratio_after_epoch_{len(by_epoch)}"]
    assert visual_ratio(len(by_epoch) + 1, len(by_epoch)) == after


def test_noise(training_ref):
    [described] = [v for k, v in training_ref.info["meaning"].items() if k.startswith("noise.")]
    std = float(re.search(r"std ([\d.]*\d)", described)[1])
    noisy = add_noise(training_ref["noise.input"], training_ref["noise.uniform_draw"], std)
    assert_close(noisy, training_ref["noise.output"], **TOLERANCE)

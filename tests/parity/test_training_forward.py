"""The draft's forward and backward over a padded training batch, against the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

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


def test_gradients(training_ref, draft_references):
    """Every parameter's gradient of the loss as the reference's README writes it."""
    for ref in recorded_drafts(training_ref, draft_references):
        model = ref.info["model"]
        target = training_ref[f"{model}.batch.target"]
        mask = training_ref[f"{model}.batch.loss_mask"]
        weights = training_ref.info["loss_weights"]
        named = {n: p for n, p in ref.draft.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            out = ref.draft(*batch_rows(training_ref, ref))
            regression = F.smooth_l1_loss(out, target, reduction="none").mean(-1)
            log_q = ref.head(out).log_softmax(-1)
            distill = -(ref.head(target).softmax(-1) * log_q).sum(-1)
            per_row = weights["v_w"] * regression + weights["p_w"] * distill
            loss = (per_row * mask).sum() / (mask.sum() + 1e-5)
            gradients = torch.autograd.grad(loss, list(named.values()))
        expected = training_ref.info["loss"][model]["pure_float32"]["loss"]
        assert loss.item() == pytest.approx(expected, rel=2e-5)
        assert set(named) == set(training_ref.matches(rf"{model}\.grad\.(.+)"))
        for name, gradient in zip(named, gradients, strict=True):
            recorded = training_ref[f"{model}.grad.{name}"]
            assert_close(
                gradient, recorded, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )

"""Losses, curriculum and noise against the recorded training reference."""

import pytest
import torch
from torch.testing import assert_close

from vllm_msd.training.curriculum import add_noise, visual_ratio
from vllm_msd.training.losses import draft_loss


def test_losses(training_ref, draft_references):
    checked = 0
    for ref in draft_references:
        model = ref.info["model"]
        if f"{model}.predict" not in training_ref.info["tensors"]:
            continue
        predicted = training_ref[f"{model}.predict"]
        target = training_ref[f"{model}.batch.target"]
        weights = training_ref.info["loss_weights"]
        loss = draft_loss(
            predicted,
            target,
            ref.head(predicted),
            ref.head(target),
            training_ref[f"{model}.batch.loss_mask"],
            weights["v_w"],
            weights["p_w"],
        )
        recorded = training_ref.info["loss"][model]["pure_float32"]
        assert loss.regression.item() == pytest.approx(recorded["vloss"], rel=2e-5)
        assert loss.distillation.item() == pytest.approx(recorded["ploss"], rel=2e-5)
        assert loss.total.item() == pytest.approx(recorded["loss"], rel=2e-5)
        checked += 1
    assert checked


def test_curriculum(training_ref):
    ratios = training_ref.info["curriculum_ratio_by_epoch_1based"]
    total = len(ratios)
    assert [visual_ratio(e, total) for e in range(1, total + 1)] == pytest.approx(ratios)
    after = training_ref.info[f"curriculum_ratio_after_epoch_{total}"]
    assert visual_ratio(total + 1, total) == after
    for other, expected in training_ref.info["curriculum_ratio_other_totals"].items():
        total = int(other)
        assert [visual_ratio(e, total) for e in range(1, total + 1)] == pytest.approx(expected)


def test_noise(training_ref):
    drawn = training_ref["noise.uniform_draw"]
    noisy = add_noise(training_ref["noise.input"], drawn, 0.2)
    assert_close(noisy, training_ref["noise.output"], atol=2e-5, rtol=2e-5)
    assert not torch.equal(noisy, training_ref["noise.input"])

"""A draft that `vllm-msd train` made for each served family: no token changes under it."""

import pytest

from tests.common import tiny
from tests.common.conversations import write_conversations
from tests.common.worker import run_worker
from vllm_msd.training import TrainSettings, train


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_trained_draft_is_served_losslessly(kind, tmp_path):
    pair = tiny.build_pair(tmp_path / "pair", kind)
    text, multimodal = write_conversations(tmp_path / "data")
    settings = TrainSettings(
        target=pair.target,
        output=str(tmp_path / "run"),
        text_data=[str(text)],
        multimodal_data=[str(multimodal)],
        target_dtype="float32",
        precision="no",
        device="cpu",
        steps=4,
        batch_size=4,
        warmup_steps=1,
        learning_rate=1e-4,
        curriculum_epochs=2,
        eval_records=1,
        eval_max_tokens=4,
    )
    train(settings)
    report = run_worker(
        "chain",
        "v1",
        kind=kind,
        target=pair.target,
        draft=str(tmp_path / "run" / "best"),
        cases=["mixed_batch"],
    )
    case = report["cases"]["mixed_batch"]
    assert case["same"], case["first_difference"]
    assert case["drafted"] > 0
    assert case["rejected"] > 0

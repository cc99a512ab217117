"""Training on a CUDA device that is pretended: no step mixes its tensors with the CPU's."""

import pytest
import torch

from tests.common import tiny
from tests.common.conversations import write_conversations
from tests.common.pretended_cuda import CUDA, pretended_cuda
from vllm_msd.checkpoint import load_draft
from vllm_msd.training import TrainSettings
from vllm_msd.training.engine import Trainer
from vllm_msd.training.evaluate import evaluate


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with pretended_cuda() as gpu:
        there, here = torch.arange(4.0, device="cuda"), torch.ones(4)
        assert there.device == CUDA and (there * 2)[1:].device == CUDA and gpu.holds(there + 1)
        assert here.device.type == "cpu" and there.cpu().device.type == "cpu"
        assert (there + here.to("cuda") + torch.tensor(2.0)).tolist() == [3, 4, 5, 6]
        for mixed in (
            lambda: there + here,
            lambda: here[there.long()],
            lambda: torch.stack([there, here]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        weight = torch.nn.Linear(4, 1).to("cuda")
        weight(there).sum().backward()
        assert weight.weight.grad.device == CUDA
    assert gpu.waits["to"] + gpu.waits["cpu"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_steps": 1, "visual_rows": "dropped"},
        {"packing": True, "loss": "lk", "draft_vocab": "200", "micro_batch_size": 2},
        {"cache_features": "features", "init": "random", "reference_mask": True},
    ],
    ids=["one step", "packed", "cached"],
)
def test_training_keeps_to_its_device(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    pair = tiny.build_pair(tmp_path / "pair", "llava")
    text, multimodal = write_conversations(tmp_path / "data")
    settings = TrainSettings(**{
        "target": str(pair.target), "output": str(tmp_path / "run"), "text_data": [str(text)],
        "multimodal_data": [str(multimodal)], "steps": 3, "batch_size": 4, "draft_steps": 2,
        "curriculum": "mixed", "curriculum_share": 0.0, "visual_share": 0.5, "eval_records": 2,
        "eval_max_tokens": 4, "target_dtype": "bfloat16", **changes,
    })  # fmt: skip
    with pretended_cuda() as gpu:
        trainer = Trainer(settings)
        assert trainer.device == CUDA and trainer.target.device == CUDA
        figures = trainer.run()
        parameters = list(trainer.objective.parameters())
        assert all(gpu.holds(p) for p in parameters)
    assert figures["steps"] == 3 and figures["acceptance_length"]["all"] >= 1
    _, weights = load_draft(tmp_path / "run" / "last")
    assert all(w.isfinite().all() for w in weights.values())
    assert gpu.launches["_fused_adamw_"] == 3 * 2  # two groups


@pytest.mark.parametrize("tree", [{}, {"tree_depth": 2, "tree_top_k": 2}], ids=["chain", "tree"])
def test_evaluation_keeps_to_its_device(tmp_path, monkeypatch, tree):
    pair = tiny.build_pair(tmp_path / "pair", "llava")
    _, multimodal = write_conversations(tmp_path / "data")
    asked = {
        "target": pair.target, "draft": pair.draft, "data": [str(multimodal)], "records": 3,
        "num_speculative_tokens": 4, "max_tokens": 6, "target_dtype": "float32",
        "draft_vocab": [200], **tree,
    }  # fmt: skip
    expected = evaluate(**asked, device="cpu")
    with pretended_cuda() as gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
        found = evaluate(**asked)
    assert gpu.launches["mm"] > 100
    for name in ("all", "kinds", "draft_vocab"):
        assert found[name] == expected[name]

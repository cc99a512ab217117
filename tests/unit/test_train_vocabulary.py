"""Training and evaluating drafts with a vocabulary of their own."""

import json

import pytest
import torch

from tests.common import tiny
from tests.common.conversations import write_conversations
from tests.common.drafts import small_draft
from tests.common.tiny_targets import printable_ids
from tests.common.vocabularies import trimmed
from vllm_msd.checkpoint import load_draft, load_draft_vocabulary
from vllm_msd.cli.main import main
from vllm_msd.draft import DraftRows
from vllm_msd.draft.vocabulary import offsets_of
from vllm_msd.errors import ConfigError
from vllm_msd.training import TrainSettings
from vllm_msd.training.engine import Trainer
from vllm_msd.training.losses import row_distances
from vllm_msd.training.objective import DraftObjective, LossWeights
from vllm_msd.training.targets import Target
from vllm_msd.training.vocabulary import special_ids


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny pair and data, and a function that trains for two steps and gives the draft."""
    folder = tmp_path_factory.mktemp("training")
    pair = tiny.build_pair(folder / "pair", "llava")
    text, multimodal = write_conversations(folder / "data")
    target = Target.load(pair.target, "float32")

    def run(name, **changes):
        settings = TrainSettings(**{
            "target": pair.target, "output": str(folder / name), "text_data": [str(text)],
            "multimodal_data": [str(multimodal)], "steps": 2, "batch_size": 4, "warmup_steps": 1,
            "precision": "no", "device": "cpu", "eval_records": 0, "log_every": 1, **changes,
        })  # fmt: skip
        Trainer(settings, target).run()
        return folder / name / "last"

    run.folder, run.pair, run.data, run.target = folder, pair, [text, multimodal], target
    return run


def test_the_loss_is_that_of_the_draft_s_tokens():
    draft = small_draft("llava", draft_vocab_size=9)
    ids = torch.randperm(40)[:9]
    draft.d2t.copy_(offsets_of(ids))
    hidden, head = torch.randn(2, 6, 32), torch.randn(40, 32)
    rows = DraftRows(
        torch.randn(2, 6, 32), hidden, torch.zeros(2, 6, dtype=torch.bool),
        torch.arange(6).expand(2, -1), torch.ones(2, 6, dtype=torch.bool),
    )  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, -1] = False
    weights = LossWeights()
    total, _ = DraftObjective(draft, 1, weights)(rows, hidden, mask, head)
    predicted, wanted = draft(*rows[:4])[:, :-1], hidden[:, 1:]
    regression = row_distances(predicted[None], wanted)
    law = (wanted @ head.T).softmax(-1)[..., ids]  # the target's, over its whole vocabulary
    surprise = -(law * (predicted @ head[ids].T).log_softmax(-1)).sum(-1)
    expected = weights.regression * regression.sum() + weights.distillation * surprise.sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_size_is_counted_in_the_training_data(setting):
    draft = setting("counted", draft_vocab="24")
    ids = load_draft_vocabulary(draft).tolist()
    assert len(ids) == 24
    assert set(special_ids(setting.target.renderer([], 2048), 320)) <= set(ids)
    letters = setting.target.processor.tokenizer("it is", add_special_tokens=False)["input_ids"]
    assert set(letters) <= set(ids)  # of every reply
    config, state = load_draft(draft)
    assert config.draft_vocab_size == 24 and state["d2t"].dtype == torch.int64
    assert state["fc.weight"].dtype == torch.bfloat16
    assert main(["inspect", str(draft)]) == 0


def test_a_vocabulary_is_taken_over(setting, tmp_path):
    ids = sorted(printable_ids())[:30]
    source = trimmed(setting.pair.draft, tmp_path / "source", ids)
    assert load_draft_vocabulary(setting("named", draft_vocab=source)).tolist() == ids
    assert load_draft_vocabulary(setting("go-on", init=source)).tolist() == ids
    other = trimmed(setting.pair.draft, tmp_path / "other", ids[:10])
    both = setting("both", init=source, draft_vocab=other)
    assert load_draft_vocabulary(both).tolist() == ids[:10]
    whole = setting("whole", init=setting.pair.draft)
    assert load_draft_vocabulary(whole) is None


def test_a_run_with_a_vocabulary_is_resumed(setting):
    unbroken = setting("unbroken", draft_vocab="24", steps=4)
    # A run that stops at once, after its first step.
    setting("broken", draft_vocab="24", steps=4, stop_after_minutes=1e-9)
    resumed = setting("broken", draft_vocab="24", steps=4, resume=True)
    (_, a), (_, b) = load_draft(unbroken), load_draft(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("wish", "message"),
    [("321", "draft_vocab: got 321, expected"), ("whole", "has no vocabulary of its own")],
)
def test_refusals(setting, wish, message):
    wish = setting.pair.draft if wish == "whole" else wish
    with pytest.raises(ConfigError, match=message):
        setting(f"refused-{message[:3]}", draft_vocab=wish)


def test_evaluation_predicts_what_a_size_costs(setting, tmp_path, capsys):
    files = [str(path) for path in setting.data]
    figures = tmp_path / "figures.json"
    command = ["eval", "--target", setting.pair.target, "--draft", setting.pair.draft, "--data"]
    flags = ["--records", "2", "--max-tokens", "24", "--target-dtype", "float32", "--device", "cpu"]
    sizes = ["--draft-vocab", "24", "320", "--json", str(figures)]
    assert main([*command, *files, *flags, *sizes]) == 0
    found = json.loads(figures.read_text())
    small, whole = found["draft_vocab"]
    assert found["all"]["acceptance_length"] > 1
    assert whole["size"] == 320 and whole["accepted"] == whole["covers"] == 1
    assert whole["acceptance_length"] == found["all"]["acceptance_length"]
    assert small["acceptance_length"] < whole["acceptance_length"]
    assert small["covers"] < 1
    assert "draft vocabulary" in capsys.readouterr().out
    assert main([*command, *files, *flags, "--draft-vocab", "1"]) == 2
    assert "--draft-vocab: got 1" in capsys.readouterr().err
    assert main([*command, *files, "--draft-vocab", "64", "--device", "cpu"]) == 2
    assert "every record is evaluated" in capsys.readouterr().err

"""Training starts from what is measured, so that no target's sizes matter."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo_factory.write_data import write_data
from tests.common import tiny
from tests.common.conversations import write_conversations
from vllm_msd.demo.paths import demo_pair
from vllm_msd.draft import DraftRows, MSDDraft, MSDDraftConfig
from vllm_msd.training import TrainSettings
from vllm_msd.training.engine import Trainer
from vllm_msd.training.start import Sample, fit_fusion, open_heads_for_images, quiet_branches
from vllm_msd.training.targets import Target
from vllm_msd.training.units import Units, root_mean_square
from vllm_msd.training.window import not_learning

HIDDEN, VOCAB = 32, 50


def draft_config(is_qwen: bool, layers: int = 1) -> MSDDraftConfig:
    return MSDDraftConfig(
        layer_type="qwen2" if is_qwen else "llama", hidden_size=HIDDEN, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=layers,
        rms_norm_eps=1e-5, rope_theta=1e4, vocab_size=VOCAB, max_position_embeddings=64,
        attention_bias=is_qwen, input_norm=is_qwen,
    )  # fmt: skip


def random_rows(width: int = 12, visual_size: float = 1.0) -> DraftRows:
    visual = torch.zeros(2, width).bool()
    visual[:, 2:5] = True
    embeds = torch.randn(2, width, HIDDEN)
    embeds[visual] *= visual_size
    positions = torch.arange(width).expand(2, -1)
    mask = torch.ones(2, width).bool()
    return DraftRows(embeds, torch.randn(2, width, HIDDEN), visual, positions, mask)


@pytest.mark.parametrize("is_qwen", [False, True], ids=["llama", "qwen2"])
def test_folded_weights_are_the_same_draft_in_the_targets_sizes(is_qwen):
    torch.manual_seed(0)
    config, units = draft_config(is_qwen, layers=2), Units(embeds=1 / 64, hidden=8.0)
    in_units = MSDDraft(units.config(config)).eval()
    state = units.fold(in_units.state_dict(), config)
    served = MSDDraft.from_state_dict(config, state).eval()
    again = units.unfold(state, config)
    assert all(torch.equal(again[name], x) for name, x in in_units.state_dict().items())
    rows = random_rows()
    size = torch.where(rows.visual_mask, units.hidden, units.embeds)[..., None]
    raw = rows._replace(
        token_embeds=rows.token_embeds * size, hidden_states=rows.hidden_states * units.hidden
    )
    with torch.no_grad():
        out = served(*raw)
        assert torch.allclose(out, units.hidden * in_units(*units.scaled(raw)), rtol=1e-6)
        assert not torch.allclose(out, served(*rows), rtol=0.1)


def test_units_are_powers_of_two_and_look_past_massive_rows():
    hidden = torch.full((9, HIDDEN), 5.0)
    hidden[0] = 4000.0
    assert Units.measured(torch.full((4, HIDDEN), 0.02), hidden) == Units(1 / 64, 4.0)
    assert Units.measured(torch.zeros(0, HIDDEN), torch.zeros(3, HIDDEN)) == Units(1.0, 1.0)


def linear_sample(count: int, noise: float) -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """Rows whose next hidden state is a linear map of the inputs, and a head."""
    torch.manual_seed(1)
    inputs, law = torch.randn(count, 2 * HIDDEN), torch.randn(HIDDEN, 2 * HIDDEN) / 8
    wanted = inputs @ law.T + noise * torch.randn(count, HIDDEN) + 0.5
    return Sample(random_rows(), inputs, wanted), law, 2 * torch.randn(VOCAB, HIDDEN)


def test_fusion_finds_a_linear_law():
    sample, law, head = linear_sample(400, 0.01)
    draft = MSDDraft(draft_config(False))
    assert fit_fusion(draft, sample, head) == 1e-3
    assert torch.allclose(draft.fc.weight, law, atol=0.02)
    assert torch.allclose(draft.fc.bias, torch.full((HIDDEN,), 0.5), atol=0.02)


def test_rows_that_teach_nothing_make_a_timid_start():
    sample, _, head = linear_sample(24, 0.0)
    sample.wanted = 3 * torch.randn_like(sample.wanted)
    draft = MSDDraft(draft_config(False))
    assert fit_fusion(draft, sample, head) == 1e4
    assert draft.fc.weight.abs().max() < 1e-2


def test_branches_start_small_whatever_their_weights():
    sample, _, _ = linear_sample(100, 0.1)
    draft = MSDDraft(draft_config(False)).eval()
    with torch.no_grad():
        decoder = draft.layers[0]
        decoder.self_attn.o_proj.weight *= 1e4
        decoder.mlp.down_proj.weight *= 1e-4
    quiet_branches(draft, sample)
    rows = sample.rows
    text = ~rows.visual_mask
    stream = draft.merge_branches(rows.token_embeds, rows.hidden_states, rows.visual_mask)
    added = draft(*rows) - stream
    share = root_mean_square(added[text]) / root_mean_square(stream[text])
    assert 0.1 <= share <= 0.2


def test_half_of_the_key_heads_is_opened_for_large_visual_rows():
    draft = MSDDraft(draft_config(False))
    before = draft.layers[0].self_attn.k_proj.weight.detach().clone()
    open_heads_for_images(draft, Sample(random_rows(visual_size=50.0), *torch.zeros(2, 1, 1)))
    keys = draft.layers[0].self_attn.k_proj.weight.detach()
    assert torch.allclose(keys[:8], before[:8] * 16 / 50, rtol=0.3)
    assert keys[8:].std().item() == pytest.approx(HIDDEN**-0.5 / 50, rel=0.3)


# Odd targets, one set of defaults ---------------------------------------------------------------


def odd_target(folder: Path, stream: float, hidden: float) -> Target:
    """A tiny target whose embeddings and residual stream, and hidden states, are so much larger.

    It says the same: a norm stands behind the first two, and the head makes up for the third.
    """
    pair = tiny.build_pair(folder, "llava", seed=3)
    file = Path(pair.target) / "model.safetensors"
    state = load_file(file)
    for name in state:
        is_text = name.startswith("language_model")
        if is_text and name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            state[name] *= stream
        if name.startswith("multi_modal_projector.linear_2"):
            state[name] *= min(stream, 30)
        if name == "language_model.model.norm.weight":
            state[name] *= hidden
        if name == "language_model.lm_head.weight":
            state[name] /= 4 * hidden  # less sure of itself than the pair for serving
    save_file(state, file, metadata={"format": "pt"})
    return Target.load(pair.target, "float32")


def training_curve(folder: Path, stream: float, hidden: float) -> list[tuple[float, float]]:
    """Cross-entropy and agreement of the first drafting step, every ten steps, by the defaults."""
    target = odd_target(folder, stream, hidden)
    text, multimodal = write_conversations(folder / "data", 60)
    settings = TrainSettings(
        target=target.name, output=str(folder / "run"), text_data=[str(text)],
        multimodal_data=[str(multimodal)], device="cpu", curriculum="mixed", steps=60,
        batch_size=4, eval_records=0, save_every=1000,
    )  # fmt: skip
    Trainer(settings, target).run()
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    return [(row["cross_entropy"][0], row["agreement"][0]) for row in rows]


def test_defaults_learn_whatever_the_sizes_of_the_target(tmp_path):
    """Well below the guess that all tokens are alike, and on the way to most tokens."""
    uniform = math.log(tiny.VOCAB)
    usual = training_curve(tmp_path / "usual", 1, 1)
    assert usual[-1][0] < 0.9 * usual[0][0] < 0.9 * 0.5 * uniform
    assert usual[-1][1] > usual[0][1] + 0.05
    for stream, hidden in ((600, 1), (0.02, 1), (30, 20), (1, 0.05)):
        curve = training_curve(tmp_path / f"{stream}-{hidden}", stream, hidden)
        assert curve[-1][0] < 0.6 * uniform and curve[-1][1] > 0.6, (stream, hidden, curve)
        assert curve[-1][1] > min(agreement for _, agreement in curve), (stream, hidden, curve)
        if stream == 30:  # all in proportion: the same run but for rounding
            assert curve[-1] == pytest.approx(usual[-1], rel=0.1)


@pytest.mark.long
def test_defaults_learn_on_the_demos_target(tmp_path):
    data = write_data(tmp_path / "data", 30, seed=5)
    settings = TrainSettings(
        target=str(demo_pair().target), output=str(tmp_path / "run"), device="cpu",
        text_data=[str(data["text"])], multimodal_data=[str(data["multimodal"])], batch_size=4,
        target_dtype="float32", curriculum="mixed", steps=16, log_every=4, eval_records=0,
    )  # fmt: skip
    Trainer(settings).run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    first, last = rows[0], rows[-1]
    assert max(last["cross_entropy"]) < 0.6 * math.log(2048)
    assert sum(last["cross_entropy"]) < 0.8 * sum(first["cross_entropy"])
    assert all(b > a for a, b in zip(first["agreement"], last["agreement"], strict=True))
    assert min(last["agreement"]) > 0.35


def test_a_run_that_does_not_learn_says_so(tmp_path, capsys):
    target = odd_target(tmp_path, 1, 1)
    text, _ = write_conversations(tmp_path / "data", 20)
    settings = TrainSettings(
        target=target.name, output=str(tmp_path / "run"), text_data=[str(text)], device="cpu",
        curriculum="text", steps=26, batch_size=2, log_every=4, eval_records=0, draft_steps=1,
        learning_rate=30.0, warmup_steps=2,
    )  # fmt: skip
    Trainer(settings, target).run()
    said = capsys.readouterr().err
    assert "that of a uniform guess 5.77: it has not learned. Try another --learning-rate" in said
    fine = {"step": 5, "cross_entropy": [5.0], "learning_rate": 1e-4}
    assert not_learning(fine, tiny.VOCAB) == ""
    assert "step 5" in not_learning({**fine, "cross_entropy": [5.8]}, tiny.VOCAB)

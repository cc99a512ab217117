"""Losses, curriculum and unrolled drafting by their definitions."""

import pytest
import torch

from vllm_msd.draft import DraftRows, MSDDraft, MSDDraftConfig
from vllm_msd.training.curriculum import visual_ratio
from vllm_msd.training.losses import draft_loss
from vllm_msd.training.packing import bins, pack
from vllm_msd.training.rows import drafted_rows, with_noise
from vllm_msd.training.unroll import ChainCount, replay_chains, unroll

HIDDEN = 32


@pytest.fixture
def draft():
    torch.manual_seed(0)
    config = MSDDraftConfig(
        layer_type="llama", hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_hidden_layers=1, rms_norm_eps=1e-5,
        rope_theta=10000.0, vocab_size=50, max_position_embeddings=64, attention_bias=False,
        input_norm=False,
    )  # fmt: skip
    return MSDDraft(config).eval()


def _rows(batch: int, width: int) -> DraftRows:
    torch.manual_seed(1)
    mask = torch.ones(batch, width, dtype=torch.bool)
    mask[-1, -3:] = False
    visual = torch.zeros(batch, width, dtype=torch.bool)
    visual[:, 2:5] = True
    return DraftRows(
        torch.randn(batch, width, HIDDEN),
        torch.randn(batch, width, HIDDEN),
        visual,
        torch.arange(width).expand(batch, -1),
        mask,
    )


def test_loss_ignores_masked_rows_and_averages_over_the_rest():
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    logits, wanted = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[1, 0, 0], [0, 1, 0]])
    loss = draft_loss(predicted, target, logits, wanted, mask, 1.0, 0.1)
    for changed in (predicted, logits):
        changed[0, 1] += 100.0
    same = draft_loss(predicted, target, logits, wanted, mask, 1.0, 0.1)
    assert torch.equal(loss.total, same.total)
    single = [
        draft_loss(predicted[i, j], target[i, j], logits[i, j], wanted[i, j], torch.ones(()))
        for i, j in ((0, 0), (1, 1))
    ]
    mean = sum(s.regression for s in single) / 2
    assert loss.regression.item() == pytest.approx(mean.item(), rel=1e-4)
    assert loss.total == pytest.approx((loss.regression + 0.1 * loss.distillation).item())


def test_perfect_draft_is_left_with_the_targets_entropy():
    hidden, logits = torch.randn(5, 4), torch.randn(5, 7)
    loss = draft_loss(hidden, hidden, logits, logits, torch.ones(5))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert loss.regression == 0
    assert loss.distillation.item() == pytest.approx(entropy.item(), rel=1e-4)


def test_curriculum_rises_from_text_to_images():
    ratios = [visual_ratio(epoch, 8) for epoch in range(1, 10)]
    assert ratios == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        visual_ratio(0, 8)


def test_noise_is_even_bounded_and_scaled_by_length():
    rows = _rows(2, 128)._replace(hidden_states=torch.zeros(2, 128, 64))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    noisy = with_noise(rows, torch.tensor([128, 32]), 0.2, generators).hidden_states
    for noise, length in zip(noisy, (128, 32), strict=True):
        bound = 0.2 / 2 * 512 / length
        assert 0.99 * bound < noise.abs().max() <= bound
        assert abs(noise[:length].mean().item()) < 0.03 * bound
        assert not noise[length:].any()


def test_first_step_of_a_reply_is_trained():
    #                       prompt          reply           prompt  reply
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0]]).bool()
    # Row 2 (last prompt hidden state, token 3) drafts token 4, the reply's second.
    assert drafted_rows(answer)[0].nonzero().flatten().tolist() == [2, 3, 7]


def test_unrolled_steps_equal_one_chain_at_a_time(draft):
    """Every row's chain, drafted on its own from a fresh prefix, gives the same outputs."""
    rows, steps = _rows(2, 12), 3
    with torch.no_grad():
        unrolled = unroll(draft, rows, steps)
        for start in (5, 6):  # chains that end before the padding
            prefix = DraftRows(*(t[:, : start + 1] for t in rows))
            last = draft(*prefix)[:, -1:]
            assert torch.allclose(unrolled[0][:, start], last[:, 0], atol=1e-5)
            embeds, hidden = prefix.token_embeds, prefix.hidden_states
            for step in range(1, steps):
                end = start + step
                embeds = torch.cat([embeds, rows.token_embeds[:, end : end + 1]], 1)
                hidden = torch.cat([hidden, last], 1)
                visual, position = rows.visual_mask[:, : end + 1], rows.position_ids[:, : end + 1]
                last = draft(embeds, hidden, visual, position)[:, -1:]
                assert torch.allclose(unrolled[step][:, end], last[:, 0], atol=1e-5), (start, step)


@pytest.mark.parametrize("first", [1, 4, 7])
def test_unrolling_from_a_row_on_changes_nothing_there(draft, first):
    rows = _rows(2, 12)
    with torch.no_grad():
        everywhere, late = unroll(draft, rows, 4), unroll(draft, rows, 4, first=first)
    for whole, part in zip(everywhere, late, strict=True):
        assert torch.allclose(whole[:, first:], part[:, first:], atol=1e-5)
    assert not late[-1][:, : max(0, first - 2)].any()


@pytest.mark.parametrize("steps", [1, 3])
def test_packed_records_have_the_outputs_of_padded_ones(draft, steps):
    torch.manual_seed(2)
    lengths = [12, 5, 7, 4]
    rows = _rows(4, 12)
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    rows = rows._replace(attention_mask=real, visual_mask=rows.visual_mask & real)
    mask = real & (torch.arange(12) >= 2) & (torch.arange(12) < torch.tensor(lengths)[:, None] - 1)
    packed, hidden, counted, segments = pack(rows, rows.hidden_states, mask, lengths)
    assert segments.tolist()[0] == [1] * 12
    assert segments.tolist()[1] == [1] * 7 + [2] * 5
    assert segments.tolist()[2] == [1] * 4 + [0] * 8
    assert bins(lengths, 12) == [[0], [2, 1], [3]]
    with torch.no_grad():
        padded = unroll(draft, rows, steps)
        found = unroll(draft, packed, steps, segments=segments)
        loose = unroll(draft, packed, steps)  # records that see each other
    order = torch.tensor([0, 2, 1, 3])
    for want, got in zip(padded, found, strict=True):
        assert torch.allclose(want[order][mask[order]], got[counted], atol=1e-5)
    assert torch.equal(rows.hidden_states[order][mask[order]], hidden[counted])
    assert not torch.allclose(padded[0][order][mask[order]], loose[0][counted], atol=1e-3)


def test_unrolled_gradients_are_finite_with_padding(draft):
    rows = _rows(2, 12)
    outputs = unroll(draft, rows, 3)
    sum(out[rows.attention_mask].square().mean() for out in outputs).backward()
    assert all(p.grad.isfinite().all() for p in draft.parameters())


def test_replayed_chains_count_the_bonus_token():
    # A reply at positions 3..9; row 2 pairs with its first token. Two steps.
    matches = torch.zeros(2, 12, dtype=torch.bool)
    matches[0, 2] = matches[1, 3] = True  # first chain: both accepted, emits 3 tokens
    # second chain starts at position 6: row 5 misses, emits 1; third at 7: row 6 hits, row 7 not
    matches[0, 6] = True
    count = ChainCount()
    replay_chains(matches, 3, 9, count)
    # 3 (4, 5, 6), 1 (7), then position 7: row 6 hits, emits 8 and 9.
    assert (count.verifications, count.tokens) == (3, 6)
    assert count.accepted_at == [2, 1]
    assert count.acceptance_length == 2.0

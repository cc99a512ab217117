"""The draft model: branches, batching, cache and padding, independent of any reference numbers.

Exact arithmetic is the matter of tests/parity; here results are compared with each other.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.common.drafts import LAYOUTS, small_draft
from vllm_msd.draft import DraftCache, shift

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Lengths and image spans of three prompts: two images (one at the very start), none, and one that
# ends the prompt.
LENGTHS = [13, 6, 9]
IMAGES = [[(0, 3), (6, 10)], [], [(5, 9)]]


def prompts(draft, seed=1):
    """Padded random prompts; what padding holds is noise that must not matter."""
    torch.manual_seed(seed)
    batch, width = len(LENGTHS), max(LENGTHS)
    hidden_size, vocab = draft.config.hidden_size, draft.config.vocab_size
    tokens = torch.randint(vocab, (batch, width))
    visual = torch.zeros(batch, width, dtype=torch.bool)
    for row, spans in enumerate(IMAGES):
        for start, end in spans:
            visual[row, start:end] = True
    embeds = torch.randn(batch, width, hidden_size)
    hidden = torch.randn(batch, width, hidden_size)
    return embeds, hidden, tokens, torch.randint(vocab, (batch,)), visual


def rows_of(draft, row=None):
    embeds, hidden, tokens, roots, visual = prompts(draft)
    lengths = torch.tensor(LENGTHS)
    if row is None:
        return shift(embeds, hidden, tokens, roots, visual, draft.embed_tokens, lengths)
    n = LENGTHS[row]
    one = [x[row : row + 1, :n] for x in (embeds, hidden, tokens)]
    return shift(*one, roots[row : row + 1], visual[row : row + 1, :n], draft.embed_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_pairs_each_hidden_state_with_the_next_token(layout):
    draft = small_draft(layout)
    embeds, hidden, tokens, roots, visual = prompts(draft)
    rows = rows_of(draft)
    for b, n in enumerate(LENGTHS):
        assert rows.attention_mask[b].tolist() == [j < n for j in range(max(LENGTHS))]
        for j in range(n):
            is_visual = j + 1 < n and bool(visual[b, j + 1])
            assert bool(rows.visual_mask[b, j]) == is_visual
            token = roots[b] if j + 1 == n else tokens[b, j + 1]
            expected = embeds[b, j + 1] if is_visual else draft.embed_tokens.weight[token]
            assert torch.equal(rows.token_embeds[b, j], expected)
            assert torch.equal(rows.hidden_states[b, j], hidden[b, j])
        assert rows.position_ids[b, :n].tolist() == list(range(n))


def test_shift_takes_placeholders_outside_the_table():
    draft = small_draft("llava")
    embeds, hidden, tokens, roots, visual = prompts(draft)
    placeholders = tokens.masked_fill(visual, -200)
    lengths = torch.tensor(LENGTHS)
    rows = shift(embeds, hidden, placeholders, roots, visual, draft.embed_tokens, lengths)
    assert torch.equal(rows.token_embeds, rows_of(draft).token_embeds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches(layout):
    """Text rows are fc([e; h]), visual rows the raw embedding, on all rows at once."""
    draft = small_draft(layout)
    rows = rows_of(draft)
    merged = draft.merge_branches(*rows[:3])
    fused = torch.cat([rows.token_embeds, rows.hidden_states], -1) @ draft.fc.weight.T
    fused = fused + draft.fc.bias
    text = rows.attention_mask & ~rows.visual_mask
    assert rows.visual_mask.any()
    assert_close(merged[text], fused[text], **CLOSE)
    assert torch.equal(merged[rows.visual_mask], rows.token_embeds[rows.visual_mask])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_equals_one_by_one(layout):
    draft = small_draft(layout, num_hidden_layers=2)
    with torch.no_grad():
        batched = draft(*rows_of(draft))
        for b, n in enumerate(LENGTHS):
            assert_close(batched[b : b + 1, :n], draft(*rows_of(draft, b)), **CLOSE)
    assert torch.isfinite(batched).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_visual_hidden_states_do_not_matter(layout):
    draft = small_draft(layout)
    rows = rows_of(draft)
    padding = ~rows.attention_mask[..., None]
    unread = padding | rows.visual_mask[..., None]
    changed = rows._replace(
        token_embeds=torch.where(padding, 1e3, rows.token_embeds),
        hidden_states=torch.where(unread, 1e3, rows.hidden_states),
    )
    with torch.no_grad():
        real = rows.attention_mask
        assert torch.equal(draft(*rows)[real], draft(*changed)[real])


def test_nan_hidden_states_of_images_reach_neither_output_nor_gradient():
    draft = small_draft("llava")
    rows = rows_of(draft)
    broken = rows.hidden_states.masked_fill(rows.visual_mask[..., None], float("nan"))
    out = draft(*rows._replace(hidden_states=broken))
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    trained = {n: p for n, p in draft.named_parameters() if p.requires_grad}
    assert "embed_tokens.weight" not in trained
    for name, p in trained.items():
        assert torch.isfinite(p.grad).all() and p.grad.any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_in_pieces_equals_uncached(layout):
    """Rows fed in three uneven pieces, among them one that cuts an image in two."""
    draft = small_draft(layout, num_hidden_layers=2)
    rows = rows_of(draft, 0)
    cache = DraftCache()
    with torch.no_grad():
        whole = draft(*rows)
        pieces = [
            draft(*(x[:, a:b] for x in rows), cache=cache) for a, b in ((0, 7), (7, 8), (8, 13))
        ]
    assert cache.num_columns == 13
    assert_close(torch.cat(pieces, 1), whole, **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continuing_a_padded_batch_equals_one_by_one(layout):
    """After a padded prefill each request goes on with another number of rows, twice."""
    draft = small_draft(layout)
    torch.manual_seed(3)
    cache = DraftCache()
    counts = [[2, 3, 1], [1, 1, 3]]
    with torch.no_grad():
        draft(*rows_of(draft), cache=cache)
        batched, fed = [], []
        for count in counts:
            count = torch.tensor(count)
            real = torch.arange(3) < count[:, None]
            embeds, hidden = torch.randn(2, 3, 3, draft.config.hidden_size)
            positions = cache.num_tokens()[:, None] + torch.arange(3)
            none = torch.zeros(3, 3, dtype=torch.bool)
            batched.append(draft(embeds, hidden, none, positions, real, cache))
            fed.append((embeds, hidden, none, positions))
        assert cache.num_tokens().tolist() == [16, 10, 13]
        for b in range(3):
            own = DraftCache()
            draft(*rows_of(draft, b), cache=own)
            for i, count in enumerate(counts):
                alone = draft(*(x[b : b + 1, : count[b]] for x in fed[i]), cache=own)
                assert_close(batched[i][b : b + 1, : count[b]], alone, **CLOSE)


def test_cropped_columns_leave_no_trace():
    draft = small_draft("qwen2_vl")
    rows = rows_of(draft, 0)
    cache = DraftCache()
    with torch.no_grad():
        draft(*(x[:, :9] for x in rows), cache=cache)
        before = copy.deepcopy(cache)
        first = draft(*(x[:, 9:] for x in rows), cache=cache)
        cache.crop(9)
        assert torch.equal(cache.keys[0], before.keys[0])
        assert torch.equal(cache.valid, before.valid)
        assert torch.equal(draft(*(x[:, 9:] for x in rows), cache=cache), first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_under_autocast(layout):
    draft = small_draft(layout)
    rows = rows_of(draft)
    optimizer = torch.optim.Adam((p for p in draft.parameters() if p.requires_grad), lr=1e-2)
    target = torch.randn_like(rows.hidden_states)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = draft(*rows)
        loss = (out.float() - target)[rows.attention_mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_wrong_shapes_are_named():
    draft = small_draft("llava")
    rows = rows_of(draft)
    with pytest.raises(ValueError, match=r"hidden_states: got shape \(3, 12, 32\), expected"):
        draft(*rows._replace(hidden_states=rows.hidden_states[:, 1:]))
    with pytest.raises(ValueError, match="position_ids"):
        draft(*rows._replace(position_ids=rows.position_ids[:1]))
    with pytest.raises(ValueError, match="attention_mask"):
        draft(*rows._replace(attention_mask=rows.attention_mask[:, 1:]))
    with pytest.raises(RuntimeError, match="empty"):
        DraftCache().num_tokens()

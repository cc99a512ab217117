"""The procedural world: deterministic, split by content, fit for scoring."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from demo_factory.evaluate import random_guess
from demo_factory.walks import NAMES, walk_hits, walks
from demo_factory.world import KINDS, packed, sample
from demo_factory.world.base import IMAGE_SIZE, draw_content, split_of
from demo_factory.world.charts import make_chart
from demo_factory.world.scene import make_scene
from demo_factory.world.signs import make_street
from vllm_msd.demo.paths import PAIR
from vllm_msd.demo.scoring import score, score_key

SEEDS = range(40)


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_same_sample(kind):
    for split in ("train", "test"):
        one, two = sample(kind, 3, split), sample(kind, 3, split)
        assert one.messages == two.messages
        assert one.answer_key == two.answer_key
        assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    assert sample(kind, 3, "train").messages != sample(kind, 3, "test").messages
    assert len({str(sample(kind, seed).messages) for seed in SEEDS}) > 0.9 * len(SEEDS)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_have_the_promised_form(kind):
    for seed in SEEDS:
        item = sample(kind, seed)
        assert [m["role"] for m in item.messages] == ["user", "assistant"] * (
            len(item.messages) // 2
        )
        parts = [p["type"] for m in item.messages for p in m["content"]]
        assert parts.count("image") == len(item.images) == (kind != "text")
        assert all(image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in item.images)
        if kind == "conversation":
            assert 2 <= len(item.messages) // 2 <= 4
        assert item.answer[0] == item.answer[0].upper()
        assert not any(mark in item.answer for mark in "{}[]|")


@pytest.mark.parametrize("kind", KINDS)
def test_scorer_accepts_the_answer_and_rejects_wrong_ones(kind):
    items = [sample(kind, seed) for seed in SEEDS]
    for item in items:
        assert score(item, item.answer) == 1, (item.prompt[-1], item.answer, item.answer_key)
        assert score(item, "I cannot say.") == 0
    # Other samples' answers are right no more often than chance and shared answers explain.
    others = [score(a, b.answer) for a, b in zip(items, items[1:] + items[:1], strict=True)]
    assert sum(others) / len(others) < 0.5


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "caption"])
def test_random_guess_is_a_probability(kind):
    chances = [random_guess(sample(kind, seed)) for seed in SEEDS]
    known = [c for c in chances if c is not None]
    assert all(0 < c <= 0.5 for c in known)
    assert len(known) >= 0.8 * len(chances)


def test_first_and_last_mentions():
    key = {"type": "choice", "value": "two", "options": ["one", "two"], "which": "last"}
    assert score_key(key, "One here, so two.") == 1
    assert score_key(key, "Two here, so one.") == 0
    assert score_key({**key, "which": "first"}, "Twofold, one.") == 0
    sequence = {"type": "sequence", "values": ["3", "1"], "options": ["1", "2", "3"]}
    assert score_key(sequence, "3, then 1; 3 first.") == 1
    assert score_key(sequence, "1, 3") == 0


@pytest.mark.parametrize("make", [make_scene, make_street, make_chart])
def test_no_content_is_in_both_splits(make):
    drawn = {
        split: {repr(draw_content(make, split, "a test", seed)[0]) for seed in range(300)}
        for split in ("train", "test")
    }
    assert not drawn["train"] & drawn["test"]
    for split in ("train", "test"):
        content, _ = draw_content(make, split, "a test", 0)
        assert split_of(content) == split


def test_unknown_kind_or_split_is_refused():
    with pytest.raises(ValueError, match="expected one of vqa"):
        sample("poetry", 0)
    with pytest.raises(ValueError, match="expected one of train"):
        sample("vqa", 0, "validation")


def test_captions_are_60_to_150_tokens_and_varied():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PAIR / "target")
    answers = [sample("caption", seed).answer for seed in range(200)]
    lengths = [len(tokenizer(answer)["input_ids"]) for answer in answers]
    assert min(lengths) >= 60
    assert max(lengths) <= 150
    assert len({answer.split()[0:4].__str__() for answer in answers}) > 25


def test_packed_conversations_ask_different_questions_about_one_image():
    for kind in KINDS:
        item = packed(kind, 5)
        questions = [m["content"][-1]["text"] for m in item.messages[::2]]
        assert len(questions) >= 2
        assert len(set(questions)) == len(questions)
        assert len(item.images) == (kind != "text")


def test_walks_read_the_picture_at_many_places():
    asked = walks(30, 1, "test")
    assert (
        len({str(one.messages) for one in asked}) == len({str(one.labels) for one in asked}) == 30
    )
    assert [str(one.messages) for one in asked] == [
        str(one.messages) for one in walks(30, 1, "test")
    ]
    other = {str(one.labels) for one in walks(30, 1, "train")}
    assert not other & {str(one.labels) for one in asked}
    for sort, least in enumerate((5, 5, 3)):
        for one in asked[sort::3]:
            hits = walk_hits(sort, one, one.answer)
            assert len(hits) >= least and score(one, one.answer) == 1
            assert not any(walk_hits(sort, one, "nothing"))
            assert all(hits) or NAMES[sort] != "charts"
        # A caption may walk back, and signs may be listed without their colours.
        assert any(all(walk_hits(sort, one, one.answer)) for one in asked[sort::3])

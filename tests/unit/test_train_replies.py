"""Replies exchanged in records of every spelling; all that is not a reply stays as it was."""

import json

import pytest

from vllm_msd.training.data.records import BadRecordError, parse_record
from vllm_msd.training.data.replies import parse_questions, with_replies

NEW = ["first", "second"]


def sharegpt(*turns, **more):
    names = ("human", "gpt")
    return {
        "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)]
    } | more


def said(record):
    return [
        "".join(part.get("text", "<>") for part in message["content"])
        for message in parse_record(record).messages
    ]


def test_ids_turns_and_unknown_fields_stay():
    raw = sharegpt("<image>\na", "old", "b", "older", id=7, image="x.png", source={"deep": [1]})
    raw["conversations"][1]["weight"] = 0.5
    before = json.dumps(raw)
    new = with_replies(raw, NEW)
    assert json.dumps(raw) == before
    expected = json.loads(before)
    expected["conversations"][1]["value"] = "first"
    expected["conversations"][3]["value"] = "second"
    assert new == expected


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "text", "text": "old"}]},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "older"}]},
        {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]},
        {"conversations": [
            {"from": "system", "value": "s"}, {"from": "gpt", "value": "a reply to nothing"},
            {"from": "human", "value": "a"}, {"from": "gpt", "value": ""},
            {"from": "human", "value": "b"}]},
        {"conversations": [
            {"from": "system", "value": "s"}, {"from": None, "role": "user", "content": "a"},
            {"role": "assistant", "value": "", "content": "<image> \ud83d"},
            {"from": "human", "value": "b"}, {"from": "gpt", "value": "<video>"}]},
    ],
    ids=["parts", "no replies", "leading reply", "odd replies"],
)  # fmt: skip
def test_every_spelling_is_asked_and_answered(raw):
    asked = parse_questions(raw)
    assert [message["role"] for message in asked.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert said(with_replies(raw, NEW)) == ["s", "a", "first", "b", "second"]
    assert said(with_replies(raw, NEW[:1])) == ["s", "a", "first"]


def test_replies_that_were_cut_are_marked():
    """And the mark of an older reply goes with it."""
    raw = sharegpt("a", "old", "b")
    raw["conversations"][1]["cut"] = True
    new = with_replies(raw, NEW, [1])
    assert [turn.get("cut") for turn in new["conversations"]] == [None, None, None, True]
    assert [m.get("cut") for m in parse_record(new).messages] == [None, None, None, True]


def parts(*sources):
    return [{"type": "image_url", "image_url": {"url": s}} for s in sources]


SHORTENED = {
    "places in the text": (sharegpt("<image>a", "", "<image>b", image=["x", "y"]), ["x"]),
    "places at its end": (
        sharegpt("a<image><image>", "", "b<image>", images=list("xyz")), ["x", "y"]),
    "without places": (sharegpt("a", "", "b", image=["x", "y"]), ["x", "y"]),
    "later only": (sharegpt("a", "", "<image>b", image="x"), []),
    "parts that name them": (
        {"messages": [{"role": "user", "content": parts("x")}, {"role": "assistant"},
                      {"role": "user", "content": parts("y")}]}, ["x"]),
    "said twice": (
        {"messages": [{"role": "user", "content": parts("x")}, {"role": "assistant"},
                      {"role": "user", "content": parts("y")}], "images": ["x", "y"]}, ["x"]),
    "named and open": (
        {"messages": [{"role": "user", "content": [*parts("x"), {"type": "image"}]},
                      {"role": "assistant"}, {"role": "user", "content": "<image>"}],
         "image": ["y", "z"]}, ["x", "y"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORTENED)
def test_a_shorter_talk_keeps_the_images_of_its_own_turns(name):
    raw, kept = SHORTENED[name]
    whole = parse_record(with_replies(raw, NEW))
    assert whole.images == parse_questions(raw).images
    short = parse_record(with_replies(raw, NEW[:1]))
    assert short.images == kept
    assert short.messages[:1] == whole.messages[:1]
    assert len(short.messages) == 2


@pytest.mark.parametrize("reply", ["", " ", "<image>", "\ud83d"])
def test_a_reply_that_no_record_can_hold_is_refused(reply):
    for raw in (sharegpt("a", "b"), sharegpt("<image>a", "b", image="x")):
        with pytest.raises(BadRecordError, match=r"reply|half"):
            with_replies(raw, [reply])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "expected a table"),
        ({"conversations": "x"}, "expected a list"),
        (sharegpt(), "no reply"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no reply"),
        ({"conversations": [7]}, "expected a table"),
        (sharegpt("a", "b", video="x.mp4"), "video"),
        (sharegpt("<image>a"), "0 images for 1"),
        ({"conversations": [{"from": "human", "value": x} for x in "ab"]}, "in a row"),
        ({"conversations": [
            {"from": who, "value": "x"} for who in ("human", "gpt", "gpt")]}, "in a row"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_asked_say_why(raw, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_questions(raw)

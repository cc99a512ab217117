"""Odd records and files that users have: read as they are meant, or left out with the reason."""

import gzip
import json

import pytest

from vllm_msd.errors import DataError
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.data.records import BadRecordError, parse_record


def talk(*turns, **more):
    return {"conversations": [{"from": who, "value": said} for who, said in turns]} | more


def said(record):
    """Roles and texts of a record, `<>` for an image."""
    return [
        (m["role"], "".join(part.get("text", "<>") for part in m["content"]))
        for m in record.messages
    ]


ASKED = (("human", "q"), ("gpt", "a"))
ANSWERED = [("user", "q"), ("assistant", "a")]
SYSTEM = ("system", "be brief")


@pytest.mark.parametrize(
    "raw",
    [
        talk(SYSTEM, *ASKED),
        talk(("developer", "be brief"), *ASKED),
        talk(("gpt", "hello, I am here"), SYSTEM, *ASKED),
        talk(*ASKED, system="be brief"),
        talk(SYSTEM, *ASKED, system="be verbose"),
        talk(("system", None), *ASKED, system="be brief"),
        {"messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    ],
)  # fmt: skip
def test_system_turns_come_first(raw):
    assert said(parse_record(raw)) == [SYSTEM, *ANSWERED]


@pytest.mark.parametrize(
    "raw",
    [
        talk(("gpt", "hello"), *ASKED),
        talk(("gpt", ""), ("gpt", "hello"), *ASKED),
        talk(*ASKED, ("human", "and?")),
        talk(*ASKED, system=None),
        talk(*ASKED, system=""),
        talk(("system", None), *ASKED),
    ],
)
def test_what_leads_to_no_reply_is_left_out_of_the_talk(raw):
    assert said(parse_record(raw)) == ANSWERED


def test_an_empty_system_turn_is_one():
    """A template may write another system text where there is no turn at all."""
    assert said(parse_record(talk(("system", ""), *ASKED))) == [("system", ""), *ANSWERED]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((*ASKED, ("human", "<image>\nand this?"), ("gpt", "b")),
         [*ANSWERED, ("user", "<>and this?"), ("assistant", "b")]),
        ((("human", "what is this?\n<image>"), ("gpt", "a")),
         [("user", "what is this?<>"), ("assistant", "a")]),
        ((("human", "what is this? <image>\n"), ("gpt", "a")),
         [("user", "what is this? <>"), ("assistant", "a")]),
        ((("human", "<image>"), ("gpt", "a")), [("user", "<>"), ("assistant", "a")]),
        ((("system", "s"), *ASKED, ("human", "see\n<image>\nthere"), ("gpt", "b")),
         [("system", "s"), *ANSWERED, ("user", "see<>there"), ("assistant", "b")]),
    ],
)  # fmt: skip
def test_an_image_stands_where_its_placeholder_is(turns, expected):
    for key, value in (("image", "x.png"), ("images", ["x.png"])):
        record = parse_record(talk(*turns, **{key: value}))
        assert said(record) == expected and record.images == ["x.png"]


def test_images_of_several_turns_keep_their_order():
    raw = {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "<image>, is it <image>?"},
        {"role": "assistant", "content": "b"},
    ], "images": ["y.png", "z.png"]}  # fmt: skip
    assert parse_record(raw).images == ["x.png", "y.png", "z.png"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (talk(("human", "q"), ("gpt", ""), ("human", "r"), ("gpt", "b")), "turn 2: an empty reply"),
        (talk(("human", "q"), ("gpt", " \n\t")), "turn 2: an empty reply"),
        (talk(("human", "q"), ("gpt", None)), "turn 2: got nothing, expected text"),
        (talk(*ASKED, SYSTEM, *ASKED), "turn 3: a system turn in the middle"),
        (talk(SYSTEM, SYSTEM, *ASKED), "turn 2: a system turn in the middle"),
        (talk(*ASKED, ("human", "<image>"), image="x.png"), "an image without a reply"),
        (talk(("system", None), *ASKED, *ASKED[1:]), "turn 4: got two turns of the assistant"),
        (talk(*ASKED, *ASKED[1:], system="s"), "turn 3: got two turns of the assistant"),
        (talk(*ASKED, system=7), "system: got int, expected text"),
        (talk(*ASKED, system="<image>", image="x.png"), "system: <image> inside a system turn"),
        (talk(("human", "q"), ("tool", "{}"), ("gpt", "a")), "turn 2: got the speaker 'tool'"),
    ],
)
def test_what_is_not_meant_says_which_turn(raw, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_record(raw)


ROW = json.dumps(talk(("human", "é 漢"), ("gpt", "a")), ensure_ascii=False)
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content", [
    MARK + f"[{ROW}, {ROW}]".encode(),
    MARK + f"\n [{ROW},\n{ROW}]".encode(),
    MARK + f"{ROW}\n{ROW}\n".encode(),
    f"{ROW}\n".encode() + MARK + ROW.encode(),  # two files put together
    f"{ROW}\r\n\r\n{ROW}\r\n".encode(),
])  # fmt: skip
def test_byte_order_marks_and_windows_lines_are_read(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    file = RecordFile(tmp_path / "a.json")
    assert [said(file[i])[0] for i in range(len(file))] == [("user", "é 漢")] * 2
    assert file.raw(1) == json.loads(ROW)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(encoding, tmp_path):
    for text in (f"[{ROW}]", f"{ROW}\n{ROW}\n"):
        (tmp_path / "a.json").write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match="UTF-16 or UTF-32, expected UTF-8"):
            RecordFile(tmp_path / "a.json")


def test_compressed_files_are_named(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(ROW.encode()))
    with pytest.raises(DataError, match="compressed data, expected JSON or JSONL"):
        RecordFile(tmp_path / "a.json.gz")


def test_a_table_over_several_lines_says_what_a_file_holds(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [json.loads(ROW)]}, indent=1))
    with pytest.raises(
        DataError, match=r"line 1: not valid JSON: .* a JSON file a list of records"
    ):
        RecordFile(tmp_path / "a.json")

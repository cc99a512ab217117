"""Records as users have them: spellings, parts, placeholders, bytes; read, or left out and why."""

import base64
import io
import json

import pytest
from PIL import Image
from transformers import AutoProcessor

from tests.common import tiny
from tests.common.tiny_targets import FAMILIES, write_processor
from vllm_msd.errors import DataError
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.data.records import BadRecordError, Record, parse_record
from vllm_msd.training.data.render import Renderer

SURROGATE = "\ud83d"


def talk(question, reply="yes", **more):
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    } | more


def openai(*parts, reply="yes", **more):
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": reply}]
    return {"messages": turns} | more


def url(source):
    return {"type": "image_url", "image_url": {"url": source}}


TEXT = {"type": "text", "text": "what?"}


def kinds(record: Record) -> list[str]:
    return [part["type"] for part in record.messages[0]["content"]]


@pytest.mark.parametrize(
    "raw",
    [
        openai(url("a.png"), TEXT),
        openai({"type": "image_url", "image_url": "a.png"}, TEXT),
        openai({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "x"}),
        openai({"type": "image", "image": "a.png", "text": None}, TEXT | {"image": None}),
        openai({"type": "image", "path": "a.png"}, "what?"),
        openai({"type": "image"}, TEXT, images=["a.png"]),
        openai({"type": "image"}, TEXT, images=[{"bytes": None, "path": "a.png"}]),
        openai({"image": "a.png"}, {"text": "what?"}),
        openai(TEXT | {"text": "<image>\nwhat?"}, images=["a.png"]),
        openai(url("a.png"), TEXT, images=["a.png"]),
        openai(TEXT, image="a.png"),
        openai(TEXT, image="a.png", reply=[{"type": "text", "text": "yes"}]),
        talk("<image>\nwhat?", image=None, images=["a.png"]),
        talk("<image>\nwhat?", image="", images="a.png"),
        talk("<image>\nwhat?", image=[], images=["a.png"]),
        talk("<image>\nwhat?", image="a.png", images=None, videos=[], video=""),
        {**talk("<image>\nwhat?", image="a.png"), "messages": None},
        {"messages": talk("<image>\nwhat?")["conversations"], "conversations": None,
         "image": "a.png"},
        {"messages": talk("<image>\nwhat?")["conversations"], "conversations": [],
         "image": "a.png"},
        {"image": "a.png", "conversations": [
            {"from": None, "role": "user", "value": None, "content": "<image>\nwhat?"},
            {"from": "gpt", "role": None, "value": "yes", "content": None}]},
    ],
)  # fmt: skip
def test_one_image_and_a_question_in_every_spelling(raw):
    record = parse_record(json.loads(json.dumps(raw)))
    assert record.images == ["a.png"]
    assert kinds(record) == ["image", "text"]
    assert record.messages[-1]["content"][0]["text"] == "yes"


def test_images_of_parts_and_of_the_record_keep_their_order():
    raw = openai(url("b.png"), {"type": "image"}, TEXT, url("c.png"), image=["a.png"])
    record = parse_record(raw)
    assert record.images == ["b.png", "a.png", "c.png"]
    assert kinds(record) == ["image", "image", "text", "image"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (talk("q " + SURROGATE), "turn 1: got .*half of a character"),
        (talk("q", SURROGATE), "turn 2: got .*half of a character"),
        (talk("q", image="a" + SURROGATE), "image: got .*half"),
        (talk("q", kind="a" + SURROGATE), "kind: got .*half"),
        (talk("q", "\u00a0"), "empty reply"),
        (talk("q", "\u2003\u3000\x1c\n"), "empty reply"),
        (talk("q", video="a.mp4"), "video is not trained on"),
        (talk("q", videos=["a.mp4"]), "video is not trained on"),
        (talk("q", video=None, videos=["a.mp4"]), "video is not trained on"),
        (talk("<video>\nq"), "turn 1: <video>: video is not trained on"),
        (openai({"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT), "video is not"),
        (openai({"type": "video", "video": "a.mp4"}, TEXT), "video is not trained on"),
        (openai({"type": "input_audio"}, TEXT), "part of type 'input_audio'"),
        (openai({"type": "text", "text": None}), "got nothing, expected text"),
        (openai(None), "got nothing, expected text"),
        (openai(7), "got int, expected text"),
        (openai({}), "part of type None"),
        (openai({"type": ["text"]}), "part of type"),
        (openai(url(7)), "expected a path"),
        (openai(url("a.png"), TEXT, image="b.png"), "1 images for 0"),
        (openai({"type": "image"}, TEXT), "0 images for 1"),
        (openai(TEXT, reply=[url("a.png")]), "an image inside what the assistant says"),
        (talk("q", "a <image>"), "inside a reply"),
        ({"messages": [{"role": "system", "content": "<image>"}]}, "inside a system turn"),
        (talk("q", image=[None]), "image: got None"),
        (talk("q", image={"bytes": "x"}), "image: got None"),
        ({"conversations": None}, "got nothing, expected a list"),
        ({"conversations": [{"role": ["user"], "content": "q"}]}, "the speaker"),
    ],
)
def test_what_cannot_be_trained_on_says_why(raw, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_record(raw)


OWN_PLACEHOLDERS = {
    "llava": ("<image>",),
    "llava_onevision": ("<image>", "<video>"),
    "qwen2_vl": ("<|image_pad|>", "<|video_pad|>"),
}


@pytest.fixture(scope="module", params=OWN_PLACEHOLDERS)
def renderer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_processor(folder, request.param)
    tiny.image(0, (56, 56)).save(folder / "a.png")
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    video = tokenizer.convert_tokens_to_ids(
        {"qwen2_vl": "<|video_pad|>", "llava_onevision": "<video>"}.get(request.param, "<pad>")
    )
    image = tokenizer.convert_tokens_to_ids(FAMILIES[request.param].image_token)
    found = Renderer(processor, image, {tokenizer.eos_token_id}, [folder], 2048, (video,))
    found.kind = request.param
    return found


def rendered(renderer, raw):
    return renderer.render(parse_record(raw))


def test_the_targets_own_placeholder_in_a_text_is_left_out(renderer):
    """Beside an image or alone, in a question or a reply, the image's token or the video's."""
    whole = rendered(renderer, talk("<image>\nwhat?", image="a.png"))
    assert (whole.input_ids == renderer.image_token_id).sum() > 1
    for token in OWN_PLACEHOLDERS[renderer.kind]:
        said = (f"what is {token}?", "yes"), ("what?", f"it is {token}")
        for question, reply in said:
            for raw in (talk(f"<image>\n{question}", reply, image="a.png"), talk(question, reply)):
                with pytest.raises(BadRecordError, match=r"own placeholder|<video>|<image>"):
                    rendered(renderer, raw)


def test_pictures_come_from_paths_and_data_urls(renderer):
    buffer = io.BytesIO()
    with Image.open(renderer.image_roots[0] / "a.png") as image:
        image.save(buffer, "PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    one = rendered(renderer, openai(url("a.png"), TEXT))
    other = rendered(renderer, openai(url(data), TEXT))
    assert one.input_ids.equal(other.input_ids)
    assert one.extras["pixel_values"].equal(other.extras["pixel_values"])


def test_a_template_that_refuses_a_record_leaves_it_out(renderer, monkeypatch):
    for template in ("{{ raise_exception('no') }}", "{% for %}", "{{ 1 + messages[0].role }}"):
        monkeypatch.setattr(renderer.processor, "chat_template", template)
        with pytest.raises(BadRecordError, match="chat template refused it: "):
            rendered(renderer, talk("q"))


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        b'{"conversations": [], "id": "\xe9"}',
        b'{"conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"conversations": [], "id": ' + b"1" * 5000 + b"}",
        b'{"conversations": [], "id": "\xff\xfe"}',
    ],
    ids=["latin-1", "deep", "long number", "no character"],
)
def test_bad_bytes_are_refused_alike_in_lines_and_lists(bad, tmp_path):
    good = json.dumps(talk("q")).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + bad + b"\n")
    (tmp_path / "a.json").write_bytes(b"[" + good + b",\n" + bad + b"]")
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(DataError, match=f"{name}, line 2: not valid JSON"):
            RecordFile(tmp_path / name)


def test_lines_and_lists_leave_out_the_same_records(tmp_path):
    rows = [
        talk("q"),
        talk("q", "\u00a0"),
        talk("q", "\u00e9"),
        talk("q", SURROGATE),
        talk("q", ""),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    raw = "[" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "]"
    (tmp_path / "b.json").write_bytes(raw.encode("utf-8", "surrogatepass"))
    files = [RecordFile(tmp_path / name) for name in ("a.jsonl", "a.json", "b.json")]
    for file in files:
        assert [bad.line for bad in file.bad] == [2, 4, 5]
        assert [file[i] for i in range(len(file))] == [parse_record(rows[0]), parse_record(rows[2])]


def test_a_file_that_changes_while_it_is_used_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(talk("q" * 50)))
    file = RecordFile(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="line 1: it was a record when the file was first read"):
        file[0]

"""The requests of the benchmark, and of the file it writes for vLLM's client."""

import json

import pytest
from PIL import Image

from vllm_msd.bench.data import load_requests
from vllm_msd.bench.serving_file import content, write_requests
from vllm_msd.cli.main import main
from vllm_msd.errors import DataError
from vllm_msd.measure.inputs import Sample


def _record(name: str, *turns: str, **more) -> dict:
    speakers = ("human", "gpt")
    spoken = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "conversations": spoken, **more}


def test_conversations_ask_the_last_question_after_what_was_said(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    records = [
        _record("1", "Hi", "Hello", "And <image>?", "Red", image="a.png", kind="vqa"),
        _record("2", "Alone"),
        _record("3", "", "", "no reply to the first", kind="bad"),
        _record("4", "One", "1", kind="vqa"),
    ]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    found = load_requests(str(path), (), 9)
    assert [sample.kind for sample in found.samples] == ["vqa", "q", "vqa"], "kinds in turn"
    first, alone, _ = found.samples
    assert [m["role"] for m in first.prompt] == ["user", "assistant", "user"]
    assert len(first.images) == 1 and first.prompt[0]["content"][0]["text"] == "Hi"
    assert alone.prompt == [{"role": "user", "content": [{"type": "text", "text": "Alone"}]}]
    assert len(found.left_out) == 1 and "line" in found.left_out[0]


def test_only_pictures_of_the_chosen_kinds_are_read(tmp_path):
    records = [_record("1", "And <image>?", image="gone.png", kind="vqa"), _record("2", "Hi")]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records))
    (chosen,) = load_requests(str(path), (), 9, ["q"]).samples
    assert chosen.kind == "q" and not chosen.images
    with pytest.raises(DataError, match=r"got opera; expected some of q, vqa"):
        load_requests(str(path), (), 9, ["opera"])


def test_mmspec_asks_the_first_question_of_each_line(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    rows = [
        {"id": 1, "image": "a.png", "turns": ["What?", "And?"], "category": "vqa", "topic": "x"},
        {"id": 2, "image": None, "turns": ["Text"], "category": "chat"},
    ]
    file = tmp_path / "mmspec.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (tmp_path, file):
        first, second = load_requests(str(data), (), 5).samples
        assert first.kind == "vqa" and len(first.images) == 1 and not second.images
        assert first.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no question in it"),
        ("\n \n\n", "has no question in it"),
        ("{", "line 1: not valid JSON"),
        ('{"turns": []}', "expected a list of questions"),
        ('{"turns": ["a"], "image": 3}', "expected names of files"),
        ('{"turns": ["a"], "image": "no.png"}', "there is no such file.*--image-root"),
    ],
)
def test_wrong_mmspec_data_is_refused(tmp_path, text, reason):
    (tmp_path / "mmspec.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        load_requests(str(tmp_path), (), 5)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"without mmspec\.jsonl"):
        load_requests(str(tmp_path), (), 5)


def test_requests_for_vllms_load_generator(tmp_path):
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    earlier = [{"role": "user", "content": [image]}, {"role": "assistant", "content": [text]}]
    own = Sample([red, blue], [*earlier, {"role": "user", "content": [text, image]}], "a")
    inherited = Sample([red], [*earlier, {"role": "user", "content": [text]}], "a")
    kinds = [[part["type"] for part in content(one)] for one in (own, inherited)]
    assert kinds == [["text", "image_url"], ["image_url", "text"]]
    assert content(own)[1] != content(inherited)[0], "the second picture, not the first"
    path = tmp_path / "requests.jsonl"
    write_requests(path, [own, inherited])
    assert [json.loads(line)["content"] for line in path.open()] == [
        content(own),
        content(inherited),
    ]


def test_the_command_writes_requests(tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    arguments = ["--num-prompts", "7", "--output", str(tmp_path), "--write-requests"]
    assert main(["bench", *arguments, str(path), "--batch", "2"]) == 0
    assert "7 requests" in capsys.readouterr().out and len(path.read_text().splitlines()) == 7
    assert main(["bench", *arguments, str(path), "--batch", "2", "5"]) == 0
    assert "10 requests" in capsys.readouterr().out, "as many as the run asks of batch 5"
    assert main(["bench", *arguments, str(tmp_path / "requests.json")]) == 2
    assert "ends in .jsonl" in capsys.readouterr().err

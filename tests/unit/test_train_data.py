"""Training data: formats, errors that name the line, marked replies, order by seed and step."""

import json
import resource

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from tests.common import tiny
from tests.common.conversations import write_conversations
from vllm_msd.demo.paths import demo_pair
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.training import TrainSettings
from vllm_msd.training.data import index
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.data.plan import DataPlan, share_of_multimodal
from vllm_msd.training.data.records import BadRecordError, parse_record
from vllm_msd.training.data.render import Rendered, Renderer


def _talk(*turns, **more):
    names = ("human", "gpt")
    return {
        "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)]
    } | more


def test_images_stand_where_their_placeholders_are():
    record = parse_record(_talk("a <image>\nb <image>", "c", image=["x.png", "y.png"], id=3))
    kinds = [p["type"] for p in record.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image"]
    assert record.images == ["x.png", "y.png"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (_talk("a <image>", "b"), "0 images for 1"),
        (_talk("a"), "no reply"),
        (_talk("a", ""), "empty reply"),
        (_talk("a", "b", "c", 4), "turn 4"),
        ({"conversations": "text"}, "expected a list"),
        ([1], "expected a table"),
        (_talk("a", "b", image=7), "image"),
    ],
)
def test_broken_records_say_why(raw, reason):
    with pytest.raises(BadRecordError, match=reason):
        parse_record(raw)


@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_lists_and_lines_hold_the_same_records(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(index, "_CHUNK", chunk)
    rows = [_talk(f'é "] , {i}', "漢字 " * i, id=i if i % 2 else str(i)) for i in range(1, 30)]
    rows[4] = {"id": 5}
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    listed, lined = RecordFile(tmp_path / "a.json"), RecordFile(tmp_path / "a.jsonl")
    assert [listed[i] for i in range(28)] == [lined[i] for i in range(28)]
    assert [b.line for b in lined.bad] == [5]
    assert listed.num_found == 29


def test_malformed_files_name_the_line(tmp_path):
    good = json.dumps(_talk("a", "b"))
    cases = {"x.jsonl": f"{good}\n{good[:-2]}\n", "x.json": f"[{good},\n{good[:20]}@{good}]"}
    for name, content in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}, line 2"):
            RecordFile(tmp_path / name)


@pytest.mark.parametrize("kind", ["demo", "qwen2_vl"])
def test_replies_are_marked(kind, tmp_path):
    if kind == "demo":
        folder = demo_pair().target
    else:
        folder = tiny.build_pair(tmp_path / "pair", kind).target
    processor = AutoProcessor.from_pretrained(folder)
    renderer = Renderer(
        processor, processor.image_token_id, {processor.tokenizer.eos_token_id}, [tmp_path]
    )
    tiny.image(0, (84, 56)).save(tmp_path / "a.png")
    raw = _talk("<image>\nfirst?", "one two", "<image> more?", "three", image=["a.png", "a.png"])
    rendered = renderer.render(parse_record(raw))
    said = processor.tokenizer.decode(
        rendered.input_ids[rendered.answer_mask], skip_special_tokens=True
    )
    assert said.split() == ["one", "twothree"] or said.split() == ["one", "two", "three"]
    for number in (1, 3):  # a reply that was cut: the same tokens, without the end of turn
        cut = json.loads(json.dumps(raw))
        cut["conversations"][number]["cut"] = True
        found = renderer.render(parse_record(cut))
        assert found.input_ids.equal(rendered.input_ids)
        missing = rendered.input_ids[rendered.answer_mask & ~found.answer_mask].tolist()
        # The tiny target's template writes no end of turn.
        assert missing == [processor.tokenizer.eos_token_id] * (kind == "demo")
        assert not (found.answer_mask & ~rendered.answer_mask).any()
    renderer.max_length = len(rendered.input_ids) - 1
    shorter = renderer.render(parse_record(raw))
    assert "three" not in processor.tokenizer.decode(shorter.input_ids)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadRecordError, match="cannot be read"):
        renderer.render(parse_record(raw))


def test_plan_is_a_function_of_seed_and_step():
    share = share_of_multimodal("two-stage", 40, 4)
    weights = (np.arange(30), np.arange(50))
    plan = DataPlan(weights, 4, share, pool=4, seed=1)
    forward = [plan.records(s) for s in range(40)]
    other = DataPlan(weights, 4, share, pool=4, seed=1)
    assert [other.records(s) for s in reversed(range(40))] == forward[::-1]
    assert all(kind == 0 for step in forward[:20] for kind, _ in step)
    assert all(kind == 1 for step in forward[32:] for kind, _ in step)
    texts = [n for step in forward for kind, n in step if kind == 0]
    # None comes again before all have come: two pools of 16 hold all 30.
    assert len(set(texts[:16])) == 16
    assert set(texts[:32]) == set(range(30))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    text, _ = write_conversations(tmp_path, 1)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"target: t\noutput: o\ncurriculum: text\ntext-data: {text}\nlearning-rate: 1e-4\nseed: 5\n"
    )
    settings = TrainSettings.load(path, seed=6)
    assert (settings.learning_rate, settings.seed, settings.noise) == (1e-4, 6, 0.2)
    assert settings.text_data == [str(text)]
    path.write_text("learning_rat: 1\n")
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        TrainSettings.load(path)
    with pytest.raises(ConfigError, match="noise: got 'x', expected a number"):
        TrainSettings(target="t", output="o", text_data=["x"], curriculum="text", noise="x")


def test_token_ids_of_a_batch_are_padded_on_the_asked_side():
    from vllm_msd.training.data.batches import collate
    from vllm_msd.training.data.render import Rendered

    rows = [
        Rendered(torch.arange(n), torch.ones(n, dtype=torch.bool), {"k": torch.ones(1, n)})
        for n in (2, 3)
    ]
    assert collate(rows, 9).input_ids.tolist() == [[0, 1, 9], [0, 1, 2]]
    left = collate(rows, 9, left=True)
    assert left.input_ids.tolist() == [[9, 0, 1], [0, 1, 2]]
    assert left.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_records_of_large_steps_come_from_workers_with_few_open_files():
    def record(number: int) -> Rendered:
        picture = torch.full((1, 3, 200 if number % 50 == 0 else 20, 200), float(number))
        ids = torch.arange(number, number + 3)
        return Rendered(ids, ids % 2 == 0, {"pixel_values": picture})

    steps = [[record(number) for number in range(100)] for _ in range(3)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        found = list(DataLoader(steps, batch_size=None, num_workers=2, collate_fn=list, timeout=20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(found) == 3
    for one, other in zip(steps[0], found[2], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.answer_mask, other.answer_mask)
        assert torch.equal(one.extras["pixel_values"], other.extras["pixel_values"])

"""Random training records and draft folders: each is read, or refused in a documented way.

``records`` and ``drafts`` run so many examples and return how many had which outcome; anything
else that a reader raises ends them with Hypothesis's smallest example.
"""

import base64
import json
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.common import pictures, tiny
from tests.common.drafts import PUBLISHED, small_draft
from vllm_msd.checkpoint import inspect_draft, load_draft, load_draft_config
from vllm_msd.errors import CheckpointError, DataError
from vllm_msd.training.data.batches import collate
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.data.records import BadRecordError, parse_record
from vllm_msd.training.data.render import Renderer
from vllm_msd.training.data.replies import parse_questions, with_replies
from vllm_msd.training.targets import Target

KINDS = ("llava", "qwen2_vl", "llava_onevision")
_LONGEST = 400  # tokens of a record


def _run(check: Any, examples: int, number: int) -> None:
    """Run a Hypothesis test with so many examples, all of them new."""
    profile = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(profile(check))()


# Records ----------------------------------------------------------------------------------------

_SPECIAL = (
    "<image>", "<video>", "<s>", "</s>", "<pad>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
    "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "assistant: ", "user: ", "\n", " ",
    "\u00a0", "\u200b", "\ud83d", "\x00", "{{ 1 }}", "{% for %}", "", "漢字 🙂",
)  # fmt: skip
_words = st.one_of(st.sampled_from(_SPECIAL), st.text(st.characters(codec=None), max_size=8))
_texts = st.lists(_words, max_size=5).map("".join)
_odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


def _png(mode: str) -> str:
    content = pictures.encoded(pictures.pixels(mode, (30, 30)), "PNG")
    return "data:image/png;base64," + base64.b64encode(content).decode()


_sources = st.one_of(
    st.sampled_from(["a.png", "wide.png", "torn.png", "none.png", _png("RGBA"), _png("1"),
                     "data:image/png;base64,aGk=", "data:,", "https://a/b.png", ".", "x" * 5000]),
    _texts,
)  # fmt: skip
_parts = st.one_of(
    st.builds(lambda s: {"type": "image_url", "image_url": {"url": s}}, _sources),
    st.builds(lambda s: {"type": "image", "image": s}, _sources),
    st.just({"type": "image"}),
    st.builds(lambda t: {"type": "text", "text": t}, _texts),
    st.just({"type": "video_url", "video_url": {"url": "a.mp4"}}),
    _texts,
    _odd,
)
_KEYS = st.sampled_from(["image", "images", "video", "kind", "id", "messages", "conversations"])
_contents = st.one_of(_texts, _texts, st.lists(_parts, max_size=4), _odd)


_good = st.sampled_from(["a.png", _png("RGBA"), _png("L")])


@st.composite
def raw_records(draw: st.DrawFn) -> Any:
    """What a line of a data file may hold: a record, with up to three things changed."""
    images = draw(st.lists(_good, max_size=2))
    role, text = draw(st.sampled_from([("from", "value"), ("role", "content")]))
    user, other = ("human", "gpt") if role == "from" else ("user", "assistant")
    question: Any = "<image>" * len(images) + "what?"
    if draw(st.booleans()):
        question = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": "q"}]
    turns: list[Any] = [{role: user, text: question}, {role: other, text: "it is that"}]
    turns += [{role: user, text: "more?"}, {role: other, text: "yes."}] * draw(st.integers(0, 1))
    record: dict[str, Any] = {draw(st.sampled_from(["conversations", "messages"])): turns}
    if isinstance(question, str) and images:
        record[draw(st.sampled_from(["image", "images"]))] = images
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        change = draw(st.integers(0, 5))
        turn = turns[draw(st.integers(0, len(turns) - 1))]
        is_table = isinstance(turn, dict)
        if change == 0 and is_table and isinstance(turn.get(text), str):
            turn[text] += draw(_texts)
        elif change == 1 and is_table:
            turn[text] = draw(_contents)
        elif change == 2 and is_table:
            turn[draw(st.sampled_from([role, text, "from", "content"]))] = draw(_odd)
        elif change == 3:
            record |= draw(st.dictionaries(_KEYS, st.lists(_sources, max_size=3) | _odd))
        elif change == 4:
            turns.insert(draw(st.integers(0, len(turns))), draw(_odd | st.just(turn)))
        elif not draw(st.integers(0, 3)):
            return draw(_odd)
    return record


@cache
def targets(folder: Path) -> dict[str, tuple[Target, Renderer]]:
    """Tiny targets and their renderers, with the pictures that records name."""
    for name, size in (("a.png", (56, 56)), ("wide.png", (400, 3))):
        tiny.image(0, size).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:60])
    found = {}
    for kind in KINDS:
        target = Target.load(tiny.build_pair(folder / kind, kind).target, "float32")
        found[kind] = target, target.renderer([folder], _LONGEST)
    return found


def records(folder: Path, examples: int, number: int) -> dict[str, int]:
    """Outcomes of random records: parsed, rendered, and passed through a target."""
    found: Counter[str] = Counter()
    places = targets(folder)

    @given(raw=raw_records(), kind=st.sampled_from(KINDS), is_list=st.booleans())
    def check(raw: Any, kind: str, is_list: bool) -> None:
        path = folder / ("a.json" if is_list else "a.jsonl")
        path.write_text(json.dumps([raw] if is_list else raw))
        target, renderer = places[kind]
        try:
            file = RecordFile(path)
        except DataError:
            found["left out by its form"] += 1
            try:
                parse_record(json.loads(json.dumps(raw)))
            except BadRecordError:
                return
            raise AssertionError("a file leaves out what is a record") from None
        record = file[0]
        try:
            whole, prompt = renderer.render(record), renderer.prompt(record)
        except BadRecordError:
            found["left out by the target"] += 1
            return
        assert whole.answer_mask.any() and not prompt.answer_mask.any()
        assert len(whole.input_ids) <= _LONGEST
        features = target.features(collate([whole], target.pad_id))
        assert features.hidden.isfinite().all()
        found["with images" if record.images else "text"] += 1

    _run(check, examples, number)
    return dict(found)


def replies(examples: int, number: int) -> dict[str, int]:
    """Outcomes of exchanging the replies of random records, all of them or the first ones only.

    Questions, system text and images are the record's own, and the replies those given.
    """
    found: Counter[str] = Counter()

    @given(raw=raw_records(), share=st.floats(0, 1))
    def check(raw: Any, share: float) -> None:
        try:
            asked = parse_questions(raw)
        except BadRecordError:
            found["left out"] += 1
            return
        count = sum(m["role"] == "assistant" for m in asked.messages)
        kept = max(1, round(share * count))
        new = with_replies(json.loads(json.dumps(raw)), [f"reply {i}" for i in range(kept)])
        record = parse_record(new)
        said = [m["content"][0]["text"] for m in record.messages if m["role"] == "assistant"]
        assert said == [f"reply {i}" for i in range(kept)]
        wanted = [m for m in asked.messages if m["role"] != "assistant"]
        questions = [m for m in record.messages if m["role"] != "assistant"]
        assert questions == wanted[: len(questions)]
        assert record.images == asked.images[: len(record.images)]
        assert record.kind == asked.kind
        spoken = ("conversations", "messages", "image", "images")
        assert all(new[key] == raw[key] or key in spoken for key in raw)
        found["all" if kept == count else "shortened"] += 1

    _run(check, examples, number)
    return dict(found)


def files(folder: Path, examples: int, number: int) -> dict[str, int]:
    """Outcomes of data files of random bytes and of damaged lists and lines."""
    found: Counter[str] = Counter()
    turns = [{"from": "human", "value": "é"}, {"from": "gpt", "value": "ü"}]
    good = json.dumps({"conversations": turns}, ensure_ascii=False)
    forms = (f"[{good},\n {good}]".encode(), f"{good}\n{good}\n".encode())

    @given(
        form=st.sampled_from(forms),
        changes=st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)), max_size=3),
        length=st.none() | st.integers(0, 300),
        noise=st.none() | st.binary(max_size=40),
    )
    def check(form: bytes, changes: Any, length: int | None, noise: bytes | None) -> None:
        for place, new in changes:
            form = form[:place] + new + form[place + len(new) :]
        path = folder / "b.json"
        path.write_bytes(form[:length] if noise is None else noise)
        try:
            file = RecordFile(path)
        except DataError:
            found["refused"] += 1
            return
        for i in range(len(file)):
            assert file[i].messages
        found["read"] += 1

    _run(check, examples, number)
    return dict(found)


def damaged_pictures(examples: int, number: int) -> dict[str, int]:
    """Outcomes of damaged picture files: vLLM's pixels are training's, or both refuse the file."""
    found: Counter[str] = Counter()
    contents = pictures.every_file()

    @given(
        name=st.sampled_from(sorted(contents)),
        changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
        length=st.just(1.0) | st.floats(0, 1),
    )
    def check(name: str, changes: list[tuple[float, int]], length: float) -> None:
        content = bytearray(contents[name])
        for place, byte in changes:
            content[int(place * (len(content) - 1))] = byte
        cut = bytes(content[: max(1, int(length * len(content)))])
        ours = pictures.trained(cut)
        assert pictures.same(ours, pictures.served(cut)), name
        found["refused" if ours is None else "read"] += 1

    _run(check, examples, number)
    return dict(found)


# Drafts -----------------------------------------------------------------------------------------

_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 100), st.floats(), st.sampled_from(["", "x", "silu"]),
    st.just([]), st.just({}), st.just({"type": "yarn"}), st.just(10**30),
)  # fmt: skip
_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8])
_NAMES = st.sampled_from(
    ["layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "layers.1.mlp.up_proj.weight",
     "rotary_emb.inv_freq", "layers.0.input_layernorm.weight", "", "é", "a" * 300]
)  # fmt: skip


def drafts(examples: int, number: int) -> dict[str, int]:
    """Outcomes of random draft folders; `inspect` and both loaders must agree."""
    found: Counter[str] = Counter()
    whole = {layout: small_draft(layout).state_dict() for layout in PUBLISHED}
    own = {layout: small_draft(layout).config.to_dict() for layout in PUBLISHED}

    @given(data=st.data(), layout=st.sampled_from(sorted(PUBLISHED)), is_own=st.booleans())
    def check(data: st.DataObject, layout: str, is_own: bool) -> None:
        config = dict(own[layout] if is_own else PUBLISHED[layout])
        state = dict(whole[layout])
        for _ in range(data.draw(st.integers(0, 3))):
            name = data.draw(st.sampled_from(sorted(config)) | st.sampled_from(["bias", "é"]))
            if data.draw(st.booleans()):
                config[name] = data.draw(_VALUES)
            else:
                config.pop(name, None)
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(sorted(whole[layout])))
            change = data.draw(st.sampled_from(["drop", "shape", "dtype", "add", "nan"]))
            if change == "drop":
                state.pop(name, None)
            elif change == "add":
                state[data.draw(_NAMES)] = torch.ones(data.draw(st.integers(0, 4)))
            elif change == "shape":
                state[name] = torch.ones(data.draw(st.lists(st.integers(0, 40), max_size=2)))
            elif change == "dtype":
                state[name] = torch.ones_like(whole[layout][name]).to(data.draw(_DTYPES))
            else:
                state[name] = torch.full_like(whole[layout][name], float("nan"))
        with tempfile.TemporaryDirectory() as name:
            _write_draft(Path(name), config, state, data)
            found[_outcome(Path(name))] += 1

    _run(check, examples, number)
    return dict(found)


def _write_draft(folder: Path, config: dict, state: dict, data: st.DataObject) -> None:
    text = json.dumps(config).encode()
    (folder / "config.json").write_bytes(_damaged(text, data))
    form = data.draw(st.sampled_from(["safetensors", "bin", "old bin", "shards"]))
    if form == "shards":
        half = sorted(state)[: len(state) // 2]
        parts = {"model-1.safetensors": half, "model-2.safetensors": sorted({*state} - {*half})}
        for file, part in parts.items():
            save_file({n: state[n].contiguous() for n in part}, folder / file)
        index: Any = {n: file for file, part in parts.items() for n in part}
        if not data.draw(st.integers(0, 3)):
            index |= {data.draw(_NAMES): data.draw(st.sampled_from(["model-3", "../a", 7, None]))}
        content = json.dumps({"weight_map": index}).encode()
        (folder / "model.safetensors.index.json").write_bytes(_damaged(content, data))
        return
    path = folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file({n: x.contiguous() for n, x in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "bin")
    path.write_bytes(_damaged(path.read_bytes(), data))


def _damaged(content: bytes, data: st.DataObject) -> bytes:
    """Mostly as it is; else cut short or with other bytes, near the beginning above all."""
    kind = data.draw(st.sampled_from(["", "", "", "", "", "cut", "bytes"]))
    place = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content)))) if kind else 0
    if kind == "cut":
        return content[:place]
    if kind == "bytes":
        new = data.draw(st.binary(min_size=1, max_size=9))
        return content[:place] + new + content[place + len(new) :]
    return content


def _outcome(folder: Path) -> str:
    told = set()
    for read in (load_draft_config, inspect_draft):
        try:
            result = read(folder)
            problems = read is inspect_draft and result["problems"]
            told.add("problems" if problems else "fine")
        except CheckpointError as error:
            told.add("problems" if "the weights are not those" in str(error) else str(error))
    assert len(told) == 1, told
    try:
        config, state = load_draft(folder)
    except CheckpointError as error:
        return "damaged weights" if "fine" in told and "NaN" not in str(error) else "refused"
    assert told == {"fine"}
    assert {n: tuple(x.shape) for n, x in state.items() if n != "embed_tokens.weight"} == (
        config.weight_shapes()
    )
    return "read"

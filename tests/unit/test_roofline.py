"""vllm_msd.roofline and its script: figures worked out by hand, and how they must move."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from vllm_msd.errors import ConfigError
from vllm_msd.roofline import launches, scratch
from vllm_msd.roofline.shapes import DEVICES, SHAPES, device_named, free_rows
from vllm_msd.roofline.step import ARMS, attention, draft_pass, predict, verification
from vllm_msd.tree import GrowthBuffers, TreeStore
from vllm_msd.tree.config import TreeConfig
from vllm_msd.tree.grow import LOGITS_BYTES

ROOT = Path(__file__).parents[2]
H100, H200 = DEVICES["h100"], DEVICES["h200"]
LLAVA, LLAVA_13B, QWEN = (SHAPES[name] for name in SHAPES)
NONE, CHAIN, TREE, WIDE = ARMS

# Worked out by hand before the module was written, in ms on an H200 without launches, in the order
# of ARMS. They do not count the draft's own reading of the context.
BY_HAND = {
    (LLAVA, 900, 1): (3.2, 4.0, 4.0, 4.2),
    (LLAVA, 900, 8): (4.0, 4.8, 5.6, 11.4),
    (LLAVA, 900, 32): (6.6, 8.0, 20.0, 43.7),
    (QWEN, 1400, 1): (3.3, 5.2, 5.2, 5.6),
    (QWEN, 1400, 32): (3.9, 6.6, 19.6, 46.9),
}


def test_the_documents_table_of_draft_vocabularies_is_this_arithmetic():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+)x \| ([\d.]+)x \| (?:([\d.]+)x|-) \|$", text, re.M)
    assert [row[0] for row in rows] == ["65,536", "32,768", "16,384", "8,192"]
    for size, *said in rows:
        columns = ((QWEN, CHAIN), (QWEN, WIDE), (LLAVA, CHAIN))
        for (shape, arm), number in zip(columns, said, strict=True):
            own = predict(shape, H200, arm, 1, draft_vocab=int(size.replace(",", "")))
            found = predict(shape, H200, arm, 1).bound / own.bound
            # A vocabulary as large as LLaVA's own is no use to it.
            assert float(number) == pytest.approx(found, abs=0.006) if number else found < 1


@pytest.mark.parametrize(("shape", "context", "batch"), BY_HAND)
def test_steps_worked_out_by_hand(shape, context, batch):
    for arm, expected in zip(ARMS, BY_HAND[shape, context, batch], strict=True):
        found = predict(shape, H200, arm, batch, context=context, stage="eager")
        without = found.bound - found.parts.get("draft attention", 0)
        assert without * 1e3 == pytest.approx(expected, rel=0.035), arm.name
        # What it adds: most where 32 requests draft chains, whose step is short.
        assert found.bound * 1e3 == pytest.approx(expected, rel=0.085), arm.name


def test_bound_of_speculation_at_batch_1():
    # 4.75 tokens for a step of 3.2 ms and six draft passes of 0.17 ms.
    found, plain = (predict(LLAVA, H200, arm, 1) for arm in (WIDE, NONE))
    assert found.rate(found.bound) / plain.rate(plain.bound) == pytest.approx(3.6, abs=0.05)


@pytest.mark.parametrize(("device", "expected"), [(H200, 160), (H100, 220)])
def test_free_rows_are_where_the_weights_bound_ends(device, expected):
    rows = free_rows(device)
    assert rows == pytest.approx(expected, rel=0.07)

    def seconds(rows):
        return verification(LLAVA, device, 1, rows, 0)["target weights"]

    assert seconds(int(rows)) == seconds(1)
    assert seconds(2 * round(rows)) == pytest.approx(2 * seconds(1), rel=0.01)
    assert free_rows(device, element_bytes=1) == rows / 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_more_work_takes_longer(shape):
    sizes = (1, 2, 8, 32, 64, 256)
    for arm in ARMS:
        times = [predict(shape, H200, arm, batch).bound for batch in sizes]
        assert times == sorted(times) and times[-1] > times[0]
        contexts = [predict(shape, H200, arm, 8, context=c).bound for c in (100, 1000, 8000)]
        assert contexts == sorted(set(contexts))
        assert predict(shape, H100, arm, 1).bound > predict(shape, H200, arm, 1).bound
    for batch in sizes:
        rows = [sum(verification(shape, H200, batch, rows, 1000).values()) for rows in range(1, 64)]
        assert all(b > a for a, b in pairwise(rows))


def test_attention_is_that_of_the_kernels_documentation():
    for shape, batch, context, gigabytes, teraops in (
        (LLAVA, 1, 4096, 0.069, 0.0044), (LLAVA, 32, 2048, 1.138, 0.071),
        (LLAVA_13B, 8, 4096, 0.691, 0.044), (QWEN, 1, 4096, 0.009, 0.0044),
        (QWEN, 8, 4096, 0.075, 0.035),
    ):  # fmt: skip
        work = attention(shape, batch, 61, context)
        assert work.bytes / 1e9 == pytest.approx(gigabytes, abs=6e-4)
        assert work.operations / 1e12 == pytest.approx(teraops, rel=0.02)


def test_the_draft_reads_the_context_in_every_pass():
    found = predict(LLAVA, H200, CHAIN, 32, context=8000).parts["draft attention"]
    once = 32 * 8000 * LLAVA.kv_bytes / H200.bandwidth
    assert found == pytest.approx(5 * once, rel=0.01)


def test_a_draft_vocabulary_shortens_a_level():
    def gigabytes(vocab):
        return draft_pass(QWEN, H200, 1, 1, 0, vocab) * H200.bandwidth / 1e9

    assert gigabytes(QWEN.vocab) == pytest.approx(1.61, abs=0.01)
    assert gigabytes(32_000) == pytest.approx(0.75, abs=0.01)
    short, whole = (predict(QWEN, H200, TREE, 1, draft_vocab=v) for v in (32_000, None))
    assert short.parts["draft levels"] < 0.5 * whole.parts["draft levels"]
    assert short.parts["target head"] == whole.parts["target head"]


def test_a_compact_prefill_and_a_fused_ranking_take_less():
    def parts(**options):
        return predict(QWEN, H200, WIDE, 32, **options).parts

    assert parts(compact_prefill=True)["draft prefill"] < 0.5 * parts()["draft prefill"]
    assert parts(stage="fused")["draft levels"] < parts(stage="eager")["draft levels"]
    chains = [predict(QWEN, H200, CHAIN, 8, stage=stage) for stage in launches.STAGES]
    assert chains[0] == chains[1] == chains[2]


def test_launches():
    costs = launches.LaunchCosts(eager=10e-6, graph=1e-6)
    steps = {
        stage: predict(LLAVA, H200, TREE, 1, stage=stage, costs=costs) for stage in launches.STAGES
    }
    # Depth 5: four levels after the prefill; 32 layers of 12 kernels and 5 around.
    target, prefill = 32 * 12 + 5, 30
    assert (steps["eager"].replayed, steps["eager"].issued) == (target + prefill, 400)
    assert (steps["graph"].replayed, steps["graph"].issued) == (target + prefill + 300, 93)
    assert (steps["fused"].replayed, steps["fused"].issued) == (target + prefill + 80, 93)
    for step in steps.values():
        assert step.bound < step.seconds(hidden=True) < step.seconds(hidden=False)
    ends = [step.seconds(hidden=False) for step in steps.values()]
    assert ends == sorted(ends, reverse=True)
    eager = steps["eager"]
    assert eager.seconds(hidden=False) == pytest.approx(eager.bound + 419e-6 + 4e-3)
    assert eager.seconds(hidden=True) == pytest.approx(eager.bound + 819e-6)
    slow = replace(eager, costs=launches.LaunchCosts(eager=1e-3))
    assert slow.seconds(hidden=True) == pytest.approx(0.4)


def test_launches_of_a_file(tmp_path):
    file = tmp_path / "launches.json"
    file.write_text(json.dumps({"counted": "here", "launches": {"tree graph": {"level": 41}}}))
    found = launches.read(file)
    assert found["tree graph"] == replace(launches.LAUNCHES["tree graph"], level=41)
    assert found["tree eager"] == launches.LAUNCHES["tree eager"]
    step = predict(LLAVA, H200, TREE, 1, stage="graph", launches=found)
    assert step.replayed == 32 * 12 + 5 + 30 + 64 + 4 * 41


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"tree": {}}',
        '{"launches": {"tree": {"level": 1}}}',
        '{"launches": {"chain": {"levels": 1}}}',
        '{"launches": {"chain": {"level": 1.5}}}',
        '{"launches": {"chain": {"level": -1}}}',
        '{"launches": {"chain": {"level": true}}}',
        '{"launches": {"chain": {"in_graph": 1}}}',
        '{"launches": {"chain": 30}}',
    ],
)
def test_a_wrong_file_of_launches_is_refused(tmp_path, text):
    file = tmp_path / "launches.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="expected"):
        launches.read(file)
    with pytest.raises(ConfigError, match="expected"):
        launches.read(tmp_path / "absent.json")


LIMITS = {"requests": 1024, "max_tokens": 8192}  # of a default server on an 80 GB device
LARGE_TREES = [TreeConfig(24, 5, 4), TreeConfig(30, 5, 10), TreeConfig(60, 6, 10)]


@pytest.mark.parametrize("vocab", [32_064, 152_064])
@pytest.mark.parametrize("tree", LARGE_TREES, ids=str)
def test_scratch_is_what_the_engine_allocates(tree, vocab):
    found = scratch.drafting_bytes(tree=tree, vocab=vocab, hidden=4096, **LIMITS)
    at_once = tree.shape.requests_at_once(1024, 8192, vocab, 2)
    buffers = GrowthBuffers.allocate(tree.shape, at_once, vocab, torch.device("meta"))
    tensors = (buffers.parts, *buffers.best, *buffers.candidates, *buffers.beams)
    assert found["growth"] == sum(t.nbytes for t in tensors)
    store = TreeStore(1024, 8192, tree.num_nodes + 1, "meta")
    assert found["trees"] == sum(t.nbytes for t in (store.parents, store.depths, store.ancestors))
    assert found["roots"] == 1024 * (4096 * 2 + 8)
    assert found["logits"] == at_once * tree.top_k * vocab * 2 <= LOGITS_BYTES
    assert sum(found.values()) < 256e6
    # One request more would not fit: the limit is used.
    assert at_once == 819 or (at_once + 1) * tree.top_k * vocab * 2 > LOGITS_BYTES


def test_scratch_of_chains_is_the_logits_of_all():
    chain = TreeConfig(5, 5, 1)
    found = scratch.drafting_bytes(tree=chain, vocab=32_064, hidden=4096, **LIMITS)
    assert found == {"logits": 1024 * 32_064 * 2}


def test_verification_logits_at_1024_sequences():
    rows, floats = 1024 * 25, 2**30 // (32_064 * 4) * 32_064 * 4
    assert scratch.verification_bytes(1024, 24, 32_064) == rows * 32_064 * 2 + floats
    assert 2**30 - 32_064 * 4 < floats <= 2**30
    assert scratch.verification_bytes(1, 24, 152_064) == 25 * 152_064 * 6
    # 8192 rows in float32 are less than 1 GiB, of 152k words they are not.
    step = {vocab: scratch.verification_bytes(1024, 24, vocab, max_tokens=8192)
            for vocab in (32_064, 152_064)}  # fmt: skip
    assert step == {32_064: 8192 * 32_064 * 6, 152_064: 152_064 * (8192 * 2 + 1765 * 4)}
    assert scratch.float_rows(8192, 2000, 152_064) == 2001  # one request is never split


def test_the_page_states_the_scratch():
    """docs/kernels.md, in MB: of what drafting holds, and of the verified logits."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for tree in LARGE_TREES:
        cells = [f"{tree.num_nodes} nodes, depth {tree.depth}, top-k {tree.top_k}"]
        for vocab in (32_064, 152_064):
            drafting = scratch.drafting_bytes(tree=tree, vocab=vocab, hidden=4096, **LIMITS)
            logits = scratch.verification_bytes(nodes=tree.num_nodes, vocab=vocab, **LIMITS)
            cells += [f"{sum(drafting.values()) / 1e6:.0f}", f"{logits / 1e6:.0f}"]
        assert f"| {' | '.join(cells)} |" in page


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("roofline", ROOT / "benchmarks" / "roofline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks/roofline.py", *map(str, arguments)])
    return script.main()


def test_script_writes_what_it_prints(script, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "new" / "roofline.json", tmp_path / "roofline.png"
    assert run(
        script, monkeypatch, "--models", "llava-1.5-7b", "--devices", "h200", "--batches", 8, 1,
        "--context", 900, "--scratch", "--output", output, "--plot", plot,
    ) == 0  # fmt: skip
    text, result = capsys.readouterr().out, json.loads(output.read_text())
    assert "not measured" in text and result["note"] == "arithmetic, not measured"
    assert result["command"].startswith("python ") and result["versions"]["vllm-msd"]
    assert result["devices"]["h200"]["free_rows"] == 163
    assert [(row["batch"], row["drafted"]) for row in result["steps"]] == [
        (batch, arm.name) for batch in (1, 8) for arm in ARMS
    ]
    tree = result["steps"][2]
    assert result["settings"]["launches"] == "benchmarks/results/launches.json"
    counted = launches.read(ROOT / result["settings"]["launches"])
    expected = predict(LLAVA, H200, TREE, 1, context=900, launches=counted)
    assert tree["gpu_alone"]["ms"] == pytest.approx(expected.bound * 1e3, abs=1e-3)
    assert sum(tree["gpu_alone"]["parts_ms"].values()) == pytest.approx(tree["gpu_alone"]["ms"],
                                                                        abs=1e-3)  # fmt: skip
    plain = predict(LLAVA, H200, NONE, 1, context=900, launches=counted)
    slow, base = expected.seconds(hidden=False), plain.seconds(hidden=False)
    assert tree["fused"]["in_turn"]["speedup"] == pytest.approx(4.4 * base / slow, abs=1e-3)
    assert tree["eager"]["in_turn"]["ms"] > tree["fused"]["in_turn"]["ms"]
    assert f"{tree['gpu_alone']['ms']:.2f} ms" in text
    assert result["scratch"][1]["drafting"]["logits"] == LOGITS_BYTES // (4 * 32_064 * 2) * (
        4 * 32_064 * 2
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_script_takes_counted_launches(script, monkeypatch, tmp_path):
    def written(*arguments):
        output = tmp_path / "out.json"
        options = ("--models", "qwen2-vl-7b", "--devices", "h100", "--batches", 1)
        assert run(script, monkeypatch, *options, "--output", output, *arguments) == 0
        return json.loads(output.read_text())

    counted = tmp_path / "launches.json"
    counted.write_text('{"launches": {}}')
    before = written("--launches", counted)
    counted.write_text('{"launches": {"tree eager": {"level": 160}}}')
    after = written("--launches", counted)
    assert after["launches"]["tree eager"]["level"] == 160
    for row, expected in ((1, 0.0), (2, 400 * 7e-3)):  # the chain's stay; 4 levels of 100 more
        ms = [result["steps"][row]["eager"]["in_turn"]["ms"] for result in (before, after)]
        assert ms[1] - ms[0] == pytest.approx(expected, abs=2e-3)


def test_script_says_what_is_wrong(script, monkeypatch, capsys, tmp_path):
    for arguments in (
        ("--batches", 257), ("--batches", 0), ("--context", "-5"), ("--models", "llava"),
        ("--tokens", 3),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(script, monkeypatch, *arguments)
        assert stopped.value.code == 2
    assert run(script, monkeypatch, "--launches", tmp_path / "absent.json") == 2
    assert "error: launches: " in capsys.readouterr().err


def test_the_table_of_draft_vocabularies():
    """`docs/training.md` says what `predict` gives, on an H100 as on an H200."""
    text = (ROOT / "docs" / "training.md").read_text()
    for vocab in (65_536, 32_768, 16_384, 8_192):
        for device in (H100, H200):
            cells = []
            for shape, arm in ((QWEN, CHAIN), (QWEN, WIDE), (LLAVA, CHAIN)):
                whole = predict(shape, device, arm, 1).bound
                trimmed = predict(shape, device, arm, 1, draft_vocab=vocab).bound
                cells.append(f"{whole / trimmed:.2f}x" if vocab < shape.vocab else "-")
            assert f"| {vocab:,} | {' | '.join(cells)} |" in text
    level = QWEN.layer_parameters + QWEN.fc_parameters
    sizes = [2e-9 * (level + rows * QWEN.hidden) for rows in (QWEN.vocab, 32_768)]
    assert f"reads {sizes[0]:.2f} GB" in text and f"a level is {sizes[1]:.2f} GB" in text
    assert f"is {QWEN.head_parameters / (level + QWEN.head_parameters):.0%}".replace("%", " %") in (
        " ".join(text.split())
    )


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H200", H200),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_devices_are_known_by_the_drivers_name(name, device):
    assert device_named(name) is device

"""The kernels that grow a tree, in Triton's interpreter: against eager twins and `grow_tree`.

What could go wrong in a kernel and not in its definition: equal scores, rows of padding requests,
block boundaries, positions past the model's limit, the bit of the 64th row, parents' numbers across
levels, host reads. The last tests break the kernels on purpose.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernels.
"""

import importlib
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch

from tests.common.growth import GrowthBatch, ToyDraft, random_step
from tests.common.launches import NoOperation
from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from vllm_msd.kernels import DraftPlace, LevelInputs, beam_step, top_k_parts
from vllm_msd.kernels.beam_step.eager import beam_step_eager
from vllm_msd.tree import DraftLevels, GrowthBuffers, TreeShape, Vocabulary, grow_tree_fused

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1"
)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


# Beam step


def tensors_of(step):
    written = (*step["candidates"], *step["beams"], *step["inputs"])
    return [t.clone() for t in written]


@pytest.mark.parametrize(
    ("k", "depth"), [(1, 8), (2, 3), (3, 4), (4, 4), (7, 2), (8, 8), (10, 5), (16, 4)]
)
def test_beam_step_equals_its_twin(k, depth):
    """Every level, with padding requests, requests at the model's limit and many equal scores."""
    for level in sorted({0, 1, 2, depth - 1, depth}):
        slots = [1, -1, 0]
        seed = 100 * k + level
        step, twin = (random_step(k, depth, level, slots, seed) for _ in range(2))
        before = tensors_of(step)
        beam_step(**step)
        beam_step_eager(**twin)
        written = tensors_of(step)
        for i, (ours, expected) in enumerate(zip(written, tensors_of(twin), strict=True)):
            assert torch.equal(ours, expected), f"level {level}, tensor {i}"
        assert not torch.equal(written[0], before[0])
        if level < depth:
            slots_written = written[8][: len(slots) * k].view(len(slots), k)
            assert (slots_written[1] == -1).all() and (slots_written[0] != -7).all()
        else:
            assert all(map(torch.equal, written[3:], before[3:])), "the last step feeds nobody"


def test_one_levels_logits_at_a_time():
    """The largest tensors of a round: those of a level are gone before the next one's are made."""
    batch = GrowthBatch.make(ToyDraft(40, seed=1), TreeShape(12, depth=3, top_k=3), [1, 0])
    inputs, made, still = batch.inputs(), [], []
    feed = batch.expand_paged(inputs)

    def noted(logits):
        made.append(weakref.ref(logits))
        return logits

    def expand(*args):
        still.append(sum(logits() is not None for logits in made))
        logits, hidden = feed(*args)
        return noted(logits), hidden

    drafts = torch.zeros(2, 11, dtype=torch.int64)
    grow_tree_fused(
        noted(batch.draft.logits(batch.root_hidden)), batch.root_hidden, expand, batch.buffers(),
        inputs, batch.place, batch.relations(), drafts,
    )  # fmt: skip
    assert still == [0, 0, 0] and len(made) == 4


@pytest.mark.parametrize("level", [0, 1, 3])
def test_rows_stand_where_the_levels_say(level):
    """Positions, lengths and slots by the same arithmetic as the engine's."""
    k, depth, requests = 3, 4, [2, 0, 1]
    step = random_step(k, depth, level, requests, seed=level)
    step["place"].first.copy_(torch.tensor([50, 10, 3]))
    beam_step(**step)
    place, inputs, rows = step["place"], step["inputs"], len(requests) * k
    levels = DraftLevels(place.first, depth, k, place.max_model_len)
    assert torch.equal(inputs.positions[:rows], levels.rotary_positions(level))
    assert inputs.seq_lens[: len(requests)].tolist() == levels.seq_lens(level).tolist()
    position, past = levels.kv_positions(level)
    row_slots = place.slots.repeat_interleave(k)
    block = place.block_table[row_slots, position // place.block_size].long()
    expected = block * place.block_size + position % place.block_size
    assert torch.equal(inputs.kv_slots[:rows], torch.where(past, -1, expected))
    assert past.any() == (level == 3), "the limit lies in the last level"
    if level == 0:
        assert torch.equal(step["beams"].tree_start[: len(requests)], levels.tree_start())


def test_beam_step_at_the_models_limit():
    """Two requests whose drafted rows fit or end outside: no slot there, positions clamped."""
    k, depth = 2, 2
    step = random_step(k, depth, 0, [0, 1], seed=1, max_model_len=10)
    step["place"].first.copy_(torch.tensor([6, 7]))
    beam_step(**step)
    assert step["beams"].tree_start[:2].tolist() == [6, -1]
    step |= {"level": 1, "log_probs": torch.zeros(4, k), "tokens": torch.zeros(4, k).int()}
    step["parent_hidden"] = torch.zeros(4, 20).bfloat16()
    beam_step(**step)
    inputs = step["inputs"]
    assert inputs.positions[:4].tolist() == [7, 7, 8, 8]
    assert inputs.seq_lens[:2].tolist() == [10, 10]
    assert [s == -1 for s in inputs.kv_slots[:4].tolist()] == [False, False, False, True]


def test_beam_step_refuses_what_does_not_fit():
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            beam_step(**(random_step(3, 2, 1, [0, 1], seed=0) | changes))

    step = random_step(3, 2, 1, [0, 1], seed=0)
    inputs, place = step["inputs"], step["place"]
    refused("level is 3: expected 0 to 2", level=3)
    refused("needs inputs", inputs=None)
    refused(r"log_probs is torch.float32 \[5, 3\]", log_probs=torch.zeros(5, 3))
    refused(r"inputs.input_ids is torch\.int64", inputs=inputs._replace(input_ids=inputs[1]))
    refused(r"place.slots is torch\.float32", place=place._replace(slots=torch.zeros(2)))
    refused("parent_hidden lies in the memory", parent_hidden=inputs.hidden[:6], inputs=inputs)
    refused("place.first lies in", place=place._replace(first=inputs.positions), inputs=inputs)
    with pytest.raises(ValueError, match="at most 64 rows"):
        beam_step(**random_step(16, 5, 1, [0], seed=0))


# The whole growth


GROWTHS = [
    (TreeShape(3, depth=0, top_k=2), False),
    (TreeShape(9, depth=7, top_k=1), True),
    (TreeShape(12, depth=3, top_k=3), False),
    (TreeShape(12, depth=3, top_k=3), True),
    (TreeShape(25, depth=4, top_k=4), True),
    (TreeShape(18, depth=8, top_k=2), False),
    (TreeShape(64, depth=1, top_k=16), True),
]
MIDDLE = GROWTHS[2][0]


@pytest.mark.parametrize(
    ("shape", "ties"), GROWTHS, ids=lambda x: str(getattr(x, "total_tokens", x))
)
def test_growth_equals_the_definition(shape, ties):
    """Ragged requests and padding, float32, and exact ties between branches."""
    draft = ToyDraft(60, seed=shape.total_tokens, ties=ties)
    slots = [2, -1, 0] if shape.top_k < 16 else [1]  # the interpreter is slow
    GrowthBatch.make(draft, shape, slots).assert_grows_the_same()


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_fewer_levels_grow_the_beginning_of_the_tree(levels):
    """As many nodes as levels can hold: in buffers of the whole tree, full of an earlier one."""
    batch = GrowthBatch.make(ToyDraft(40, seed=3), TreeShape(17, depth=3, top_k=4), [1, -1, 0, 2])
    whole = batch.by_definition()
    assert int(whole.depths[:, : levels + 2].max()) > 1 or levels == 0
    grow, trees = batch.prepared(levels=levels)
    grow()
    found, real = trees(), batch.place.slots >= 0
    for nodes in range(1, 17):
        if batch.shape.levels_for(nodes) > levels:
            break
        cut = slice(1, nodes + 1)
        for name in ("tokens", "parents", "depths", "ancestors"):
            ours, expected = getattr(found, name), getattr(whole, name)[real]
            assert torch.equal(ours[:, cut], expected[:, cut]), (name, nodes)
    # The rest is the best tree of so many levels.
    shape = batch.shape.shallower(levels)
    shallow = GrowthBatch(batch.draft, shape, batch.place, batch.root_hidden).by_definition()
    for name in ("tokens", "parents", "depths", "ancestors"):
        kept = slice(1, shape.total_tokens)
        assert torch.equal(getattr(found, name)[:, kept], getattr(shallow, name)[real][:, kept])
        assert not getattr(found, name)[:, shape.total_tokens :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_growth_in_half_precision(dtype):
    draft = ToyDraft(90, seed=4, dtype=dtype, ties=True)
    GrowthBatch.make(draft, MIDDLE, [1]).assert_grows_the_same()


def test_growth_over_a_draft_vocabulary_on_two_devices(monkeypatch):
    """The tree of one device and a full vocabulary, its tokens mapped."""
    batch = GrowthBatch.make(ToyDraft(60, seed=3), MIDDLE, [0, 1])
    expected = batch.by_definition()
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:60]
    embedding = torch.zeros(200, batch.draft.embedding.shape[1], dtype=torch.double)
    embedding[ids] = batch.draft.embedding
    batch.draft.embedding = embedding
    defined = batch.by_definition(token_ids=ids)
    whole, shards = batch.draft.logits, []

    def first_half(hidden):
        shards.append(whole(hidden)[:, 32:])
        return whole(hidden)[:, :32]

    def gather(parts):
        return torch.cat([parts, top_k_parts(shards.pop(), batch.shape.top_k, 32)], 1)

    monkeypatch.setattr(batch.draft, "logits", first_half)
    monkeypatch.setattr(batch.draft, "vocabulary", 32)
    found = batch.by_kernels(Vocabulary(token_ids=ids, gather=gather))
    assert torch.equal(found.parents, expected.parents)
    for tree in (found, defined):
        assert torch.equal(tree.tokens[:, 1:], ids[expected.tokens[:, 1:]])


# Mutations: each must change a tree


FOLDERS = {"merge_top_k_kernel": "top_k", "top_k_parts_kernel": "top_k"}


@interpreted
@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("beam_step_kernel", "order_key(score, child)", "order_key(score, CHILDREN - child)"),
        ("beam_step_kernel", "(level - 1) * K * K", "level * K * K"),
        ("beam_step_kernel", "last_level + child // K", "last_level + child % K"),
        ("beam_step_kernel", "chosen // K  #", "chosen % K  #"),
        ("beam_step_kernel", "minimum(level * K + row,", "minimum(row,"),
        ("beam_step_kernel", "position = first + level * K", "position = first + level"),
        ("beam_step_kernel", "tl.minimum(first + level,", "tl.minimum(first,"),
        ("rerank_kernel", "order_key(score, candidate)", "order_key(score, 999 - candidate)"),
        ("rerank_kernel", "node[None, :] + 1, 0)", "node[None, :], 0)"),
        ("rerank_kernel", "range(JUMPS)", "range(JUMPS - 1)"),
        ("merge_top_k_kernel", "logit - log_sum", "logit"),
        ("top_k_parts_kernel", "keys < best", "keys <= best"),
    ],
)
def test_mutations_are_noticed(kernel, old, new, tmp_path, monkeypatch):
    """A piece of a kernel's source is replaced; the tie rule is the first and the eighth."""
    folder = FOLDERS.get(kernel, kernel.removesuffix("_kernel"))
    original = importlib.import_module(f"vllm_msd.kernels.{folder}.triton_kernel")
    source = Path(original.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "mutated.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{original.__name__}_mutated", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setattr(original, kernel, getattr(changed, kernel))
    shape = TreeShape(12, depth=3, top_k=2)
    with pytest.raises((AssertionError, IndexError)):
        for ties in (False, True):
            draft = ToyDraft(60, seed=1, ties=ties)
            GrowthBatch.make(draft, shape, [1]).assert_grows_the_same()


# Launches


@interpreted
def test_the_launches_read_no_tensor_and_are_few(monkeypatch):
    """Meta tensors have no contents: anything decided by a score or a length would raise."""
    from vllm_msd.kernels.beam_step import triton_kernel as beam_code
    from vllm_msd.kernels.rerank import triton_kernel as rerank_code
    from vllm_msd.kernels.top_k import triton_kernel as top_k_code

    launches = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.name, grid))

    for code, kernel in (
        (top_k_code, "top_k_parts_kernel"),
        (top_k_code, "merge_top_k_kernel"),
        (beam_code, "beam_step_kernel"),
        (rerank_code, "rerank_kernel"),
    ):
        monkeypatch.setattr(code, kernel, Recorder(kernel))
    shape, num_requests, vocabulary, hidden = TreeShape(25, depth=4, top_k=4), 8, 152_064, 3584
    rows, meta = num_requests * shape.top_k, torch.device("meta")
    buffers = GrowthBuffers.allocate(shape, num_requests, vocabulary, meta)
    integers = torch.zeros(rows, dtype=torch.int32, device=meta)
    inputs = LevelInputs(
        integers, integers.long(), integers.long(), integers,
        torch.zeros(rows, hidden, dtype=torch.bfloat16, device=meta),
    )  # fmt: skip
    place = DraftPlace(integers.long(), integers, integers.view(8, 4), 16, 8192)
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=meta)
    relations = tuple(torch.zeros(9, 25, dtype=torch.int64, device=meta) for _ in range(3))
    drafts = torch.zeros(8, 24, dtype=torch.int64, device=meta)
    out = torch.zeros_like(inputs.hidden)
    root = (logits[:num_requests], out[:num_requests])
    with NoOperation(views=True):
        grow_tree_fused(*root, lambda *_: (logits, out), buffers, inputs, place, relations, drafts)
    assert len(launches) == 3 * (shape.depth + 1) + 1
    assert launches[3:6] == [
        ("top_k_parts_kernel", (rows, 38)),
        ("merge_top_k_kernel", (rows,)),
        ("beam_step_kernel", (num_requests, 4)),
    ]
    assert launches[-1] == ("rerank_kernel", (num_requests,))

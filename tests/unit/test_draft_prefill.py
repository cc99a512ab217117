"""The draft's rows along accepted paths: the twin here, the kernel in the interpreter.

What could go wrong: the token beside a hidden state, rows behind a path that hold NaN, padding
requests that write into the cache, a path cut at the width, several programs a row.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernel.
"""

import pytest
import torch

from tests.common.launches import NoOperation
from tests.common.prefill_step import BLOCK_SIZE, make_step
from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from vllm_msd.kernels import draft_prefill


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


@pytest.mark.parametrize(
    ("width", "hidden_size", "dtype"),
    [(4, 40, torch.float32), (6, 40, torch.bfloat16), (8, 3000, torch.float16)],
)
def test_rows_follow_the_paths(width, hidden_size, dtype):
    paths, step, table, inputs, rows = make_step(width, hidden_size, dtype, seed=width)
    draft_prefill(step, table, BLOCK_SIZE, width, inputs, rows)
    padded = len(inputs.seq_lens)
    for request, path in enumerate(paths):
        begin, root = request * width, int(step.root_rows[request])
        slot, start = int(step.slots[request]), int(step.tree_start[request])
        own = slice(begin, begin + width)
        behind = [0] * (width - len(path))
        ids = [int(step.input_ids[root + node]) for node in path[1:]]
        assert inputs.input_ids[own].tolist() == [*ids, int(step.emitted[slot]), *behind]
        positions = list(range(start, start + width))
        assert inputs.positions[own].tolist() == positions
        slots = [int(table[slot, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        assert inputs.kv_slots[own].tolist() == slots
        expected = torch.zeros(width, hidden_size, dtype=dtype)
        expected[: len(path)] = step.hidden[[root + node for node in path]]
        assert torch.equal(inputs.hidden[own], expected)
        assert rows.last_rows[request] == begin + len(path) - 1
        assert inputs.seq_lens[request] == start + width
    used = len(paths) * width
    assert inputs.kv_slots[used:].tolist() == [-1] * (2 * width)
    assert inputs.seq_lens[-2:].tolist() == [0, 0]
    assert rows.query_start.tolist() == [min(i * width, used) for i in range(padded + 1)]
    assert rows.slots.tolist() == [*step.slots.tolist(), -1, -1]
    assert rows.last_rows[-2:].tolist() == [0, 0]


def test_what_does_not_fit_is_refused():
    _, step, table, inputs, rows = make_step(4, 40)
    arguments = {
        "step": step, "block_table": table, "block_size": BLOCK_SIZE, "width": 4,
        "inputs": inputs, "rows": rows,
    }  # fmt: skip
    for bad, message in (
        ({"step": step._replace(slots=step.slots.float())}, r"slots is torch\.float32"),
        ({"step": step._replace(nodes=step.nodes.int())}, r"nodes is torch\.int32"),
        ({"width": 9}, r"inputs\.input_ids is torch\.int32 \[28\]"),
        ({"width": 0}, "width 0"),
        ({"inputs": inputs._replace(hidden=inputs.hidden[:, 1:])}, "hidden is"),
        ({"rows": rows._replace(query_start=rows.query_start[1:])}, r"rows\.query_start is"),
    ):
        with pytest.raises(ValueError, match=message):
            draft_prefill(**arguments | bad)


@pytest.mark.skipif(not INTERPRETED, reason="the launch is looked at with the interpreter on")
def test_the_launch_reads_no_tensor(monkeypatch):
    """Meta tensors have no contents: anything decided by a length would raise."""
    from vllm_msd.kernels.draft_prefill import triton_kernel

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    monkeypatch.setattr(triton_kernel, "draft_prefill_kernel", Recorder())
    _, step, table, inputs, rows = make_step(4, 3000)
    step, inputs, rows = (type(x)(*(t.to("meta") for t in x)) for x in (step, inputs, rows))
    table = table.to("meta")
    with NoOperation(views=True):
        draft_prefill(step, table, BLOCK_SIZE, 4, inputs, rows)
    assert grids == [(7, 2)]

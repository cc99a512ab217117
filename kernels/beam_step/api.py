"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import INTEGERS, describe, expect_room, runs_kernels
from ..tree_attention.eager import MAX_NODES
from ..tree_attention.launch import power_of_two
from .eager import beam_step_eager

TILE = 4096  # hidden values that a program moves at once


class Candidates(NamedTuple):
    """Every token that a growing tree proposed, ``k`` of the root and ``k * k`` of every level.

    ``scores [R, n]`` float32, the log-probability of the path from the root. ``tokens [R, n]``
    int32. ``parents [R, n]`` int32, an earlier candidate, -1 for the root. Within a level they
    stand by parent, then by rank; a candidate never scores higher than its parent.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor

    @classmethod
    def allocate(cls, num_requests: int, depth: int, k: int, device: torch.device) -> "Candidates":
        """Of ``depth`` levels below the root's children."""
        shape = (num_requests, k + depth * k * k)
        tokens, parents = torch.empty(2, *shape, dtype=torch.int32, device=device)
        return cls(torch.empty(shape, dtype=torch.float32, device=device), tokens, parents)


class Beams(NamedTuple):
    """The rows of every level that were fed to the draft.

    ``numbers [depth, R, k]`` int32, the candidate of each row. ``ancestors [depth, R, k]`` int64,
    bit ``l * k + j`` set where it sees row j of level l, itself included. ``tree_start [R]`` int32,
    the position of the first drafted row; -1 for padding, and where not all of them fit.
    """

    numbers: Tensor
    ancestors: Tensor
    tree_start: Tensor

    @classmethod
    def allocate(cls, num_requests: int, depth: int, k: int, device: torch.device) -> "Beams":
        shape = (depth, num_requests, k)
        return cls(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(num_requests, dtype=torch.int32, device=device),
        )


class LevelInputs(NamedTuple):
    """What a pass of the draft reads; row ``r * k + j`` is row j of request r.

    ``input_ids [rows]`` int32, ``positions [rows]`` int64 rotary positions, ``kv_slots [rows]``
    int64, -1 for none, ``seq_lens [R]`` int32, ``hidden [rows, H]`` any dtype. They may be longer.
    """

    input_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    seq_lens: Tensor
    hidden: Tensor


class DraftPlace(NamedTuple):
    """Where the drafted rows of R requests lie.

    ``first [R]`` int64, the position after the request's last row. ``slots [R]`` int32 or int64,
    its row in the block table; -1 for a request that pads a batch. ``block_table [slots, blocks]``
    int32. ``max_model_len``: positions from there on do not exist.
    """

    first: Tensor
    slots: Tensor
    block_table: Tensor
    block_size: int
    max_model_len: int


def beam_step(
    log_probs: Tensor,
    tokens: Tensor,
    level: int,
    candidates: Candidates,
    beams: Beams,
    inputs: LevelInputs | None = None,
    parent_hidden: Tensor | None = None,
    place: DraftPlace | None = None,
) -> None:
    """Keep a level's children as candidates and make the k best of them the next level's rows.

    A tree of ``depth`` levels takes ``depth + 1`` steps: step 0 gets the root's k children, step l
    the children of the rows that step l - 1 wrote, and the last one has no more rows to write. A
    child's score is its parent's plus its own log-probability; the rows are the k highest scores in
    descending order, the earlier candidate first at a tie::

        step 0   root's children       a  b            rows  a b      (k = 2)
        step 1   children of a and b   c  d  e  f      rows  d f      ancestors {a, d} {b, f}
        candidates  0 1 2 3 4 5 = a b c d e f          parents -1 -1 0 0 1 1

    Row j of level l has the rotary position ``first + l`` and the KV slot of position
    ``first + l * k + j``; positions stay inside ``max_model_len``, beyond it there is no slot. A
    request that pads the batch gets position 0, length 0 and no slots.

    Args:
        log_probs: [R, k] float32 in step 0, [R * k, k] then, contiguous, each row in descending
            order: what `top_k` gives. Not above 0.
        tokens: int32, likewise.
        level: 0 to depth.
        candidates: written at this level's numbers.
        beams: the level before is read, this one is written, and ``tree_start`` in step 0.
        inputs: written; not looked at in the last step, as the two arguments after it.
        parent_hidden: [R, H] in step 0, [R * k, H] then, the draft's output that gave the logits,
            from which each row gets its parent's. Not the memory of ``inputs.hidden``.
        place: where the rows lie; ``first`` is not the memory of ``inputs.positions``.

    On CUDA tensors one launch does everything; it reads no tensor on the host and can be captured
    in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU
    tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    if beams.numbers.dim() != 3:
        raise ValueError(f"beams.numbers is {describe(beams.numbers)}, expected [depth, R, k]")
    depth, capacity, k = beams.numbers.shape
    if not 0 <= level <= depth:
        raise ValueError(f"level is {level}: expected 0 to {depth}, the levels of the beams")
    if depth * k > MAX_NODES:
        raise ValueError(f"{depth} levels of {k} rows: expected at most {MAX_NODES} rows in all")
    parents = k if level else 1
    num_requests = -(-len(log_probs) // parents)
    is_last = level == depth
    fitting = [
        ("log_probs", log_probs, torch.float32, (num_requests * parents, k)),
        ("tokens", tokens, torch.int32, (num_requests * parents, k)),
        ("beams.numbers", beams.numbers.flatten(0, 1), torch.int32, (depth * num_requests, k)),
        ("beams.ancestors", beams.ancestors, torch.int64, tuple(beams.numbers.shape)),
        ("beams.tree_start", beams.tree_start, torch.int32, (num_requests,)),
    ]
    for name, t in candidates._asdict().items():
        dtype = torch.float32 if name == "scores" else torch.int32
        fitting.append((f"candidates.{name}", t, dtype, (num_requests, k + depth * k * k)))
    if not is_last:
        if inputs is None or parent_hidden is None or place is None:
            raise ValueError(f"level {level} of {depth}: it needs inputs, parent_hidden and place")
        fitting += _of_next_rows(num_requests, parents, k, inputs, parent_hidden, place)
    for name, t, dtype, shape in fitting:
        expect_room(name, t, dtype, shape, log_probs.device)
    if num_requests == 0:
        return
    if not runs_kernels(log_probs):
        beam_step_eager(log_probs, tokens, level, candidates, beams, inputs, parent_hidden, place)
        return

    from .triton_kernel import beam_step_kernel

    if is_last or inputs is None or parent_hidden is None or place is None:
        rows: tuple[Any, ...] = (None,) * 9
        hidden_size, max_model_len, block_size, strides = 1, 0, 1, (0, 0, 0)
    else:
        rows = (*inputs, parent_hidden, *place[:3])
        hidden_size = parent_hidden.shape[1]
        max_model_len, block_size = place.max_model_len, place.block_size
        strides = inputs.hidden.stride(0), parent_hidden.stride(0), place.block_table.stride(0)
    slots = power_of_two(k)
    columns = min(power_of_two(hidden_size), TILE // slots)
    beam_step_kernel[(num_requests, -(-hidden_size // columns))](
        log_probs,
        tokens,
        *candidates,
        *beams,
        *rows,
        level,
        depth,
        max_model_len,
        hidden_size,
        candidates.scores.stride(0),
        capacity * k,
        *strides,
        K=k,
        IS_ROOT=level == 0,
        SLOTS=slots,
        CHILDREN=power_of_two(parents * k),
        BLOCK_SIZE=block_size,
        COLUMNS=columns,
        IS_LAST=is_last,
        num_warps=4,
    )


def _of_next_rows(
    num_requests: int,
    parents: int,
    k: int,
    inputs: LevelInputs,
    parent_hidden: Tensor,
    place: DraftPlace,
) -> list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]]:
    """What `expect_room` has to be told of these arguments."""
    if place.slots.dtype not in INTEGERS or place.block_table.dim() != 2:
        raise ValueError(
            f"place.slots is {describe(place.slots)}, expected int32 or int64 [R], and "
            f"place.block_table is {describe(place.block_table)}, expected [slots, blocks]"
        )
    for name, read, written in (
        ("parent_hidden", parent_hidden, inputs.hidden),
        ("place.first", place.first, inputs.positions),
    ):
        if read.device.type != "meta" and _storage(read) == _storage(written):
            raise ValueError(f"{name} lies in the memory that the step writes: give it a copy")
    rows, hidden = num_requests * k, tuple(inputs.hidden.shape[1:])
    return [
        ("inputs.input_ids", inputs.input_ids, torch.int32, (rows,)),
        ("inputs.positions", inputs.positions, torch.int64, (rows,)),
        ("inputs.kv_slots", inputs.kv_slots, torch.int64, (rows,)),
        ("inputs.seq_lens", inputs.seq_lens, torch.int32, (num_requests,)),
        ("inputs.hidden", inputs.hidden, parent_hidden.dtype, (rows, *hidden)),
        ("parent_hidden", parent_hidden, parent_hidden.dtype, (num_requests * parents, *hidden)),
        ("place.first", place.first, torch.int64, (num_requests,)),
        ("place.slots", place.slots, place.slots.dtype, (num_requests,)),
        ("place.block_table", place.block_table, torch.int32, tuple(place.block_table.shape)),
    ]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()

"""How a batch of trees becomes a batch of ordinary causal requests over the same paged cache.

vLLM's CPU attention knows no masks, and the layout inside its cache blocks depends on the machine.
So a tree is split into its root-to-leaf paths, and each path becomes a request of its own: the
context's full blocks, which all paths share, and private scratch blocks that hold the rest of the
context and the path's rows. A node is a query in exactly one of the paths that contain it::

            0         context | tree rows      requests made of it (queries in brackets)
          /   \\        c c c  | 0 1 2 3        c c c [0 1 3]
         1     2                               c c c  0 [2]
         |
         3

Here is only the bookkeeping, on integers; the copies are in ``attention``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.tree import TreeRows

_UNSIGNED = (1 << 64) - 1


@dataclass
class PathCall:
    """One call of the stock attention, with as many paths as the scratch blocks can hold.

    Scratch blocks are numbered from 0 here; where they lie in the cache differs between layers.

    Attributes:
        query_rows: ``[q]`` int64 rows of the step, in the order in which they are asked.
        query_start_loc: ``[P + 1]`` int32 first query of each request made.
        seq_lens: ``[P]`` int32 keys of each request made.
        max_query_len, max_seq_len: the largest of them.
        block_table: ``[P, blocks]`` int32.
        scratch_cells: ``[c]`` int64, which cells of the flat block table are scratch blocks.
        scratch_blocks: ``[c]`` int32 their numbers.
        tail_blocks: ``[n]`` int64 cache blocks to copy, whole, to scratch blocks 0 to n - 1.
        copies: which of the plan's copied rows this call needs.
        slots: ``[copies]`` int64 where they go: scratch block * block size + offset.
    """

    query_rows: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int
    block_table: Tensor
    scratch_cells: Tensor
    scratch_blocks: Tensor
    tail_blocks: Tensor
    copies: slice
    slots: Tensor


@dataclass
class PathPlan:
    """What all layers with the same metadata do in one forward pass.

    Attributes:
        copied_rows: ``[m]`` int64 rows whose keys and values are copied, a row once per path.
            Draft levels count the rows of the level before first (its own copies), then the
            step's.
        copy_of_row: ``[rows]`` int64 a copy of each of the step's rows, -1 where there is none.
        copy_of_bit: per request, a copy of each node on its paths; the next level looks it up.
        calls: the stock calls; together they ask every row of the step once.
    """

    copied_rows: Tensor
    copy_of_row: Tensor
    copy_of_bit: list[dict[int, int]]
    calls: list[PathCall]


@dataclass
class _Request:
    """A causal request made of a path, or of the rows that need no path."""

    source: int  # request of the step
    query_rows: list[int]
    seq_len: int
    context: int  # keys that are not on the path
    bits: list[int]  # the path, empty if every key lies where the request has it already


def plan_paths(
    tree: TreeRows,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    block_size: int,
    num_scratch_blocks: int,
    older: PathPlan | None = None,
) -> PathPlan:
    """Split the trees of one forward pass into paths.

    Args:
        tree: the trees.
        query_start_loc: ``[R + 1]`` int32 first row of each request; empty requests are allowed.
        seq_lens: ``[R]`` int32 keys of each request, its query rows included.
        block_table: ``[R, blocks]`` int32.
        block_size: slots of a cache block.
        num_scratch_blocks: how many scratch blocks one call can use.
        older: the plan of the drafting round's level before.

    Raises:
        ValueError: masks that are no tree's, trees that do not fit the rows, or a path that does
            not fit the scratch blocks.
    """
    starts = query_start_loc.tolist()
    num_rows = starts[-1]
    requests, copied_rows, copy_of_bit = [], [], []
    copy_of_row = [-1] * num_rows
    num_older = 0 if older is None else len(older.copied_rows)
    masks = tree.ancestors[:num_rows].tolist()
    tree_starts = tree.tree_start.tolist()

    for source, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[source], starts[source + 1]
        first = tree_starts[source]
        copies: dict[int, int] = {}
        copy_of_bit.append(copies)
        if begin == end:
            continue
        root_row = end if first < 0 else begin if tree.is_draft else end - (seq_len - first)
        if not begin <= root_row <= end or (root_row == end and first >= 0):
            raise ValueError(
                f"request {source}: a tree that starts at position {first} does not fit "
                f"{end - begin} rows that end at position {seq_len}"
            )
        if begin < root_row:
            rows = list(range(begin, root_row))
            requests.append(_Request(source, rows, seq_len - (end - root_row), 0, []))
        if root_row == end:
            continue

        row_of_bit = _rows_by_bit(masks[root_row:end], root_row, tree.is_draft)
        sources = (
            {bit: num_older + row for bit, row in row_of_bit.items()}
            if tree.is_draft
            else row_of_bit
        )
        if older is not None:
            sources |= older.copy_of_bit[source]
        for bits, asked in _paths(row_of_bit, masks):
            rows = [row_of_bit[bit] for bit in asked]
            length = first + len(bits)
            # The first nodes in a row lie in the cache as their path needs them.
            if not tree.is_draft and bits[-1] == len(bits) - 1:
                requests.append(_Request(source, rows, length, length, []))
                continue
            requests.append(_Request(source, rows, length, first, bits))
            for bit in bits:
                if bit not in sources:
                    raise ValueError(
                        f"request {source}: no row of this or the level before is {bit}"
                    )
                copies.setdefault(bit, len(copied_rows))
                if bit in row_of_bit:
                    copy_of_row[row_of_bit[bit]] = copies[bit]
                copied_rows.append(sources[bit])

    return PathPlan(
        torch.tensor(copied_rows, dtype=torch.int64),
        torch.tensor(copy_of_row, dtype=torch.int64),
        copy_of_bit,
        _pack(requests, block_table, block_size, num_scratch_blocks),
    )


def _rows_by_bit(masks: list[int], first_row: int, is_draft: bool) -> dict[int, int]:
    """The row of each node among the query rows: a row's own bit is the highest of its mask."""
    rows = {(mask & _UNSIGNED).bit_length() - 1: first_row + i for i, mask in enumerate(masks)}
    if (
        len(rows) != len(masks)
        or -1 in rows
        or (not is_draft and list(rows) != list(range(len(rows))))
    ):
        raise ValueError(f"rows {first_row} to {first_row + len(masks) - 1}: masks of no tree")
    return rows


def _paths(row_of_bit: dict[int, int], masks: list[int]) -> list[tuple[list[int], list[int]]]:
    """Root-to-leaf paths as ``(nodes, nodes asked)``; the asked ones are the end of the path."""
    inner = 0
    for bit, row in row_of_bit.items():
        inner |= masks[row] & _UNSIGNED & ~(1 << bit)
    paths, done = [], 0
    for bit, row in row_of_bit.items():
        if inner >> bit & 1:
            continue
        mask = masks[row] & _UNSIGNED
        bits = [b for b in range(bit + 1) if mask >> b & 1]
        asked = [b for b in bits if b in row_of_bit and not done >> b & 1]
        if bits[-len(asked) :] != asked or any(
            masks[row_of_bit[b]] & _UNSIGNED != mask & ((2 << b) - 1) for b in asked
        ):
            raise ValueError(f"row {row}: its ancestors' masks are not part of its own")
        done |= mask
        paths.append((bits, asked))
    return paths


def _pack(
    requests: list[_Request], block_table: Tensor, block_size: int, num_scratch_blocks: int
) -> list[PathCall]:
    """Distribute the requests over calls so that each call's scratch blocks suffice."""
    calls: list[list[_Request]] = [[]]
    used = 0
    for request in requests:
        blocks = _num_scratch(request, block_size)
        if blocks > num_scratch_blocks:
            raise ValueError(
                f"a path needs {blocks} scratch blocks, there are {num_scratch_blocks}"
            )
        if used + blocks > num_scratch_blocks:
            calls.append([])
            used = 0
        calls[-1].append(request)
        used += blocks
    packed, first_copy = [], 0
    for call in filter(None, calls):
        packed.append(_call(call, block_table, block_size, first_copy))
        first_copy = packed[-1].copies.stop
    return packed


def _num_scratch(request: _Request, block_size: int) -> int:
    if not request.bits:
        return 0
    return -(-request.seq_len // block_size) - request.context // block_size


def _call(
    requests: list[_Request], block_table: Tensor, block_size: int, first_copy: int
) -> PathCall:
    width = max(-(-r.seq_len // block_size) for r in requests)
    tails = [i for i, r in enumerate(requests) if r.bits and r.context % block_size]
    next_block = len(tails)  # blocks with a tail come first, so that one copy fills them all
    tail_of = {request: block for block, request in enumerate(tails)}
    query_rows: list[int] = []
    query_start, cells, blocks, slots = [0], [], [], []
    for i, request in enumerate(requests):
        query_rows += request.query_rows
        query_start.append(len(query_rows))
        full = request.context // block_size
        mine = []
        for j in range(_num_scratch(request, block_size)):
            if j == 0 and i in tail_of:
                mine.append(tail_of[i])
            else:
                mine.append(next_block)
                next_block += 1
            cells.append(i * width + full + j)
        blocks += mine
        for offset in range(
            request.context % block_size, request.context % block_size + len(request.bits)
        ):
            slots.append(mine[offset // block_size] * block_size + offset % block_size)

    source = torch.tensor([r.source for r in requests], dtype=torch.int64)
    table = torch.zeros(len(requests), width, dtype=torch.int32)
    shared = min(width, block_table.shape[1])
    torch.index_select(block_table[:, :shared], 0, source, out=table[:, :shared])
    seq_lens = [r.seq_len for r in requests]
    return PathCall(
        query_rows=torch.tensor(query_rows, dtype=torch.int64),
        query_start_loc=torch.tensor(query_start, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        max_query_len=max(len(r.query_rows) for r in requests),
        max_seq_len=max(seq_lens),
        block_table=table,
        scratch_cells=torch.tensor(cells, dtype=torch.int64),
        scratch_blocks=torch.tensor(blocks, dtype=torch.int32),
        tail_blocks=torch.stack(
            [block_table[requests[i].source, requests[i].context // block_size] for i in tails]
        ).long()
        if tails
        else torch.empty(0, dtype=torch.int64),
        copies=slice(first_copy, first_copy + len(slots)),
        slots=torch.tensor(slots, dtype=torch.int64),
    )

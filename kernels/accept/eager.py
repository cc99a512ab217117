"""The walk as its definition reads: one request at a time, from node to node."""

from torch import Tensor


def accept_eager(
    drawn: Tensor, tokens: Tensor, parents: Tensor, row_start: Tensor, out: tuple[Tensor, ...]
) -> None:
    """Same as ``accept``, into ``out`` (lengths, nodes, tokens); waits for the device."""
    lengths, nodes, emitted = out
    lengths.zero_()
    nodes.fill_(-1)
    emitted.fill_(-1)
    starts, up = row_start.tolist(), parents.tolist()
    for request, parent in enumerate(up):
        begin, end = starts[request], min(starts[request + 1], starts[request] + len(parent))
        draws, guesses = drawn[begin:end].tolist(), tokens[begin:end].tolist()
        node: int | None = 0 if draws else None
        depth = 0
        while node is not None:
            nodes[request, depth] = node
            emitted[request, depth] = draws[node]
            lengths[request] = depth
            depth += 1
            children = [j for j in range(node + 1, len(draws)) if parent[j] == node]
            node = next((j for j in children if guesses[j] == draws[node]), None)

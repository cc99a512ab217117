"""Arguments of `draft_prefill`, with outputs full of what nobody wrote."""

import torch

from vllm_msd.kernels import LevelInputs, PrefillRows, Verified

SLOTS, BLOCKS, BLOCK_SIZE = 7, 20, 4


def make_step(width, hidden_size, dtype=torch.float32, seed=0):
    """Five requests in trees of 12 rows, other rows around them, and buffers for seven."""
    g = torch.Generator().manual_seed(seed)
    paths = [[0], list(range(width)), [0, 3, 7, 11][:width], [0, 2], [0, 1, 5][:width]]
    nodes = torch.full((len(paths), 12), -1)
    for i, path in enumerate(paths):
        nodes[i, : len(path)] = torch.tensor(path)
    rows = 14 * len(paths) + 3
    hidden = torch.randn(rows, hidden_size + 1, generator=g).to(dtype)[:, :-1]
    step = Verified(
        nodes,
        torch.arange(len(paths)) * 14 + 2,
        torch.randint(0, BLOCKS * BLOCK_SIZE - width, (len(paths) + 2,), generator=g).int(),
        torch.randperm(SLOTS, generator=g)[: len(paths)],
        torch.randint(0, 999, (rows,), generator=g).int(),
        hidden,
        torch.randint(1000, 2000, (SLOTS, 1), generator=g),
    )
    table = torch.randperm(SLOTS * BLOCKS, generator=g).view(SLOTS, BLOCKS).int()
    padded = len(paths) + 2
    inputs = LevelInputs(
        torch.full((padded * width,), 7, dtype=torch.int32),
        torch.full((padded * width,), 7),
        torch.full((padded * width,), 7),
        torch.full((padded,), 7, dtype=torch.int32),
        torch.full((padded * width, hidden_size), float("nan"), dtype=dtype),
    )
    rows = PrefillRows(
        torch.full((padded + 1,), 7, dtype=torch.int32),
        torch.full((padded,), 7),
        torch.full((padded,), 7),
    )
    return paths, step, table, inputs, rows

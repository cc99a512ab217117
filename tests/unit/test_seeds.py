"""Draws by depth: a tree's nodes draw what tokens at their places would draw one by one."""

import torch

from vllm_msd.vllm_plugin.cpu.seeds import DrawsByDepth


def draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def one_by_one(seed: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [draw(generator) for _ in range(count)]


def test_each_depth_has_its_own_draw():
    generators = {0: torch.Generator().manual_seed(7), 2: torch.Generator().manual_seed(8)}
    # The root, two children of it and a grandchild; an unseeded request; a root alone.
    draws = DrawsByDepth(generators, [0, 4, 6, 7], [0, 1, 1, 2, 0, 1, 0], draw)
    first, second = one_by_one(7, 3), one_by_one(8, 1)
    found = {row: draw(generator) for row, generator in draws.of_rows.items()}
    assert found == {0: first[0], 1: first[1], 2: first[1], 3: first[2], 6: second[0]}


def test_generators_move_on_by_the_tokens_accepted():
    generators = {0: torch.Generator().manual_seed(7), 1: torch.Generator().manual_seed(9)}
    draws = DrawsByDepth(generators, [0, 3, 6], [0, 1, 2, 0, 1, 1], draw)
    for generator in draws.of_rows.values():
        draw(generator)  # what the sampler does with them is theirs alone
    draws.settle([3, 1])
    assert draw(generators[0]) == one_by_one(7, 4)[3]
    assert draw(generators[1]) == one_by_one(9, 2)[1]

"""The held-out samples that come with the package, as the world gives them.

    python -m demo_factory.held_out

writes them again to ``vllm_msd/demo/pair/samples``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vllm_msd.demo.samples import FOLDER, INDEX, HeldOutSample

from .world import KINDS, Sample, sample

# Training never sees the "test" split that they are from, at any seed.
FIRST_SEED = 10_000
COUNT = 105  # fifteen of each kind


def held_out_samples(count: int = COUNT, seed: int = FIRST_SEED) -> list[Sample]:
    """``count`` samples of the test split, the kinds in turn."""
    return [
        sample(KINDS[index % len(KINDS)], seed + index // len(KINDS), "test")
        for index in range(count)
    ]


def write(samples: Sequence[HeldOutSample], folder: Path) -> None:
    """Write what `vllm_msd.demo.samples` reads: images as PNG, an index with all the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, one in enumerate(samples):
        names = [f"{number:03}-{one.kind}-{i}.png" for i in range(len(one.images))]
        for name, image in zip(names, one.images, strict=True):
            image.save(folder / name, optimize=True)
        row = {"kind": one.kind, "images": names, "prompt": one.prompt}
        rows.append(json.dumps(row | {"answer": one.answer, "answer_key": one.answer_key}))
    (folder / INDEX).write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write(held_out_samples(), FOLDER)

"""Questions about pictures for the real target to answer: the drawn world's and `easy-vqa`'s."""

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.storage import write_json

from ..world.base import seeded
from ..write_data import row_of
from .pictures import MIX, TALK, Contents

SEED = 9  # of drawn contents that the target's own training has not seen
TURNS = 3


def write_questions(path: Path, count: int, processes: int = 1) -> None:
    """Write so many conversations to a JSON file, and their images to ``images/`` beside it.

    The answers are the right ones, and are to be replaced by the target's.
    """
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    make = partial(_question, folder=path.parent)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = list(tqdm(pool.imap(make, range(count), 32), total=count, unit="question"))
    write_json(path, rows)


def _question(number: int, folder: Path) -> dict[str, Any]:
    mix = {kind: share for kind, share in MIX.items() if kind != TALK}
    rng = seeded("questions", SEED, number)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    item = Contents(turns=TURNS)(kind, rng.getrandbits(40))
    return row_of(f"picture-{number}", item, folder)

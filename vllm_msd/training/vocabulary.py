"""Choosing a draft vocabulary: the tokens that replies are made of, counted.

Every tenth record is held out: it is not counted, and tells how much of what the choice has not
seen it covers. Where the counting stands is kept beside the result, so that a killed one goes on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vllm_msd.checkpoint import load_draft_vocabulary
from vllm_msd.draft.vocabulary import check_token_ids
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.storage import storage_errors, write_text
from vllm_msd.training.data.batches import Corpus
from vllm_msd.training.data.index import BadRecord, RecordFile
from vllm_msd.training.data.records import BadRecordError
from vllm_msd.training.data.render import Renderer
from vllm_msd.training.run_files import describe_data
from vllm_msd.training.settings import TrainSettings

COUNTS = "counts.json"
HELD_OUT = 10  # one record of so many
SAVE_SECONDS = 10.0  # between two notes of where the counting stands


class ReplyCounts:
    """How often each token stands in the replies of some records.

    Attributes:
        counted, held_out: int64 ``[V]``, of the records that count and of those held out.
        bad: records that could not be rendered.
        about: what was counted; counts of something else are no use.
    """

    def __init__(self, vocab_size: int, about: dict[str, Any]) -> None:
        self.counted = np.zeros(vocab_size, np.int64)
        self.held_out = np.zeros(vocab_size, np.int64)
        self.bad: list[BadRecord] = []
        self.about = about
        self.done = 0  # records, in the order of the files

    def add(self, found: np.ndarray | BadRecord) -> None:
        """Count the next record, by the tokens of its replies."""
        if isinstance(found, BadRecord):
            self.bad.append(found)
        else:
            is_held_out = self.done % HELD_OUT == HELD_OUT - 1
            counts = self.held_out if is_held_out else self.counted
            np.add.at(counts, found[found < len(counts)], 1)
        self.done += 1

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        content = {
            "about": self.about,
            "done": self.done,
            "bad": [[bad.file, bad.line, bad.reason] for bad in self.bad],
            **{name: _sparse(getattr(self, name)) for name in ("counted", "held_out")},
        }
        write_text(path, json.dumps(content) + "\n")

    def load(self, path: Path) -> None:
        """Go on from what `save` has written.

        Raises:
            DataError: the file is damaged, or of other data or another target.
        """
        with storage_errors(path, "read", "Delete it to count anew."):
            text = path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
            about, self.done = content["about"], int(content["done"])
            self.bad = [BadRecord(*row) for row in content["bad"]]
            for name in ("counted", "held_out"):
                ids, counts = content[name]
                getattr(self, name)[ids] = counts
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{path} is damaged. Delete it to count anew.") from error
        if about != self.about:
            raise DataError(
                f"{path}: these are counts of other data, or of another target. Delete it to count "
                "anew, or give another folder."
            )


class _Replies(Dataset):
    """The tokens of each record's replies, or what is wrong with it."""

    def __init__(self, renderer: Renderer, records: list[tuple[RecordFile, int]]) -> None:
        self.renderer, self.records = renderer, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> np.ndarray | BadRecord:
        file, number = self.records[place]
        try:
            return self.renderer.reply_ids(file[number]).numpy()
        except BadRecordError as error:
            return BadRecord(file.path.name, file.line(number), str(error))


def _as_it_is(found: Any) -> Any:
    return found


def count_replies(
    renderer: Renderer,
    files: list[RecordFile],
    vocab_size: int,
    place: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
    records: Iterable[tuple[RecordFile, int]] | None = None,
    workers: int = 0,
) -> ReplyCounts:
    """Count the tokens of all replies, as training renders them; images are not read.

    Args:
        renderer: of the target.
        files: of conversations.
        vocab_size: V, tokens of the target.
        place: file that keeps where the counting stands, and the counts at the end; None keeps
            nothing.
        report: called with the number of records done since the last call.
        records: of the files; all of them by default.
        workers: processes that render; 0 does it in this one.

    Raises:
        DataError: ``place`` holds other counts, or there is no reply at all.
    """
    counts = ReplyCounts(vocab_size, _about(renderer, files))
    if place is not None and place.is_file():
        counts.load(place)
    if records is None:
        records = [(file, number) for file in files for number in range(len(file))]
    todo = _Replies(renderer, list(records)[counts.done :])
    report(counts.done)
    saved = time.monotonic()
    # Arrays go over as copies; tensors, which the loader would make of them, as open files.
    for found in DataLoader(todo, batch_size=None, num_workers=workers, collate_fn=_as_it_is):
        counts.add(found)
        report(1)
        if place is not None and time.monotonic() - saved > SAVE_SECONDS:
            counts.save(place)
            saved = time.monotonic()
    if not counts.counted.any():
        shown = "".join(f"\n  {bad}" for bad in counts.bad[:3])
        raise DataError(f"no reply to count tokens in.{shown}")
    if place is not None:
        counts.save(place)
    return counts


def _about(renderer: Renderer, files: list[RecordFile]) -> dict[str, Any]:
    """What the counts depend on."""
    text = renderer.tokenizer.backend_tokenizer.to_str() + renderer.template
    return {
        "data": [[entry["file"], entry["sha256"]] for entry in describe_data(files)],
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
    }


def special_ids(renderer: Renderer, vocab_size: int) -> list[int]:
    """The tokens that every vocabulary keeps: special ones, and those that end a reply."""
    tokenizer = renderer.tokenizer
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    found = {*tokenizer.all_special_ids, *renderer.end_ids, *added}
    return sorted(i for i in found if i < vocab_size)


def check_size(size: int, special: list[int], vocab_size: int, name: str = "--size") -> None:
    """Raise `ConfigError` unless a vocabulary can have this size."""
    least = max(1, len(special))
    if not least <= size <= vocab_size:
        raise ConfigError(
            f"{name}: got {size}, expected {least} (all special tokens) to {vocab_size} (all "
            "tokens of the target)."
        )


def choose(
    counted: np.ndarray,
    special: list[int],
    size: int | None = None,
    coverage: float = 1.0,
    judged: np.ndarray | None = None,
) -> np.ndarray:
    """The special tokens and the most frequent others, int64 ``[D]`` in ascending order.

    At equal counts the lower id comes first: vocabularies are built from the frequent to the rare.

    Args:
        counted: int64 ``[V]``.
        special: tokens that are kept in any case.
        size: D. None takes the smallest multiple of 64, to which vLLM pads a head anyway, that
            covers enough.
        coverage: the share of the ``judged`` tokens that is enough.
        judged: int64 ``[V]`` counts that coverage is about: of what was held out, if anything was.
            By default the counted ones, which every choice fits better than others.

    Raises:
        ConfigError: an impossible size.
    """
    num_tokens = len(counted)
    is_special = np.zeros(num_tokens, bool)
    is_special[special] = True
    order = np.lexsort((np.arange(num_tokens), -counted, ~is_special))
    if size is None:
        reached = np.cumsum((counted if judged is None else judged)[order])
        needed = int(np.searchsorted(reached, coverage * reached[-1] * (1 - 1e-12))) + 1
        size = min(num_tokens, -(-max(needed, len(special)) // 64) * 64)
    check_size(size, special, num_tokens)
    return np.sort(order[:size])


def training_vocabulary(
    settings: TrainSettings, renderer: Renderer, corpus: Corpus, vocab_size: int, folder: Path
) -> Tensor | None:
    """The tokens that a draft is trained to propose, int64 ``[D]``; None if it is all of them.

    Args:
        settings: ``draft_vocab`` is a number of tokens to be counted in the training records, or a
            draft whose vocabulary is taken over; empty takes over that of ``init``.
        renderer, vocab_size: of the target.
        corpus: the records.
        folder: of the run, which keeps the counts.

    Raises:
        ConfigError, CheckpointError, DataError: what the user can mend.
    """
    if not settings.draft_vocab.isdigit():
        init = "" if settings.init in ("target", "random") else settings.init
        source = settings.draft_vocab or init
        ids = load_draft_vocabulary(source) if source else None
        if ids is None and settings.draft_vocab:
            raise ConfigError(
                f"draft_vocab: the draft {source} has no vocabulary of its own. Give one that "
                "vllm-msd trim wrote, or a number of tokens."
            )
        if ids is not None:
            check_token_ids(ids, vocab_size, "the target's vocabulary")
        return ids
    size, special = int(settings.draft_vocab), special_ids(renderer, vocab_size)
    check_size(size, special, vocab_size, "draft_vocab")
    records = [
        corpus.training(kind, number)
        for kind, count in enumerate(corpus.num_training)
        for number in range(count)
    ]
    files = [file for of_kind in corpus.files for file in of_kind]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(records), unit="record", desc="tokens") as bar:
        counts = count_replies(
            renderer, files, vocab_size, folder / COUNTS, bar.update, records, settings.workers
        )
    return torch.from_numpy(choose(counts.counted + counts.held_out, special, size))


def covered(counts: np.ndarray, ids: np.ndarray) -> float:
    """The share of counted tokens that are in a vocabulary; NaN where none was counted."""
    return float(counts[ids].sum() / counts.sum()) if counts.any() else float("nan")


def _sparse(counts: np.ndarray) -> list[list[int]]:
    (ids,) = counts.nonzero()
    return [ids.tolist(), counts[ids].tolist()]

"""From files to the records of a step, rendered; broken ones replaced and listed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vllm_msd.errors import DataError
from vllm_msd.training.data.index import BadRecord, RecordFile
from vllm_msd.training.data.plan import MULTIMODAL, TEXT, DataPlan, seeded
from vllm_msd.training.data.records import BadRecordError, Record
from vllm_msd.training.data.render import Rendered, Renderer

_HELD_OUT = 101  # a stream of random numbers beside those of the plan
_ATTEMPTS = 50
# Held-out records never take more than this part of the data.
_LARGEST_HELD_OUT = 0.1


class Store(Protocol):
    """What keeps features of records (see `feature_cache`)."""

    def __contains__(self, key: str) -> bool: ...


@dataclass
class Example:
    """One record of a step.

    key: names the record, for the feature cache. slot: its place in the whole step, over all
    processes. rendered: None where the features are cached.
    """

    key: str
    slot: int
    rendered: Rendered | None

    @property
    def content(self) -> Rendered:
        """The rendered record. Raises RuntimeError where it is only in the feature cache."""
        if self.rendered is None:
            raise RuntimeError(f"record {self.key} was left to the feature cache, which lacks it")
        return self.rendered


@dataclass
class StepData:
    """One process's part of a step, and the broken records it met.

    error: what ends the run, or empty; a process that prepares records would wrap its traceback
    round an exception.
    """

    step: int
    examples: list[Example]
    bad: list[BadRecord] = field(default_factory=list)
    error: str = ""


class Corpus:
    """All records of both kinds, some of them held out for evaluation.

    Args:
        text, multimodal: files, indexed.
        held_out: how many records of each kind to hold out; at most a tenth of them.
        seed: chooses the held-out ones.
    """

    def __init__(
        self,
        text: Sequence[RecordFile],
        multimodal: Sequence[RecordFile],
        held_out: int = 0,
        seed: int = 0,
    ) -> None:
        self.files: tuple[list[RecordFile], list[RecordFile]] = (list(text), list(multimodal))
        self._training: list[np.ndarray] = []
        self._held_out: list[np.ndarray] = []
        for kind, files in enumerate(self.files):
            total = sum(map(len, files))
            count = min(held_out, int(total * _LARGEST_HELD_OUT))
            order = seeded(seed, _HELD_OUT, kind).permutation(total)
            self._held_out.append(order[:count])
            self._training.append(np.sort(order[count:]))

    @property
    def num_found(self) -> int:
        """Records in the files, good and bad."""
        return sum(f.num_found for files in self.files for f in files)

    @property
    def bad(self) -> list[BadRecord]:
        """Records left out because of their form."""
        return [bad for files in self.files for f in files for bad in f.bad]

    @property
    def num_training(self) -> tuple[int, int]:
        """Text and multimodal records to train on."""
        return len(self._training[TEXT]), len(self._training[MULTIMODAL])

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Rough lengths of the training records of both kinds."""
        found = []
        for files, numbers in zip(self.files, self._training, strict=True):
            joined = np.concatenate([f.weights for f in files]) if files else np.zeros(0, np.int64)
            found.append(joined[numbers])
        return found[0], found[1]

    def training(self, kind: int, number: int) -> tuple[RecordFile, int]:
        """File of a training record, and its number there."""
        return self._locate(kind, int(self._training[kind][number]))

    def held_out(self) -> list[tuple[RecordFile, int]]:
        """The records held out, text first."""
        return [
            self._locate(kind, int(n)) for kind in (TEXT, MULTIMODAL) for n in self._held_out[kind]
        ]

    def _locate(self, kind: int, number: int) -> tuple[RecordFile, int]:
        for file in self.files[kind]:
            if number < len(file):
                return file, number
            number -= len(file)
        raise IndexError(number)


def kind_of(record: Record, file: RecordFile) -> str:
    """The kind of work that figures are kept by: the record's own word for it, or the file."""
    return record.kind or file.name


class StepDataset(Dataset):
    """The rendered records of every step, of one process's share.

    An item depends on its step alone, so it may be prepared anywhere and in any order.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: DataPlan,
        renderer: Renderer,
        rank: int = 0,
        world: int = 1,
        store: Store | None = None,
    ) -> None:
        self.corpus, self.plan, self.renderer = corpus, plan, renderer
        self.rank, self.world, self.store = rank, world, store
        self._known_bad: dict[str, str] = {}

    def __getitem__(self, step: int) -> StepData:
        data = StepData(step, [])
        records = self.plan.records(step)
        try:
            for slot in range(self.rank, len(records), self.world):
                kind, number = records[slot]
                data.examples.append(self._example(data, slot, kind, number))
        except DataError as error:
            data.error = str(error)
        return data

    def _example(self, data: StepData, slot: int, kind: int, number: int) -> Example:
        for attempt in range(_ATTEMPTS):
            file, place = self.corpus.training(kind, number)
            key = f"{file.path.name}:{place}"
            if self.store is not None and key in self.store:
                return Example(key, slot, None)
            if key not in self._known_bad:
                try:
                    return Example(key, slot, self.renderer.render(file[place]))
                except BadRecordError as error:
                    self._known_bad[key] = str(error)
            data.bad.append(BadRecord(file.path.name, file.line(place), self._known_bad[key]))
            number = self.plan.spare(data.step, slot, attempt, kind)
        raise DataError(
            f"{_ATTEMPTS} records in a row are broken, the last one: {data.bad[-1]}. Check "
            "--image-root, and that the data fits the target."
        )


@dataclass
class TokenBatch:
    """Padded token ids with what the target needs beside them.

    input_ids, attention_mask: int64 [B, S]. answer_mask: bool [B, S]. lengths: int64 [B].
    extras: the processor's other tensors, joined.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    lengths: Tensor
    extras: dict[str, Tensor]

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on a device."""
        extras = {name: value.to(device) for name, value in self.extras.items()}
        return TokenBatch(
            self.input_ids.to(device), self.attention_mask.to(device),
            self.answer_mask.to(device), self.lengths.to(device), extras,
        )  # fmt: skip


def collate(rendered: Sequence[Rendered], pad_id: int, left: bool = False) -> TokenBatch:
    """Pad conversations to one length, on the right, or on the left to generate from them."""
    lengths = torch.tensor([len(r.input_ids) for r in rendered])
    width = int(lengths.max())

    def pad(values: list[Tensor], fill: int | bool) -> Tensor:
        out = torch.full((len(values), width), fill, dtype=values[0].dtype)
        for row, value in zip(out, values, strict=True):
            row[slice(width - len(value), None) if left else slice(len(value))] = value
        return out

    extras: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for r in rendered for name in r.extras):
        found = [(r, r.extras.get(name)) for r in rendered]
        present = [value for _, value in found if value is not None]
        if any(v is not None and v.shape == (1, len(r.input_ids)) for r, v in found):
            rows = [torch.zeros_like(r.input_ids) if v is None else v[0] for r, v in found]
            extras[name] = pad(rows, 0)
        else:
            extras[name] = _join(present)
    input_ids = pad([r.input_ids for r in rendered], pad_id)
    attention = pad([torch.ones_like(r.input_ids) for r in rendered], 0)
    answer = pad([r.answer_mask for r in rendered], False)
    return TokenBatch(input_ids, attention, answer, lengths, extras)


def _join(values: list[Tensor]) -> Tensor:
    """Join per-image tensors; where images have unequal numbers of patches, zeros fill up."""
    if len({v.shape[1:] for v in values}) > 1:
        sizes = [max(v.shape[d] for v in values) for d in range(1, values[0].dim())]
        grown = []
        for v in values:
            out = v.new_zeros(v.shape[0], *sizes)
            out[tuple(slice(n) for n in v.shape)] = v
            grown.append(out)
        values = grown
    return torch.cat(values)

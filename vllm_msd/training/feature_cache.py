"""The target's features of records on disk, so that a long run passes each through it once.

A folder of safetensors shards, each written whole or not at all; a broken run goes on with those
that are there. `cache.json` says which target and data they are of.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_msd.errors import ConfigError, StorageError
from vllm_msd.storage import replacing, storage_errors, write_json
from vllm_msd.training.targets import Features

ABOUT = "cache.json"
# A shard is written when it holds this much.
SHARD_BYTES = 256 << 20
_NAMES = ("input_ids", "answer_mask", "hidden", "visual_embeds", "visual")


class FeatureCache:
    """Features by record.

    Args:
        folder: made if missing.
        about: what the features depend on (target, data, longest rendering).
        rank: number of this process; each writes shards of its own.
        shard_bytes: size of a shard.

    Raises:
        ConfigError: the folder holds features of something else.
        StorageError: it cannot be written to, or holds a damaged shard.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], rank: int = 0, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.rank, self.shard_bytes = folder, rank, shard_bytes
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(about))
        note = folder / ABOUT
        if note.is_file():
            theirs = _about(note)
            other = [name for name in about if about[name] != theirs.get(name)]
            if other:
                raise ConfigError(
                    f"cache_features: {folder} was made with another {', '.join(other)}. Give "
                    "another folder, or delete this one."
                )
        elif rank == 0:
            write_json(note, about)
        self._shard_of: dict[str, Path] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with _opened(path) as shard:
                keys = {name.rpartition("/")[0] for name in shard.keys()}  # noqa: SIM118
            self._shard_of.update(dict.fromkeys(keys, path))
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of or f"{key}/input_ids" in self._waiting

    def __len__(self) -> int:
        waiting = sum(name.endswith("/input_ids") for name in self._waiting)
        return len(self._shard_of) + waiting

    def put(self, key: str, record: dict[str, Tensor]) -> None:
        """Keep one record (a row of `unstack`)."""
        if key in self:
            return
        for name, value in record.items():
            value = value.detach().to("cpu", copy=True).contiguous()
            self._waiting[f"{key}/{name}"] = value
            self._waiting_bytes += value.numel() * value.element_size()
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of one record, as they were put."""
        if f"{key}/input_ids" in self._waiting:
            return {name: self._waiting[f"{key}/{name}"] for name in _NAMES}
        with _opened(self._shard_of[key]) as shard:
            return {name: shard.get_tensor(f"{key}/{name}") for name in _NAMES}

    def flush(self) -> None:
        """Write what is waiting into a new shard."""
        if not self._waiting:
            return
        mine = self.folder.glob(f"shard-{self.rank:03d}-*.safetensors")
        number = 1 + max((int(p.stem.rpartition("-")[2]) for p in mine), default=-1)
        path = self.folder / f"shard-{self.rank:03d}-{number:06d}.safetensors"
        with replacing(path) as partial:
            save_file(self._waiting, partial)
        keys = {name.rpartition("/")[0] for name in self._waiting}
        self._shard_of.update(dict.fromkeys(keys, path))
        self._waiting, self._waiting_bytes = {}, 0


def stack(records: list[dict[str, Tensor]], pad_id: int, device: torch.device) -> Features:
    """Features of cached records as one right-padded batch."""
    lengths = torch.tensor([len(r["input_ids"]) for r in records], device=device)
    batch, width = len(records), int(lengths.max())
    hidden = records[0]["hidden"]
    size = (batch, width, hidden.shape[-1])
    found = Features(
        torch.full((batch, width), pad_id, device=device),
        lengths,
        torch.zeros(batch, width, dtype=torch.bool, device=device),
        torch.zeros(batch, width, dtype=torch.bool, device=device),
        torch.zeros(size, dtype=hidden.dtype, device=device),
        torch.zeros(size, dtype=hidden.dtype, device=device),
    )
    for row, record in enumerate(records):
        real = slice(len(record["input_ids"]))
        found.input_ids[row, real] = record["input_ids"].to(device)
        found.answer_mask[row, real] = record["answer_mask"].to(device)
        found.hidden[row, real] = record["hidden"].to(device)
        visual = record["visual"].to(device)
        found.visual[row, real] = visual
        found.embeds[row, real][visual] = record["visual_embeds"].to(device)
    return found


def unstack(features: Features) -> list[dict[str, Tensor]]:
    """The rows of a batch without padding, each a record of the cache.

    Embeddings are kept at visual tokens only: ``visual_embeds [visual tokens, H]``.
    """
    rows = []
    for row, length in enumerate(features.lengths.tolist()):
        real = slice(length)
        visual = features.visual[row, real]
        rows.append(
            {
                "input_ids": features.input_ids[row, real],
                "answer_mask": features.answer_mask[row, real],
                "hidden": features.hidden[row, real],
                "visual_embeds": features.embeds[row, real][visual],
                "visual": visual,
            }
        )
    return rows


def _about(note: Path) -> dict[str, Any]:
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cache_features: {note} cannot be read ({error}). Delete its folder, or give another."
        ) from error
    return content if isinstance(content, dict) else {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"cache_features: {path} is damaged ({error}). Delete it; its records pass through the "
            "target again."
        ) from error

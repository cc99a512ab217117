"""Which files make up a checkpoint: those that vLLM's loader reads, so that all readers agree."""

import glob
import json
import re
from pathlib import Path
from typing import Any

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError, ConfigError

CONFIG = "config.json"
OWN_WEIGHTS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# What people save beside pickled weights; vLLM's loader knows the same names.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one that is only on the hub is downloaded into its cache.

    Raises:
        CheckpointError: there is no such folder, and no such repository within reach.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{path}: got a file, expected the folder that holds {CONFIG} and the weights. "
            f"Give {folder.parent}."
        )
    if not is_hub_name(str(path)):
        raise CheckpointError(
            f"{path}: there is no such folder. Give the folder of a draft, or a hub name "
            "(org/name)."
        )
    return _download(str(path), revision)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a repository on the hub (org/name)."""
    return _HUB_NAME.fullmatch(name) is not None


def target_place(folder: Path, name: str) -> str:
    """Where the target lies that a draft's config names: an absolute path, or a hub name."""
    beside = folder / Path(name).expanduser()
    return str(beside.resolve()) if beside.is_dir() or not is_hub_name(name) else name


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.bin"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name}: there is no such folder, and the hub did not give it ({reason}). Check "
            "the name and the network, or download it elsewhere and give its folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table; `CheckpointError` when it is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing. A draft's folder holds {CONFIG} and weights ({OWN_WEIGHTS} or "
            "pytorch_model.bin); give another folder or fetch it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}. Fetch the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: got {type(content).__name__}, expected a table (JSON object). Fetch the file "
            "again."
        )
    return content


def read_config(folder: Path) -> tuple[MSDDraftConfig, dict[str, Any]]:
    """The draft's config and the file's content as it is."""
    raw = read_json(folder / CONFIG)
    try:
        return MSDDraftConfig.from_dict(raw), raw
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index's table of name to file if there is one.

    They are chosen as vLLM's default loader chooses: every safetensors file, or only those that
    the index lists where there is one; without any, every pickled file.

    Raises:
        CheckpointError: no weights, files that vLLM would read in another way than as weights of
            this checkpoint, or an index that names files it cannot name.
    """
    if consolidated := _matching(folder, "consolidated*.safetensors"):
        raise CheckpointError(
            f"{folder}: got {consolidated[0].name}, which vLLM reads instead of {OWN_WEIGHTS}. "
            "Move it elsewhere."
        )
    found = _matching(folder, "*.safetensors")
    if not found:
        found = [p for p in _matching(folder, "*.bin") if not p.name.endswith(_NO_WEIGHTS)]
    index_name = PICKLE_INDEX if found and found[0].suffix == ".bin" else SAFETENSORS_INDEX
    if not (folder / index_name).is_file():
        if not found:
            there = sorted(p.name for p in folder.iterdir())[:10]
            raise CheckpointError(
                f"{folder}: no weights. Expected {OWN_WEIGHTS}, other *.safetensors or *.bin files;"
                f" found {', '.join(there) or 'nothing'}. Fetch the checkpoint again."
            )
        return found, None
    index = _read_index(folder, index_name)
    # vLLM passes over safetensors files that the index does not list, not over pickled ones.
    listed = {folder / shard for shard in index.values()}
    return (sorted(listed) if index_name == SAFETENSORS_INDEX else found), index


def check_own_place(folder: Path) -> None:
    """Raise `CheckpointError` where other weight files would be read beside or instead of ours."""
    others = [p for p in _matching(folder, "*.safetensors") if p.name != OWN_WEIGHTS]
    others += [p for p in (folder / SAFETENSORS_INDEX,) if p.exists()]
    if others:
        raise CheckpointError(
            f"{folder}: got {', '.join(p.name for p in others[:5])}, which would be read beside or "
            f"instead of {OWN_WEIGHTS}. Move them away, or give another folder."
        )


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern, hidden ones left out."""
    return sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/{pattern}")))


def _read_index(folder: Path, name: str) -> dict[str, str]:
    index = read_json(folder / name).get("weight_map")
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{folder / name}: got no weight_map, expected a table of weight name to file. Fetch "
            "the file again."
        )
    for shard in sorted({str(shard) for shard in index.values()}):
        if Path(shard).name != shard or not shard.endswith(suffix):
            raise CheckpointError(
                f"{folder / name}: got the file name {shard!r:.200}, expected a {suffix} file in "
                "the same folder. Do not use this checkpoint unless you know where it comes from."
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard} is missing, but {name} lists it. Fetch the checkpoint again."
            )
    return index

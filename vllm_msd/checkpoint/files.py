"""Which files make up a checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError, ConfigError

CONFIG = "config.json"
OWN_WEIGHTS = "model.safetensors"
# In order of preference; an index lists the shards of its own kind.
WEIGHT_FILES = (
    OWN_WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
            f"{path} is missing. A draft's folder holds {CONFIG} and weights "
            f"({' or '.join(WEIGHT_FILES[::2])}); give another folder or fetch it again."
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

    Raises:
        CheckpointError: no weights, or an index that names files it cannot name.
    """
    name = next((n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if name is None:
        found = sorted(p.name for p in folder.iterdir())[:10]
        raise CheckpointError(
            f"{folder}: no weights. Expected one of {', '.join(WEIGHT_FILES)}; found "
            f"{', '.join(found) or 'nothing'}. Fetch the checkpoint again."
        )
    if not name.endswith(".json"):
        return [folder / name], None
    index = read_json(folder / name).get("weight_map")
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{folder / name}: got no weight_map, expected a table of weight name to file. Fetch "
            "the file again."
        )
    shards = sorted({str(shard) for shard in index.values()})
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(suffix):
            raise CheckpointError(
                f"{folder / name}: got the file name {shard!r}, expected a {suffix} file in the "
                "same folder. Do not use this checkpoint unless you know where it comes from."
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard} is missing, but {name} lists it. Fetch the checkpoint again."
            )
    return [folder / shard for shard in shards], index

"""Which draft belongs to a target.

`msd` means "the draft of this target": one of the published ones, or for a local target one that
lies in its folder `msd/`, one that its config names, or one beside it that names the target.
Anything else is taken as a folder or hub name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_msd.draft.config import layout_of
from vllm_msd.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vllm_msd.draft import MSDDraftConfig

AUTO = "msd"
TARGET_KEY = "msd_draft"
PUBLISHED_DRAFTS = {
    "llava-hf/llava-1.5-7b-hf": "lucylyn/MSD-LLaVA1.5-7B",
    "llava-hf/llava-1.5-13b-hf": "lucylyn/MSD-LLaVA1.5-13B",
    "Qwen/Qwen2-VL-7B-Instruct": "lucylyn/MSD-Qwen2VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Cloudriver/MSD-Qwen2.5-VL-7B-Instruct",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def is_msd_draft(model: str) -> bool:
    """Whether a speculative model given without a method is one of ours: `msd`, a published draft,
    or a folder in our own format."""
    if model == AUTO or model in PUBLISHED_DRAFTS.values():
        return True
    return bool(model) and layout_of(_read_json(Path(model) / "config.json")) == "msd"


def tokens_of_draft(model: str) -> int | None:
    """The number of tokens that vLLM reads from a draft served by its own name; None otherwise."""
    config = _read_json(Path(model) / "config.json")
    try:
        return config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None


def find_draft(target: str, model: str | None) -> str:
    """Name or folder of the draft to serve `target` with.

    Args:
        target: folder or hub name of the target, or its folder in the hub's cache.
        model: `msd` or None to find it, otherwise a folder or hub name that is taken as given.

    Raises:
        ConfigError: nothing belongs to the target, several do, or `model` is not to be found.
    """
    if model is not None and model != AUTO:
        return _given(model)
    name = hub_name(target)
    if name in PUBLISHED_DRAFTS:
        return PUBLISHED_DRAFTS[name]
    folder = Path(os.path.expanduser(target))
    if not os.path.isdir(folder):
        raise ConfigError(_unknown_target(name))
    if (folder / "msd" / "config.json").is_file():
        return str(folder / "msd")
    if named := _read_json(folder / "config.json").get(TARGET_KEY):
        beside = folder / str(named)
        return str(beside.resolve()) if os.path.isdir(beside) else _given(str(named))
    siblings = _siblings_naming(folder)
    if len(siblings) == 1:
        return str(siblings[0])
    if siblings:
        raise ConfigError(
            f"several MSD drafts name the target {target}: {', '.join(map(str, siblings))}. "
            "Give the folder of one of them as the speculative model."
        )
    raise ConfigError(_unknown_target(name))


def read_draft(name: str, revision: str | None, download_dir: str | None) -> MSDDraftConfig:
    """Read and check a draft's config and the names and shapes of its weights.

    A draft on the hub is downloaded to the same cache that the engine then reads it from, so that
    a broken one is found before the target's weights are loaded.

    Raises:
        ConfigError, CheckpointError: the draft cannot be fetched or is not a usable MSD draft.
    """
    from vllm_msd.checkpoint import load_draft_config

    if os.path.isdir(name):
        return load_draft_config(Path(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=["*.json", "*.safetensors", "*.bin"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"the draft {name} could not be fetched from the hub ({error}). Check its name and the "
            "network, or download it and give its folder as the speculative model."
        ) from error
    return load_draft_config(Path(folder))


def hub_name(target: str) -> str:
    """`org/name` where `target` is a model's folder in the hub's cache, else `target` itself."""
    for part in Path(target).parts:
        if match := _HUB_CACHE_FOLDER.fullmatch(part):
            return "/".join(match.groups())
    return target


def _given(model: str) -> str:
    # Not pathlib's: these take any text, too long a name or the home of nobody included.
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        return str(Path(folder))
    if _HUB_NAME.fullmatch(model) and not model.startswith("."):
        return model
    raise ConfigError(
        f"speculative model {model!r} is neither a folder nor a hub name (org/name). Give the "
        f"draft's folder, or '{AUTO}' to find the one that belongs to the target."
    )


def _siblings_naming(target: Path) -> list[Path]:
    """Folders beside the target that hold an MSD draft whose config names this target.

    A target that is a link has neighbours where the link lies and where the folder does.
    """
    beside = Path(os.path.abspath(target)).parent
    target = target.resolve()
    found = []
    for config_path in sorted(
        {path for parent in {beside, target.parent} for path in parent.glob("*/config.json")}
    ):
        config = _read_json(config_path)
        of = config.get("target")
        named = of.get("name_or_path") if isinstance(of, dict) else None
        if config.get("model_type") != "msd" or not isinstance(named, str):
            continue
        if (config_path.parent / named).resolve() == target:
            found.append(config_path.parent)
    return found


def _unknown_target(name: str) -> str:
    known = "\n".join(f"  {target}: {draft}" for target, draft in PUBLISHED_DRAFTS.items())
    similar = difflib.get_close_matches(
        Path(name).name.lower(), {t.split("/")[1].lower() for t in PUBLISHED_DRAFTS}, cutoff=0.8
    )
    hint = ""
    for target, draft in PUBLISHED_DRAFTS.items():
        if target.split("/")[1].lower() in similar[:1]:
            hint = f"If this is a copy of {target}, give '{draft}' as the speculative model.\n"
    return (
        f"no MSD draft is known for the target {name}.\n{hint}"
        f"Known targets and their drafts:\n{known}\n"
        f"A local target's draft is found in its folder 'msd/', under the key '{TARGET_KEY}' of "
        "its config.json, or in a folder beside it whose config.json names the target.\n"
        "To serve another target, give its draft's folder or hub name as the speculative model, "
        "or train a draft for it: vllm-msd train --help"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON table in a file; empty when there is no such file or it holds something else."""
    if not os.path.isfile(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}

"""Loading, saving and converting drafts."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_msd.checkpoint import files, weights
from vllm_msd.checkpoint.fit import check_draft_fits_target, text_config
from vllm_msd.checkpoint.speculators import speculators_fields
from vllm_msd.draft import MSDDraftConfig, TargetInfo
from vllm_msd.draft.config import layout_of
from vllm_msd.draft.vocabulary import OFFSETS, token_ids_of
from vllm_msd.errors import CheckpointError
from vllm_msd.storage import PARTIAL, check_folder, replacing, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Progress = Callable[[str], None]


def load_draft_config(path: str | Path, revision: str | None = None) -> MSDDraftConfig:
    """Read a draft's config and check names and shapes of its weights, without reading them.

    A draft vocabulary's ids are read and checked, too.

    Args:
        path: folder or hub name of a draft, in a published layout or our own.
        revision: of a hub name.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or incomplete.
    """
    return _read(files.locate(path, revision))[0]


def load_draft_vocabulary(path: str | Path, revision: str | None = None) -> Tensor | None:
    """The target tokens that a draft proposes, int64 ``[D]``; None if it is all of them.

    Raises like `load_draft_config`.
    """
    _, headers, _ = _read(files.locate(path, revision))
    return token_ids_of(weights.read_tensor(headers[OFFSETS])) if OFFSETS in headers else None


def load_draft(
    path: str | Path, revision: str | None = None
) -> tuple[MSDDraftConfig, dict[str, Tensor]]:
    """Read a draft: its config, and its weights by their published names on the CPU.

    The embedding table is among the weights if the checkpoint holds it. Raises like
    `load_draft_config`, and for weights that are not finite.
    """
    config, headers, paths = _read(files.locate(path, revision))
    state = weights.read_tensors(paths)
    state = {name: state[name].detach() for name in headers if not weights.is_derived(name)}
    for name, x in state.items():
        if not torch.isfinite(x).all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite numbers. The checkpoint is damaged or its "
                "training diverged; fetch it again or use an earlier one."
            )
    return config, state


def save_draft(
    path: str | Path,
    config: MSDDraftConfig,
    state: Mapping[str, Tensor],
    target_info: TargetInfo | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a draft in our own format; an existing one is replaced as a whole.

    ``vllm serve`` finds a target of a hub name or full path from the draft: ``speculators.py``.

    The config comes last: while it and the weights do not belong together there is none, so that
    no reader takes a half-written draft for a whole one.

    Args:
        path: folder to write to, made if missing.
        config: the draft's config; the recorded dtype is taken from the weights.
        state: weights by their published names, on any device; the embedding table is optional.
        target_info: the target it was trained for; None keeps what ``config`` says.
        progress: called with a line per step.

    Returns:
        The folder.

    Raises:
        CheckpointError: the weights are not those of the config, or the folder holds weight files
            that would be read instead.
        StorageError: the folder cannot be written to.
    """
    folder, note = Path(path).expanduser(), progress or (lambda line: None)
    state = {name: x for name, x in state.items() if not weights.is_derived(name)}
    headers = {
        name: weights.TensorHeader(
            name, tuple(x.shape), str(x.dtype).removeprefix("torch."), folder / files.OWN_WEIGHTS
        )
        for name, x in state.items()
    }
    problems = weights.find_problems(config, headers, needs_embedding=False)
    if not problems and OFFSETS in state:
        problems = list(filter(None, [weights.vocabulary_problem(config, state[OFFSETS])]))
    if problems:
        raise CheckpointError(
            "the weights to save are not those of the config: " + "; ".join(problems)
        )
    if target_info is not None:
        if not isinstance(target_info, TargetInfo):
            target_info = TargetInfo.from_dict(target_info)
        config = replace(config, target=target_info)
    config = replace(config, torch_dtype=headers["fc.weight"].dtype)

    files.check_own_place(folder)
    tensors = {}
    for number, (name, x) in enumerate(state.items(), 1):
        note(f"[{number}/{len(state)}] {name} {tuple(x.shape)} {headers[name].dtype}")
        # safetensors wants memory of its own for every tensor.
        tensors[name] = x.detach().to("cpu", copy=True).contiguous()
    note(f"writing {folder / files.OWN_WEIGHTS}")
    content = {**config.to_dict(), **speculators_fields(config, folder)}
    text = json.dumps(content, indent=2) + "\n"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / files.CONFIG) as new_config:
            new_config.write_text(text, encoding="utf-8")
            with replacing(folder / files.OWN_WEIGHTS) as new_weights:
                save_file(tensors, new_weights, metadata={"format": "pt"})
                if _text_of(folder / files.CONFIG) != text:
                    (folder / files.CONFIG).unlink(missing_ok=True)
    return folder


def check_destination(folder: Path, source: Path, force: bool, own: tuple[str, ...] = ()) -> None:
    """Refuse a folder that a copy of the draft ``source`` cannot be written to.

    Args:
        folder: to write to. source: to read from. force: write into one that is not empty.
        own: names of files that a killed run of the same work may have left there.

    Raises:
        CheckpointError, StorageError: it is taken, or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or folder.samefile(source)):
        raise CheckpointError(f"{folder}: got the source or a file, expected a folder of its own.")
    if folder.is_dir() and not force and _is_taken(folder, own):
        raise CheckpointError(
            f"{folder} is not empty. Give another folder, or --force to write into this one."
        )
    check_folder(folder, "output")
    files.check_own_place(folder)


def _is_taken(folder: Path, own: tuple[str, ...]) -> bool:
    """Whether a folder holds more than what a killed run left there."""
    left = {files.OWN_WEIGHTS, *own} if not (folder / files.CONFIG).exists() else set()
    return any(p.name not in left and not p.name.endswith(PARTIAL) for p in folder.iterdir())


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def convert_draft(
    src: str | Path,
    dst: str | Path,
    target: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    movable: bool = True,
) -> MSDDraftConfig:
    """Turn a draft in any layout into one in our own format, weights unchanged.

    Args:
        src: folder or hub name of the draft.
        dst: folder to write to.
        target: folder or hub name of the target it was trained for, to be recorded. A folder is
            checked to fit, a hub name is recorded as it is.
        force: write into a folder that is not empty.
        progress: called with a line per step.
        movable: record a target's folder that lies near the draft's by its relative path. By a full
            path ``vllm serve`` finds it from the draft.

    Returns:
        The new checkpoint's config.

    Raises:
        CheckpointError: the draft is unusable, does not fit the target, or ``dst`` is taken.
        StorageError: ``dst`` cannot be written to.
    """
    source, folder = files.locate(src), Path(dst).expanduser()
    check_destination(folder, source, force)
    config = load_draft_config(source)
    info = config.target if target is None else _target_info(target, config, folder, movable)
    _, state = load_draft(source)
    save_draft(folder, config, state, info, progress)
    return load_draft_config(folder)


def _read(
    folder: Path,
) -> tuple[MSDDraftConfig, dict[str, weights.TensorHeader], list[Path]]:
    """Config, checked tensor headers and weight files of a checkpoint's folder."""
    config, raw = files.read_config(folder)
    paths, index = files.weight_files(folder)
    headers = weights.read_headers(paths, index)
    layout = layout_of(raw)
    problems = weights.all_problems(config, headers, needs_embedding=layout != "msd")
    if problems:
        raise CheckpointError(
            f"{folder}: the weights are not those of a draft of layout {layout!r} with this "
            "config.json:\n  " + "\n  ".join(problems) + "\nFetch the checkpoint again, or check "
            "that config.json and weights belong together; 'vllm-msd inspect' lists what it holds."
        )
    return config, headers, paths


def _target_info(
    target: str | Path, config: MSDDraftConfig, draft_folder: Path, movable: bool
) -> TargetInfo:
    """What to record about the target; a local one is checked."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        if not files.is_hub_name(str(target)):
            raise CheckpointError(
                f"target {target}: there is no such folder. Give the target's folder or hub name "
                "(org/name)."
            )
        return replace(config.target, name_or_path=str(target))
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Transformers stumbles over what is no config in ways of its own.
    except Exception as error:
        raise CheckpointError(
            f"target {folder}: its config.json cannot be read: {error}. Give the folder of the "
            "target."
        ) from error
    check_draft_fits_target(config, hf_config)
    return target_info(target, hf_config, draft_folder, movable)


def target_info(
    target: str | Path, hf_config: "PreTrainedConfig", draft_folder: Path, movable: bool = True
) -> TargetInfo:
    """What a draft in ``draft_folder`` records about its target, a folder or hub name."""
    name, draft_folder = Path(target).expanduser(), draft_folder.resolve()
    recorded = str(target)
    if name.is_dir():
        name = name.resolve()
        # A pair that lies together stays a pair when it is moved.
        is_near = movable and draft_folder.parent in (name, name.parent)
        recorded = os.path.relpath(name, draft_folder) if is_near else str(name)
    text = text_config(hf_config)
    architecture = hf_config.architectures[0] if hf_config.architectures else None
    return TargetInfo(recorded, architecture, text.hidden_size, text.vocab_size)

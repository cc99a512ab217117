"""Tensors in weight files, and their headers without the weights.

Pickled files are opened with ``weights_only``: nothing in them is executed, and anything that is
not a tensor is refused.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.draft.vocabulary import OFFSETS, check_token_ids, token_ids_of
from vllm_msd.errors import CheckpointError, ConfigError

EMBEDDING = "embed_tokens.weight"
# Rotary tables that were saved along; they follow from the config. No reader reads them.
_DERIVED = re.compile(
    r"(.+\.)?rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached|cos_sin_cache)"
)
_SAFETENSORS_DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
}  # fmt: skip
_FLOATS = ("float32", "float16", "bfloat16")
_INTEGERS = ("int64", "int32")
_MAX_LISTED = 8


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about one tensor. ``dtype`` is torch's name, or the file's if unknown."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_headers(
    files: list[Path], index: Mapping[str, str] | None = None
) -> dict[str, TensorHeader]:
    """Name, shape and dtype of every tensor in the files, without reading the weights.

    Raises:
        CheckpointError: a file is damaged, holds anything but tensors, or does not agree with the
            index.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        is_safetensors = file.suffix == ".safetensors"
        for header in _safetensors_headers(file) if is_safetensors else _pickle_headers(file):
            if header.name in headers:
                raise CheckpointError(
                    f"{file}: {header.name} is also in {headers[header.name].file.name}, expected "
                    "it once. Fetch the checkpoint again."
                )
            headers[header.name] = header
    for name, shard in (index or {}).items():
        if name not in headers or headers[name].file.name != shard:
            raise CheckpointError(
                f"{files[0].parent}: the index places {name} in {shard}, but it is not there. "
                "Fetch the checkpoint again."
            )
    return headers


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files, on the CPU."""
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as content:
                state.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
        else:
            state.update(_load_pickle(file))
    return state


def read_tensor(header: TensorHeader) -> Tensor:
    """One tensor of a file, on the CPU."""
    if header.file.suffix == ".safetensors":
        with _open_safetensors(header.file) as content:
            return content.get_tensor(header.name)
    return _load_pickle(header.file)[header.name]


def find_problems(
    config: MSDDraftConfig, headers: Mapping[str, TensorHeader], needs_embedding: bool
) -> list[str]:
    """Every way in which the tensors are not those of the config; empty when they are.

    Derived rotary tables are passed over. The embedding table may be left out unless
    ``needs_embedding``. What a draft vocabulary's map holds is for `vocabulary_problem`.
    """
    expected = config.weight_shapes()
    if config.draft_vocab_size is not None:
        expected[OFFSETS] = (config.draft_vocab_size,)
    if needs_embedding or EMBEDDING in headers:
        expected[EMBEDDING] = config.embedding_shape()
    missing = [name for name in expected if name not in headers]
    extra = [name for name in headers if name not in expected and not is_derived(name)]
    problems = []
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if OFFSETS in extra:
        extra.remove(OFFSETS)
        problems.append(
            f"{OFFSETS}: got a draft vocabulary, but config.json has no draft_vocab_size"
        )
    if extra:
        problems.append(f"not expected: {_listed(extra)}")
    for name, shape in expected.items():
        header = headers.get(name)
        if header is not None and header.shape != shape:
            problems.append(f"{name}: got shape {header.shape}, expected {shape}")
        dtypes = _INTEGERS if name == OFFSETS else _FLOATS
        if header is not None and header.dtype not in dtypes:
            problems.append(f"{name}: got {header.dtype}, expected one of {', '.join(dtypes)}")
    return problems


def vocabulary_problem(config: MSDDraftConfig, offsets: Tensor) -> str | None:
    """What is wrong with the ids of a draft vocabulary, ``[D]`` offsets; None if nothing is."""
    try:
        check_token_ids(token_ids_of(offsets), config.num_token_ids, "the target's vocabulary")
    except ConfigError as error:
        return str(error)
    return None


def all_problems(
    config: MSDDraftConfig, headers: Mapping[str, TensorHeader], needs_embedding: bool
) -> list[str]:
    """As `find_problems`, and what a draft vocabulary in the files holds, which is read."""
    problems = find_problems(config, headers, needs_embedding)
    if not problems and OFFSETS in headers:
        problem = vocabulary_problem(config, read_tensor(headers[OFFSETS]))
        problems += [problem] if problem else []
    return problems


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the config and is not read."""
    return _DERIVED.fullmatch(name) is not None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(sorted(names)[:_MAX_LISTED]) + more


def _open_safetensors(file: Path) -> Any:
    _check_content(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors: {error}. It is damaged or cut short; fetch it "
            "again."
        ) from error


def _safetensors_headers(file: Path) -> list[TensorHeader]:
    with _open_safetensors(file) as content:
        headers = []
        for name in content.keys():  # noqa: SIM118
            view = content.get_slice(name)
            dtype = view.get_dtype()
            dtype = _SAFETENSORS_DTYPES.get(dtype, dtype)
            headers.append(TensorHeader(name, tuple(view.get_shape()), dtype, file))
        return headers


def _pickle_headers(file: Path) -> list[TensorHeader]:
    return [
        TensorHeader(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), file)
        for name, x in _load_pickle(file).items()
    ]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """A pickled table of tensors, the weights mapped and not read where the format allows it."""
    _check_content(file)
    is_zip = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    # A damaged or hostile pickle can raise anything while it is parsed.
    except Exception as error:
        reason = " ".join(str(error).split())
        if "weights only" in reason.lower() or "unsupported" in reason.lower():
            raise CheckpointError(
                f"{file} holds something other than tensors, expected a table of tensors. Loading "
                "it could run code, so it was not loaded. Do not use this checkpoint; fetch it "
                f"from its publisher. ({reason[:200]})"
            ) from error
        raise CheckpointError(
            f"{file} cannot be read as a PyTorch checkpoint: {reason[:200]} It is damaged or cut "
            "short; fetch it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: got {type(content).__name__}, expected a table of tensors. Save the state "
            "dict alone."
        )
    for name, x in content.items():
        is_plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        if not isinstance(name, str) or not is_plain:
            raise CheckpointError(
                f"{file}: the entry {name!r} is a {type(x).__name__}, expected nothing but dense "
                "tensors under their names. Save the state dict alone."
            )
    return content


def _check_content(file: Path) -> None:
    try:
        with file.open("rb") as f:
            start = f.read(64)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error}") from error
    if not start:
        raise CheckpointError(f"{file} is empty. Fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights. Run 'git lfs pull' in its folder, or "
            "download it from the hub."
        )

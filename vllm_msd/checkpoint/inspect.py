"""Describing a checkpoint without reading its weights, a draft vocabulary's map apart."""

from math import prod
from pathlib import Path
from typing import Any

from vllm_msd.checkpoint import files, weights
from vllm_msd.draft.config import layout_of
from vllm_msd.draft.vocabulary import OFFSETS

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4}


def inspect_draft(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds, ready for JSON.

    Returns:
        ``path``, ``layout`` (``msd``, ``llava`` or ``qwen2_vl``), ``config`` (in our own format,
        its ``target`` included), ``has_embedding``, ``num_parameters``, ``bytes``, ``tensors`` (a
        list of ``name``, ``shape``, ``dtype``, ``file``, and ``ignored`` where it is not read),
        and ``problems``: every way in which config and tensors do not agree, empty when all is
        well.

    Raises:
        CheckpointError: config or weights are missing or unreadable.
    """
    folder = files.locate(path, revision)
    config, raw = files.read_config(folder)
    headers = weights.read_headers(*files.weight_files(folder))
    layout = layout_of(raw)
    used = [h for h in headers.values() if not weights.is_derived(h.name)]
    return {
        "path": str(folder),
        "layout": layout,
        "config": config.to_dict(),
        "has_embedding": weights.EMBEDDING in headers,
        "num_parameters": sum(prod(h.shape) for h in used if h.name != OFFSETS),
        "bytes": sum(prod(h.shape) * _BYTES.get(h.dtype, 0) for h in used),
        "tensors": [
            {
                "name": h.name,
                "shape": list(h.shape),
                "dtype": h.dtype,
                "file": h.file.name,
                "ignored": weights.is_derived(h.name),
            }
            for h in headers.values()
        ],
        "problems": weights.all_problems(config, headers, needs_embedding=layout != "msd"),
    }

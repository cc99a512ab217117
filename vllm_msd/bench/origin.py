"""Fingerprints of what a run is measured on, for a later run to compare."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vllm_msd.errors import CheckpointError
from vllm_msd.measure.inputs import Sample


def of_requests(samples: Sequence[Sample]) -> str:
    """A digest of prompts, kinds and the pictures' pixels."""
    found = hashlib.sha256()
    for sample in samples:
        pictures = [(image.mode, image.size) for image in sample.images]
        found.update(json.dumps([sample.prompt, sample.kind, pictures]).encode())
        for image in sample.images:
            found.update(image.tobytes())
    return found.hexdigest()


def of_model(name: str) -> str:
    """Of a folder a digest of its files' names, sizes and times of change; on the hub the commit.

    Raises:
        CheckpointError: the model is not to be found.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _commit(name)
    states = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _commit(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        config = hf_hub_download(name, "config.json")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name} is no folder and could not be fetched from the hub ({error}). Check its name "
            "and the network, or give a folder."
        ) from error
    return Path(config).parent.name

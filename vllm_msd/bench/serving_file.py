"""Requests as `vllm bench serve --dataset-name custom_image` reads them."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_msd.measure.inputs import Sample
from vllm_msd.storage import write_text


def write_requests(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSONL, pictures inside as PNG.

    That client sends one user message: of a conversation it is the last question, with all of the
    conversation's pictures before it if the question has none of its own.

    Raises:
        StorageError: the file cannot be written.
    """
    write_text(path, "".join(json.dumps({"content": content(one)}) + "\n" for one in samples))


def content(sample: Sample) -> list[dict[str, Any]]:
    """The content parts of the one message that is sent."""
    urls = [{"type": "image_url", "image_url": {"url": _data_url(i)}} for i in sample.images]
    last = sample.prompt[-1]["content"]
    parts = [{"type": "text", "text": last}] if isinstance(last, str) else last
    own = sum(part["type"] == "image" for part in parts)
    pictures = iter(urls[len(urls) - own :])
    asked = [next(pictures) if p["type"] == "image" else p for p in parts]
    return asked if own else urls + asked


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

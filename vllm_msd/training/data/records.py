"""One conversation, in the ShareGPT or the LLaVA form, as chat messages.

::

    {"id": 7, "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"},
        {"from": "gpt", "value": "A tower."}]}

`image` is a path, a list of paths, or absent. `id` may be anything. Each `<image>` in the text
stands for the next image; images without any `<image>` come first in the first question.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = "<image>"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip


class BadRecordError(Exception):
    """One record cannot be used; the message says why. Others are not concerned."""


@dataclass(frozen=True)
class Record:
    """A conversation.

    messages: chat messages with content parts; ends with a reply. images: paths as written.
    kind: what the record calls itself (``"kind"``), or None.
    """

    messages: list[dict[str, Any]]
    images: list[str]
    kind: str | None = None


def parse_record(raw: Any) -> Record:
    """Read one record.

    Raises:
        BadRecordError: it is not a conversation with at least one reply.
    """
    if not isinstance(raw, Mapping):
        raise BadRecordError(f"got {_kind_of(raw)}, expected a table")
    turns = raw.get("conversations", raw.get("messages"))
    if not isinstance(turns, list):
        raise BadRecordError(f"conversations: got {_kind_of(turns)}, expected a list of turns")
    images = _images(raw.get("image", raw.get("images")))
    if raw.get("video") is not None:
        raise BadRecordError("video: only images are supported")
    spoken = [_turn(number, turn) for number, turn in enumerate(turns, 1)]
    places = sum(text.count(PLACEHOLDER) for _, text in spoken)
    if places not in (0, len(images)):
        raise BadRecordError(f"got {len(images)} images for {places} {PLACEHOLDER} in the text")
    messages = _alternating(spoken)
    if images and not places:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    kind = raw.get("kind")
    return Record(messages, images, kind if isinstance(kind, str) else None)


def _images(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise BadRecordError(f"image: got {value!r:.80}, expected a path or a list of paths")
    return paths


def _turn(number: int, turn: Any) -> tuple[str, str]:
    """Role and text of one turn."""
    if not isinstance(turn, Mapping):
        raise BadRecordError(f"turn {number}: got {_kind_of(turn)}, expected a table")
    name = turn.get("from", turn.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRecordError(f"turn {number}: got the speaker {name!r:.40}, expected human or gpt")
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise BadRecordError(f"turn {number}: got {_kind_of(text)}, expected text")
    if role == "assistant" and PLACEHOLDER in text:
        raise BadRecordError(f"turn {number}: {PLACEHOLDER} inside a reply")
    return role, text


def _alternating(spoken: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Messages from the first question to the last reply, taking turns.

    Many ShareGPT records begin in the middle of a talk, with a reply to nothing: it is left out.
    """
    messages: list[dict[str, Any]] = []
    wanted = "user"
    for number, (role, text) in enumerate(spoken, 1):
        if role == "system":
            if messages:
                raise BadRecordError(f"turn {number}: a system turn in the middle")
            messages.append({"role": "system", "content": [{"type": "text", "text": text}]})
            continue
        if role != wanted:
            if role == "assistant" and not any(m["role"] == "user" for m in messages):
                continue
            raise BadRecordError(f"turn {number}: got two turns of the {role} in a row")
        if role == "assistant" and not text.strip():
            raise BadRecordError(f"turn {number}: an empty reply")
        content = _parts(text) if role == "user" else [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
        wanted = "assistant" if role == "user" else "user"
    while messages and messages[-1]["role"] != "assistant":
        if any(part["type"] == "image" for part in messages[-1]["content"]):
            raise BadRecordError("an image without a reply after it")
        messages.pop()
    if not messages:
        raise BadRecordError("no reply")
    return messages


def _parts(text: str) -> list[dict[str, Any]]:
    """Text and image parts of a question; line breaks beside an image are the template's matter."""
    parts: list[dict[str, Any]] = []
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

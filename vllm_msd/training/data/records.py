"""One conversation, in the ShareGPT, the LLaVA or the OpenAI form, as chat messages.

::

    {"id": 7, "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"},
        {"from": "gpt", "value": "A tower."}]}
    {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A tower."}]}

`image` (or `images`) is a path or data URL, a list of them, or absent. `id` may be anything. Each
`<image>` in the text, and each image part that names none, stands for the next image of the record;
images without any of these come first in the first question. A record's `system` stands for a
system turn at the beginning, where there is none. A reply with `"cut": true` ended at a limit of
tokens, not by itself. Where a record has two spellings of one thing, the one that is not empty
counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_KEYS = ("image_url", "image", "url", "path")
_NO_VIDEO = "video is not trained on, only text and images"


class BadRecordError(Exception):
    """One record cannot be used; the message says why. Others are not concerned."""


@dataclass(frozen=True)
class Record:
    """A conversation.

    messages: chat messages with content parts; ends with a reply; ``"cut": True`` is in those of
    replies that ended at a limit. images: paths or data URLs, as
    written. kind: what the record calls itself (``"kind"``), or None.
    """

    messages: list[dict[str, Any]]
    images: list[str]
    kind: str | None = None


@dataclass(frozen=True)
class _Turn:
    """Number, role, parts, images that image parts name (None: the record's next one), and whether
    it ended at a limit of tokens."""

    number: int
    role: str
    parts: list[dict[str, Any]]
    images: list[str | None]
    is_cut: bool


def parse_record(raw: Any) -> Record:
    """Read one record.

    Raises:
        BadRecordError: it is not a conversation with at least one reply.
    """
    if not isinstance(raw, Mapping):
        raise BadRecordError(f"got {_kind_of(raw)}, expected a table")
    if not _is_empty(_filled(raw, "video", "videos")):
        raise BadRecordError(_NO_VIDEO)
    spoken = _filled(raw, "conversations", "messages")
    if not isinstance(spoken, list):
        raise BadRecordError(f"conversations: got {_kind_of(spoken)}, expected a list of turns")
    own = _images(_filled(raw, "image", "images"))
    turns = [
        _turn(number, turn) for number, turn in enumerate(spoken, 1) if not _is_no_system(turn)
    ]
    if not _is_empty(raw.get("system")) and not any(turn.role == "system" for turn in turns):
        turns.insert(0, _turn(0, {"role": "system", "content": raw["system"]}))
    named = [name for turn in turns for name in turn.images]
    open_places = named.count(None)
    if own == named:
        open_places = 0  # said twice
    elif open_places != len(own) and (named or not own):
        raise BadRecordError(f"got {len(own)} images for {open_places} {PLACEHOLDER} in the text")
    messages = _alternating(turns)
    if own and not named:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [{"type": "image"} for _ in own] + first["content"]
        named = list(own)
    following = iter(own)
    images = [next(following) if name is None else name for name in named]
    kind = raw.get("kind")
    return Record(messages, images, _text(kind, "kind") if isinstance(kind, str) else None)


def filled_name(table: Mapping[str, Any], *names: str) -> str | None:
    """The first of a thing's spellings that holds something, else one that is there."""
    there = [name for name in names if table.get(name) is not None]
    return next((n for n in there if not _is_empty(table[n])), there[0] if there else None)


def _filled(table: Mapping[str, Any], *names: str) -> Any:
    name = filled_name(table, *names)
    return None if name is None else table[name]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _text(value: str, what: str) -> str:
    """The text, if it can be encoded at all."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{what}: got {value[error.start]!r} (half of a character), expected valid Unicode"
        ) from error
    return value


def _images(value: Any) -> list[str]:
    if _is_empty(value):
        return []
    return [_image(v, "image") for v in (value if isinstance(value, list) else [value])]


def _image(value: Any, what: str) -> str:
    """A path or data URL, also from a table that holds it."""
    if isinstance(value, Mapping):
        value = _filled(value, "url", "path")
    if not isinstance(value, str) or not value:
        raise BadRecordError(f"{what}: got {value!r:.80}, expected a path, a data URL or a list")
    return _text(value, what)


def _turn(number: int, turn: Any) -> _Turn:
    where = f"turn {number}" if number else "system"
    if not isinstance(turn, Mapping):
        raise BadRecordError(f"{where}: got {_kind_of(turn)}, expected a table")
    name = _filled(turn, "from", "role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRecordError(f"{where}: got the speaker {name!r:.40}, expected human or gpt")
    content = _filled(turn, "value", "content")
    pieces = content if isinstance(content, list) else [content]
    parts: list[dict[str, Any]] = []
    images: list[str | None] = []
    for piece in pieces:
        source, text = _piece(piece, where)
        if text is None:
            parts.append({"type": "image"})
            images.append(source)
            continue
        found = _parts(text) if role == "user" else [{"type": "text", "text": text}]
        if role != "user" and PLACEHOLDER in text:
            place = "a reply" if role == "assistant" else "a system turn"
            raise BadRecordError(f"{where}: {PLACEHOLDER} inside {place}")
        if role == "user" and VIDEO_PLACEHOLDER in text:
            raise BadRecordError(f"{where}: {VIDEO_PLACEHOLDER}: {_NO_VIDEO}")
        parts += found
        images += [None for part in found if part["type"] == "image"]
    if images and role != "user":
        raise BadRecordError(f"{where}: an image inside what the {role} says")
    is_cut = role == "assistant" and turn.get("cut") is True
    return _Turn(number, role, parts or [{"type": "text", "text": ""}], images, is_cut)


def _is_no_system(turn: Any) -> bool:
    """Whether a turn is a system's that says nothing at all (null, which is not the empty text)."""
    if not isinstance(turn, Mapping) or _filled(turn, "value", "content") is not None:
        return False
    name = _filled(turn, "from", "role")
    return isinstance(name, str) and ROLES.get(name) == "system"


def _piece(piece: Any, where: str) -> tuple[str | None, str | None]:
    """An image's source (None: the record's next) and None, or None and a text."""
    if isinstance(piece, str):
        return None, _text(piece, where)
    if not isinstance(piece, Mapping):
        raise BadRecordError(f"{where}: got {_kind_of(piece)}, expected text")
    kind = piece.get("type")
    if kind is None:
        kind = next((k for k in ("text", *_IMAGE_PARTS) if not _is_empty(piece.get(k))), None)
    if kind in _TEXT_PARTS:
        text = _filled(piece, "text", "content")
        if not isinstance(text, str):
            raise BadRecordError(f"{where}: got {_kind_of(text)}, expected text")
        return None, _text(text, where)
    if kind in _IMAGE_PARTS:
        source = _filled(piece, *_IMAGE_KEYS)
        return (None if _is_empty(source) else _image(source, where)), None
    if isinstance(kind, str) and "video" in kind:
        raise BadRecordError(f"{where}: {_NO_VIDEO}")
    raise BadRecordError(f"{where}: got a part of type {kind!r:.40}, expected text or an image")


def _alternating(turns: list[_Turn]) -> list[dict[str, Any]]:
    """Messages from the first question to the last reply, taking turns.

    Many ShareGPT records begin in the middle of a talk, with a reply to nothing: it is left out.
    """
    messages: list[dict[str, Any]] = []
    wanted = "user"
    for turn in turns:
        number = turn.number
        if turn.role == "system":
            if messages:
                raise BadRecordError(f"turn {number}: a system turn in the middle")
            messages.append({"role": "system", "content": turn.parts})
            continue
        if turn.role != wanted:
            if turn.role == "assistant" and not any(m["role"] == "user" for m in messages):
                continue
            raise BadRecordError(f"turn {number}: got two turns of the {turn.role} in a row")
        if turn.role == "assistant" and not "".join(p["text"] for p in turn.parts).strip():
            raise BadRecordError(f"turn {number}: an empty reply")
        cut = {"cut": True} if turn.is_cut else {}
        messages.append({"role": turn.role, "content": turn.parts, **cut})
        wanted = "assistant" if turn.role == "user" else "user"
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
    return parts


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

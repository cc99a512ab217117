"""Records with other replies than those they were written with; everything else stays as it is."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_msd.training.data.records import (
    ROLES,
    BadRecordError,
    Record,
    filled_name,
    parse_record,
)

_ANY = "-"


def parse_questions(raw: Any) -> Record:
    """A record of which only the questions count: each of them has a reply, of no meaning.

    So a reply may be missing, at the end too, or empty, or hold what no reply may hold.

    Raises:
        BadRecordError: it is not a conversation with at least one question.
    """
    turns = _turns(raw)
    return parse_record(raw if turns is None else _replaced(raw, [_ANY] * len(turns)))


def with_replies(
    raw: Mapping[str, Any], replies: Sequence[str], cut: Collection[int] = ()
) -> dict[str, Any]:
    """A record's questions with these replies, in the record's own spelling.

    Replies before the first question are left out. With fewer replies than questions the record
    ends after the last reply, and images of later questions are left out too.

    Args:
        raw: a record that `parse_questions` reads.
        replies: to the first questions, one each; at least one.
        cut: numbers, from 0, of replies that ended at a limit of tokens.

    Raises:
        BadRecordError: a reply that no record can hold.
    """
    record = _replaced(raw, replies, cut)
    name = filled_name(raw, "image", "images")
    whole = _replaced(raw, [_ANY] * len(_turns(raw) or []))
    if name and raw[name] and _num_turns(record) < _num_turns(whole):
        bare = _read(_without_images(whole))
        # Without places for them, all images are the first question's.
        if bare is None or bare.images:
            images = raw[name] if isinstance(raw[name], list) else [raw[name]]
            for count in range(len(images)):
                shorter = _without_images(record) | ({name: images[:count]} if count else {})
                if _read(shorter) is not None:
                    return shorter
    parse_record(record)
    return record


def _num_turns(record: Mapping[str, Any]) -> int:
    return len(_turns(record) or [])


def _without_images(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("image", "images")}


def _read(record: Mapping[str, Any]) -> Record | None:
    try:
        return parse_record(record)
    except BadRecordError:
        return None


def _turns(raw: Any) -> list[Any] | None:
    name = filled_name(raw, "conversations", "messages") if isinstance(raw, Mapping) else None
    return raw[name] if name and isinstance(raw[name], list) else None


def _replaced(
    raw: Mapping[str, Any], replies: Sequence[str], cut: Collection[int] = ()
) -> dict[str, Any]:
    turns: list[Any] = []
    used, question = 0, None  # the last question, for its spelling
    for turn in _turns(raw) or []:
        role = _role(turn)
        if role == "assistant" and question is None:
            continue
        if used == len(replies) and role in ("user", "assistant"):
            break
        if role == "user":
            question = turn
        elif role == "assistant":
            turn = _saying(turn, replies[used], used in cut)
            used += 1
        turns.append(turn)
    if used < len(replies) and turns and _role(turns[-1]) == "user":
        empty = {"from": "gpt"} if "from" in turns[-1] else {"role": "assistant"}
        turns.append(_saying(empty, replies[used], used in cut))
    name = filled_name(raw, "conversations", "messages")
    return {**raw, str(name): turns}


def _role(turn: Any) -> str | None:
    name = filled_name(turn, "from", "role") if isinstance(turn, Mapping) else None
    spoken = turn[name] if name else None
    return ROLES.get(spoken) if isinstance(spoken, str) else None


def _saying(turn: Mapping[str, Any], text: str, is_cut: bool) -> dict[str, Any]:
    name = filled_name(turn, "value", "content") or ("value" if "from" in turn else "content")
    is_parts = isinstance(turn.get(name), list)
    kept = {key: value for key, value in turn.items() if key != "cut"}
    said = {name: [{"type": "text", "text": text}] if is_parts else text}
    return {**kept, **said, **({"cut": True} if is_cut else {})}

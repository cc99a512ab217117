"""A few short conversations on disk, with and without pictures."""

import json
from pathlib import Path

from tests.common import tiny


def write_conversations(folder: Path, count: int = 12, characters: str = "") -> tuple[Path, Path]:
    """Write `text.jsonl` and `multimodal.json` with so many records each; returns their paths.

    Each first reply ends with all of ``characters``, another one of them first in each record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, multimodal = [], []
    for i in range(count):
        question, reply = f"what is {i} and {i}?", f"it is {2 * i}, " + "I think " * (i % 4)
        start = i * len(characters) // count
        reply += characters[start:] + characters[:start]
        text.append({"id": str(i), "conversations": _turns(question, reply)})
        tiny.image(i).save(folder / f"{i}.png")
        turns = _turns("<image>\n" + question, reply) + _turns("and then?", "nothing more.")
        multimodal.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    (folder / "multimodal.json").write_text(json.dumps(multimodal, indent=1))
    return folder / "text.jsonl", folder / "multimodal.json"


def _turns(question: str, reply: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]

"""Prompts that people wrote, for the real target to answer.

    python -m demo_factory.real.prompts --output build/real

writes `prompts.json` and `held_out.json` in the form that `vllm-msd regenerate` reads: turns of
7,168 chats between people (`chitchat-dataset`, MIT) and questions of `chatterbot-corpus` (BSD). The
replies in them are those people's, and are to be replaced. A chat is held out as a whole.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vllm_msd.demo.paths import cache_dir
from vllm_msd.demo.real.packages import fetch
from vllm_msd.storage import write_text

DATA_PACKAGES = ("chitchat-dataset==0.9.0", "chatterbot-corpus==1.3.3")
WORDS = range(3, 121)  # of a prompt
LONG_CHATS = 0.5  # the share of longer chats whose first two questions stay together
HELD_OUT = {"chat": 20, "question": 5}  # one in so many
SEED = 0
RECORDS, HELD_OUT_RECORDS = 16_000, 400  # at most

Record = dict[str, Any]


def chats(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Identity and turns of each chat; what one person wrote in a row is one turn."""
    content = json.loads((folder / "chitchat_dataset" / "dataset.json").read_text("utf-8"))
    for name, chat in content.items():
        turns = [" ".join(part["text"].strip() for part in turn) for turn in chat["messages"]]
        if chat.get("prompt"):
            turns.insert(0, chat["prompt"].strip())
        yield f"chat-{name}", turns


def questions(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Identity, question and answer of the English part of the chatterbot corpus."""
    for file in sorted((folder / "chatterbot_corpus" / "data" / "english").glob("*.yml")):
        for number, turns in enumerate(yaml.safe_load(file.read_text("utf-8"))["conversations"]):
            yield f"{file.stem}-{number}", [str(turn).strip() for turn in turns]


def records(turns: list[str], identity: str, rng: random.Random) -> Iterator[Record]:
    """A record for each turn as a question; of some chats one with the first two questions."""
    if len(turns) >= 4 and rng.random() < LONG_CHATS:
        if all(turns[:4]) and len(" ".join(turns[:3]).split()) in WORDS:
            yield _record(identity, turns[:4])
        turns = turns[4:]
    for number, turn in enumerate(turns):
        if len(turn.split()) in WORDS:
            answer = turns[number + 1] if number + 1 < len(turns) else ""
            yield _record(f"{identity}-{number}", [turn, answer or "."])


def _record(identity: str, turns: list[str]) -> Record:
    speakers = ("human", "gpt")
    said = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": identity, "conversations": said}


def collect(folder: Path) -> tuple[list[Record], list[Record]]:
    """Records to train on and held-out ones; the same questions once."""
    rng = random.Random(SEED)
    kept: list[Record] = []
    held_out: list[Record] = []
    seen: set[str] = set()
    for kind, source in (("chat", chats(folder)), ("question", questions(folder))):
        for identity, turns in source:
            digest = hashlib.sha256(identity.encode()).digest()
            chosen = held_out if digest[0] % HELD_OUT[kind] == 0 else kept
            for record in records(turns, identity, rng):
                asked = str([turn["value"].lower() for turn in record["conversations"][::2]])
                if asked not in seen:
                    seen.add(asked)
                    chosen.append({**record, "kind": kind})
    return kept, held_out


def pick(rows: list[Record], count: int) -> list[Record]:
    """So many records, shuffled; up to a third are questions and longer chats, which are few."""
    rng = random.Random(SEED)
    rng.shuffle(rows)
    few = [row for row in rows if row["kind"] == "question" or len(row["conversations"]) > 2]
    few = few[: count // 3]
    kept = {row["id"] for row in few}
    rest = [row for row in rows if row["id"] not in kept][: count - len(few)]
    chosen = few + rest
    rng.shuffle(chosen)
    return chosen


def write_prompts(
    output: Path, count: int = RECORDS, held_out_count: int = HELD_OUT_RECORDS
) -> tuple[list[Record], list[Record]]:
    """Write `prompts.json` and `held_out.json` with so many records at most; gives both."""
    kept, held_out = collect(fetch(DATA_PACKAGES, cache_dir() / "real-prompts"))
    chosen = pick(kept, count), pick(held_out, held_out_count)
    for name, rows in zip(("prompts", "held_out"), chosen, strict=True):
        path = output / f"{name}.json"
        write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {len(rows)} records to {path}", file=sys.stderr)
    return chosen


def main() -> None:
    """Fetch the two packages and write the two files."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_factory.real.prompts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="folder")
    parser.add_argument("--records", type=int, default=RECORDS, help="to train on, at most")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT_RECORDS, help="to measure on, at most"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write_prompts(args.output, args.records, args.held_out)


if __name__ == "__main__":
    main()

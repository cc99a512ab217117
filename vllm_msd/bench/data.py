"""The requests of a run: the demo's samples, LLaVA-style conversations, or MMSpec's folder."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_msd.errors import DataError
from vllm_msd.measure.inputs import Sample
from vllm_msd.storage import storage_errors
from vllm_msd.training.data.images import load_image
from vllm_msd.training.data.index import RecordFile, image_roots
from vllm_msd.training.data.records import BadRecordError, Record, parse_record
from vllm_msd.training.data.replies import parse_questions

MMSPEC = "mmspec.jsonl"


@dataclass(frozen=True)
class Requests:
    """Samples with where they come from; ``left_out`` tells of records that were not usable."""

    samples: list[Sample]
    source: str
    left_out: list[str]


@dataclass(frozen=True)
class _Question:
    """A request whose pictures are not read yet. place: for messages about it."""

    place: str
    prompt: list[dict[str, Any]]
    images: list[str]
    kind: str


def load_requests(
    data: str | None, roots: Sequence[str], count: int, kinds: Sequence[str] | None = None
) -> Requests:
    """The first ``count`` requests, the kinds of work in turn; fewer where there are no more.

    Of a conversation the last question is asked; the turns before it stay in the prompt with the
    replies that the data have. MMSpec's data have no replies: there the first question is asked.

    Args:
        data: a JSON or JSONL file of ShareGPT, LLaVA or OpenAI conversations, a folder with
            MMSpec's `mmspec.jsonl` in it, or None for the demo's held-out samples.
        roots: folders of relative image paths; by default beside the data.
        count: of requests, whose pictures are read.
        kinds: of work to choose among; None for all.

    Raises:
        DataError: no usable request, a kind that there is none of, or a picture that cannot be
            read.
    """
    if data is None:
        from vllm_msd.demo.samples import held_out_samples

        samples = _of_kinds(held_out_samples(), kinds)
        return Requests(samples[:count], "the demo's held-out samples", [])
    path = Path(data).expanduser()
    if (path / MMSPEC).is_file() or path.name == MMSPEC:
        folder = path.parent if path.name == MMSPEC else path
        questions, left_out = list(_mmspec(folder / MMSPEC)), list[str]()
        folders = [*(Path(root).expanduser() for root in roots), folder / "images", folder]
    elif path.is_dir():
        raise DataError(f"--data: {path} is a folder without {MMSPEC}. Give a file, or MMSpec's.")
    else:
        questions, left_out, folders = _conversations(path, roots)
    if not questions:
        raise DataError(f"--data: {path} has no question in it. Give one with some.")
    chosen = in_turn(_of_kinds(questions, kinds))[:count]
    return Requests([_sample(q, folders) for q in chosen], path.name, left_out)


def _of_kinds(questions: Iterable[Any], kinds: Sequence[str] | None) -> list[Any]:
    found = list(questions)
    known = {one.kind for one in found}
    if unknown := set(kinds or ()) - known:
        got, expected = ", ".join(sorted(unknown)), ", ".join(sorted(known))
        raise DataError(f"--kinds: got {got}; expected some of {expected}.")
    return found if kinds is None else [one for one in found if one.kind in kinds]


def in_turn(questions: Iterable[Any]) -> list[Any]:
    """What has a ``kind``, one of each kind after another, each kind in its own order."""
    kinds: dict[str, list[Any]] = {}
    for one in questions:
        kinds.setdefault(one.kind, []).append(one)
    rounds = zip_longest(*kinds.values())
    return [one for one in chain.from_iterable(rounds) if one is not None]


def _conversations(
    path: Path, roots: Sequence[str]
) -> tuple[list[_Question], list[str], list[Path]]:
    file = RecordFile(path, parse=_parse)
    questions = []
    for number in range(len(file)):
        record = file[number]
        prompt = [
            {"role": message["role"], "content": message["content"]}
            for message in record.messages[:-1]
        ]
        place = f"{path.name}, line {file.line(number)}"
        questions.append(_Question(place, prompt, record.images, record.kind or file.name))
    return questions, [str(bad) for bad in file.bad], image_roots(roots, [file])


def _parse(raw: Any) -> Record:
    """A conversation; one that ends with a question may have no reply to that."""
    try:
        return parse_record(raw)
    except BadRecordError:
        record = parse_questions(raw)
        if sum(message["role"] == "user" for message in record.messages) > 1:
            raise  # replies before the last question must be real ones
        return record


def _mmspec(path: Path) -> Iterator[_Question]:
    with storage_errors(path, "read"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON: {error}") from error
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise DataError(f"{place}: got turns {turns!r:.60}, expected a list of questions.")
        images = row.get("image") or []
        images = images if isinstance(images, list) else [images]
        if not all(isinstance(image, str) for image in images):
            raise DataError(f"{place}: got image {images!r:.60}, expected names of files.")
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": turns[0]}]
        kind = str(row.get("category") or row.get("topic") or path.stem)
        yield _Question(place, [{"role": "user", "content": content}], images, kind)


def _sample(question: _Question, folders: Sequence[Path]) -> Sample:
    images: list[Image.Image] = []
    for source in question.images:
        try:
            images.append(load_image(source, list(folders)))
        except BadRecordError as error:
            looked = ", ".join(map(str, folders))
            raise DataError(
                f"{question.place}: {error}. Looked in {looked}; --image-root names other folders."
            ) from error
    return Sample(images, question.prompt, question.kind)

"""`vllm-msd trim`: a draft vocabulary for a draft that is there, by counting, without training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_msd.checkpoint import (
    check_draft_fits_target,
    load_draft,
    load_draft_config,
    save_draft,
    with_vocabulary,
)
from vllm_msd.checkpoint.files import locate, read_json
from vllm_msd.checkpoint.fit import text_config
from vllm_msd.checkpoint.store import check_destination, target_info
from vllm_msd.provenance import provenance
from vllm_msd.storage import storage_errors, write_json
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.targets import load_renderer
from vllm_msd.training.vocabulary import (
    COUNTS,
    check_size,
    choose,
    count_replies,
    covered,
    special_ids,
)

# Sizes that the report shows the coverage of, beside the chosen one.
_SIZES = tuple(1 << power for power in range(10, 18))
_PROVENANCE = "provenance.json"


def trim(
    draft: str | Path,
    data: list[str],
    output: str | Path,
    target: str,
    size: int | None = None,
    coverage: float = 0.98,
    force: bool = False,
) -> dict[str, Any]:
    """Write a copy of a draft that proposes the most frequent tokens alone.

    A killed call goes on where it was when it is made again, and leaves the same files.

    Args:
        draft: folder or hub name, in a published layout or our own.
        data: files of conversations, whose replies are counted.
        output: folder for the new draft, and ``counts.json``.
        target: folder or hub name; its tokenizer and config are read.
        size: tokens to keep. None keeps as many as ``coverage`` takes.
        coverage: share of the tokens held out to be covered.
        force: write into a folder that holds something else.

    Returns:
        ``size`` and ``vocab_size``; ``covers`` and ``covers_held_out``, shares of the tokens
        counted and held out; ``by_size``, the latter for other sizes; ``records``, ``tokens``, and
        ``skipped``, records that could not be used.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: what the user can mend.
    """
    source, folder = locate(draft), Path(output).expanduser()
    check_destination(folder, source, force, own=(COUNTS, _PROVENANCE))
    config = load_draft_config(source)
    renderer, hf_config = load_renderer(target)
    check_draft_fits_target(config, hf_config)
    vocab_size = text_config(hf_config).vocab_size
    special = special_ids(renderer, vocab_size)
    if size is not None:
        check_size(size, special, vocab_size)
    files = [RecordFile(path) for path in data]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(map(len, files)), unit="record", dynamic_ncols=True) as bar:
        counts = count_replies(renderer, files, vocab_size, folder / COUNTS, bar.update)
    judged = counts.held_out if counts.held_out.any() else None
    ids = choose(counts.counted, special, size, coverage, judged)
    bad = [*(bad for file in files for bad in file.bad), *counts.bad]
    figures = {
        "size": len(ids),
        "vocab_size": vocab_size,
        "covers": round(covered(counts.counted, ids), 6),
        "covers_held_out": round(covered(counts.held_out, ids), 6),
        "by_size": {
            s: round(covered(counts.held_out, choose(counts.counted, special, s)), 6)
            for s in _SIZES
            if len(special) <= s < vocab_size
        },
        "records": counts.done,
        "tokens": int(counts.counted.sum() + counts.held_out.sum()),
        "skipped": list(map(str, bad)),
    }
    _, state = load_draft(source)
    config = replace(config, target=target_info(target, hf_config, folder))
    trimmed = with_vocabulary(config, state, torch.from_numpy(ids))
    note = source / _PROVENANCE
    known = read_json(note) if note.is_file() else {"what": "draft"}
    about = provenance(draft=str(draft), data=data, target=target, size=size, coverage=coverage)
    write_json(folder / _PROVENANCE, {**known, "draft_vocabulary": {**about, **figures}})
    save_draft(folder, *trimmed)
    return figures

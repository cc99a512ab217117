"""`vllm-msd eval`: a draft's acceptance on conversations, without an engine."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_msd.checkpoint import check_draft_sizes, load_draft, with_vocabulary
from vllm_msd.checkpoint.files import CONFIG, locate, read_json
from vllm_msd.draft import MSDDraft, MSDDraftConfig
from vllm_msd.errors import CheckpointError, ConfigError, DataError
from vllm_msd.provenance import provenance
from vllm_msd.storage import check_folder, write_json
from vllm_msd.training import model_card
from vllm_msd.training.acceptance import (
    chain_acceptance,
    greedy_replies,
    summary,
    tree_acceptance,
)
from vllm_msd.training.data.batches import kind_of
from vllm_msd.training.data.index import RecordFile, image_roots
from vllm_msd.training.data.render import Renderer
from vllm_msd.training.initial import in_float
from vllm_msd.training.profile import MIN_VERIFICATIONS, preferred_tokens
from vllm_msd.training.settings import VISUAL_ROWS
from vllm_msd.training.targets import Target
from vllm_msd.training.vocabulary import check_size, choose, count_replies, covered, special_ids
from vllm_msd.tree import TreeConfig


def evaluate(
    target: str | Path,
    draft: str | Path,
    data: list[str],
    image_root: list[str] | None = None,
    records: int = 50,
    num_speculative_tokens: int = 5,
    tree_depth: int | None = None,
    tree_top_k: int | None = None,
    max_tokens: int = 128,
    max_length: int = 4096,
    batch_size: int = 8,
    target_dtype: str = "auto",
    device: str = "auto",
    visual_rows: str | None = None,
    draft_vocab: list[int] | None = None,
    write: bool = False,
) -> dict[str, Any]:
    """Count what the target would accept of the draft on its own greedy replies.

    Args:
        target, draft: folders or hub names.
        data: files of conversations; the last question of each record is answered.
        image_root: where relative image paths start (default: the data's folders).
        records: the first so many of each kind.
        num_speculative_tokens: drafted per verification.
        tree_depth, tree_top_k: draft trees instead of chains.
        max_tokens: of a reply. max_length: of a prompt. batch_size: prompts at a time.
        target_dtype: ``auto`` is the checkpoint's. device: ``auto`` or ``cpu``.
        visual_rows: how the draft treats them; None reads its provenance.
        draft_vocab: sizes of draft vocabularies to try. Their tokens are chosen by the replies in
            the data's other records, as `trim` chooses them.
        write: put the acceptance profile into the draft's config (``msd_acceptance``) and the
            figures into its model card, if it has one.

    Returns:
        ``all`` and ``kinds``: ``acceptance_length`` (the target's own token counted),
        ``accepted_at_depth`` per verification, ``accuracy_at_depth`` per row (chains only),
        ``profile`` (chains only, see `profile.acceptance_profile`), and ``skipped``, records that
        could not be used. ``draft_vocab``: for each size the ``acceptance_length``, its share
        ``accepted`` of the accepted tokens, and the share ``covers`` of the target's replies.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend.
    """
    tree = TreeConfig.from_settings(num_speculative_tokens, tree_depth, tree_top_k)
    folder = locate(draft)
    if write:
        _check_writable(folder, Path(draft), tree)
    config, state = load_draft(folder)
    if visual_rows is None:
        visual_rows = _trained_visual_rows(folder)
    files = [RecordFile(path) for path in data]
    roots = image_roots(image_root or [], files)
    where = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    model = Target.load(target, target_dtype, device=where)
    check_draft_sizes(config, model.text)
    state = in_float(state)
    chosen = _first_of_each_kind(files, records)
    renderer = model.renderer(roots, max_length)
    vocabularies = _vocabularies(model, renderer, files, chosen, draft_vocab or [])
    with tqdm(total=len(chosen), unit="reply") as bar:
        replies, bad = greedy_replies(
            model, renderer, chosen, max_tokens, tree.depth, batch_size,
            bar.update,
        )  # fmt: skip
    if not replies:
        shown = "".join(f"\n  {b}" for b in bad[:3])
        raise DataError(f"no reply of more than one token to count on.{shown}")

    def counted(config: MSDDraftConfig, state: dict[str, Tensor]) -> dict[str, Any]:
        small = MSDDraft.from_state_dict(config, state).eval().to(where)
        if tree.is_chain:
            return summary(
                chain_acceptance(model, small, replies, tree.depth, visual_rows, batch_size)
            )
        return summary(tree_acceptance(model, small, replies, tree, visual_rows))

    found = counted(config, state)
    said = np.bincount([t for r in replies for t in r.tokens], minlength=model.text.vocab_size)
    tried = []
    for ids in vocabularies:
        trimmed = counted(*with_vocabulary(config, state, torch.from_numpy(ids)))
        length = trimmed["all"]["acceptance_length"]
        whole = found["all"]["acceptance_length"]
        tried.append(
            {
                "size": len(ids),
                "acceptance_length": length,
                # Without the one token of each verification that is the target's own.
                "accepted": round((length - 1) / (whole - 1), 4) if whole > 1 else None,
                "covers": round(covered(said, ids), 4),
            }
        )
    settings = {
        "target": str(target), "draft": str(draft), "data": [f.path.name for f in files],
        "records": records, "num_speculative_tokens": num_speculative_tokens,
        "tree_depth": tree_depth, "tree_top_k": tree_top_k, "max_tokens": max_tokens,
        "target_dtype": target_dtype, "visual_rows": visual_rows,
    }  # fmt: skip
    skipped = [*(str(b) for f in files for b in f.bad), *map(str, bad)]
    if write:
        _write(folder, found)
    return {**provenance(**settings), **found, "draft_vocab": tried, "skipped": skipped}


def _vocabularies(
    target: Target,
    renderer: Renderer,
    files: list[RecordFile],
    chosen: list[tuple[RecordFile, int]],
    sizes: list[int],
) -> list[np.ndarray]:
    """Draft vocabularies of these sizes, by the records that are not chosen for evaluation."""
    if not sizes:
        return []
    special = special_ids(renderer, target.text.vocab_size)
    for size in sizes:
        check_size(size, special, target.text.vocab_size, "--draft-vocab")
    taken = {(id(file), number) for file, number in chosen}
    rest = [(f, n) for f in files for n in range(len(f)) if (id(f), n) not in taken]
    if not rest:
        raise DataError(
            "--draft-vocab: every record is evaluated, so none is left to choose the tokens by. "
            "Give more data, or a smaller --records."
        )
    with tqdm(total=len(rest), unit="record", desc="tokens") as bar:
        counts = count_replies(
            renderer, files, target.text.vocab_size, report=bar.update, records=rest
        )
    return [choose(counts.counted + counts.held_out, special, size) for size in sizes]


def _check_writable(folder: Path, given: Path, tree: TreeConfig) -> None:
    """Refuse `write` where its figures have no place, before anything is counted."""
    if not tree.is_chain:
        raise ConfigError("write: a profile is counted on chains. Leave the tree's sizes out.")
    if not given.expanduser().is_dir():
        raise ConfigError(f"write: got {given}, expected a folder. Fetch the draft into one first.")
    if read_json(folder / CONFIG).get("model_type") != "msd":
        raise ConfigError(
            f"write: {folder} is in a published layout, whose config has no place for a profile. "
            "`vllm-msd convert` makes a folder that has."
        )
    check_folder(folder, "write")


def _write(folder: Path, table: dict[str, Any]) -> None:
    if "profile" not in table:
        raise DataError(
            f"write: got {table['all']['verifications']} verifications, expected at least "
            f"{MIN_VERIFICATIONS} for a profile. Give more --records. Nothing was written."
        )
    profile = table["profile"]
    raw = {**read_json(folder / CONFIG), "msd_acceptance": profile}
    tokens = None
    if raw.get("tree_depth") is None:  # of a tree it would be the nodes, which no chain tells
        tokens = raw["num_speculative_tokens"] = preferred_tokens(profile["by_depth"])
        for proposal in raw.get("speculators_config", {}).get("proposal_methods", []):
            proposal["speculative_tokens"] = tokens
    write_json(folder / CONFIG, raw)
    model_card.write_acceptance(folder, table, tokens)


def _trained_visual_rows(folder: Path) -> str:
    note = folder / "provenance.json"
    settings = read_json(note).get("settings") if note.is_file() else None
    found = settings.get("visual_rows") if isinstance(settings, dict) else None
    if found is not None and found not in VISUAL_ROWS:
        raise CheckpointError(
            f"{note}: visual_rows: got {found!r:.80}, expected one of {', '.join(VISUAL_ROWS)}. "
            "Give --visual-rows."
        )
    return found or VISUAL_ROWS[0]


def _first_of_each_kind(files: list[RecordFile], count: int) -> list[tuple[RecordFile, int]]:
    seen: Counter[str] = Counter()
    chosen = []
    for file in files:
        for number in range(len(file)):
            kind = kind_of(file[number], file)
            seen[kind] += 1
            if seen[kind] <= count:
                chosen.append((file, number))
    return chosen

"""The model card of a draft: the `README.md` of its folder, as the hub shows it."""

import re
from pathlib import Path
from typing import Any

from vllm_msd.checkpoint.files import is_hub_name
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.storage import write_text
from vllm_msd.training.settings import TrainSettings

CARD = "README.md"
_BEGIN, _END = "<!-- acceptance:begin -->", "<!-- acceptance:end -->"
# What shapes a draft; the rest is in provenance.json.
_SHOWN = (
    "loss", "regression_weight", "distillation_weight", "draft_steps", "step_decay", "noise",
    "visual_rows", "curriculum", "batch_size", "learning_rate", "warmup_steps", "init", "layers",
    "precision", "seed",
)  # fmt: skip


def model_card(
    config: MSDDraftConfig,
    note: dict[str, Any],
    settings: TrainSettings,
    table: dict[str, Any] | None,
) -> str:
    """The card's text.

    Args:
        config: of the draft.
        note: its provenance, with ``steps``, ``minutes``, ``data``, ``machine`` and ``versions``.
        settings: of the run.
        table: figures on held-out records (see `acceptance.summary`), or None.
    """
    target = config.target.name_or_path or settings.target
    on_hub = is_hub_name(target)
    shown_target = target if on_hub else Path(target).name
    front = ["---", f"license: {settings.license or 'other'}", "library_name: vllm"]
    if on_hub:
        front += [f"base_model: {target}"]
    front += ["tags: [speculative-decoding, msd, vllm]", "---"]
    data = [f"| {d['file']} | {d['records']} | `{d['sha256'][:16]}` |" for d in note["data"]]
    values = settings.as_dict()
    values["learning_rate"] = f"{settings.highest_rate(config.hidden_size):.2e}"
    chosen = [f"| `{key}` | {values[key]} |" for key in _SHOWN]
    # Not the setting, which may be a folder's name.
    proposed = f"{config.draft_vocab_size:,} of " if config.draft_vocab_size else "all "
    chosen.append(f"| `draft_vocab` | {proposed}{config.num_token_ids:,} tokens |")
    machine = note["machine"]
    place = machine.get("gpu") or f"{machine.get('processor')}, {machine.get('cores')} cores"
    return "\n".join([
        *front, "", f"# MSD draft for {shown_target}", "",
        f"A draft for Multimodal Speculative Decoding (arXiv 2505.14260) of `{shown_target}`. It",
        "guesses next tokens, which the target checks: the output stays the target's own.", "",
        "## Serve", "", "With the vllm-msd plugin installed:", "", "```bash",
        f"vllm serve {target if on_hub else 'TARGET'} --speculative-config \\",
        f'    \'{{"method": "msd", "model": "THIS_FOLDER_OR_REPOSITORY", "num_speculative_tokens": '
        f"{config.num_speculative_tokens}}}'", "```", "",
        "## Acceptance", "", acceptance_section(table), "",
        "## Training", "",
        f"{note['steps']} steps of {settings.batch_size} records, {note['minutes']} minutes on "
        f"{place}; vllm-msd {note['versions']['vllm-msd']}, torch {note['versions']['torch']}.",
        "`provenance.json` has all settings, versions and digests.", "",
        "| data | records | sha256 |", "| --- | --- | --- |", *data, "",
        "| setting | value |", "| --- | --- |", *chosen, "",
        "## License", "",
        settings.license or "Not stated. See those of the target and of the data.", "",
    ])  # fmt: skip


def acceptance_section(table: dict[str, Any] | None) -> str:
    """Figures by kind of work and depth, between marks by which `write_acceptance` finds them."""
    if table is None:
        return f"{_BEGIN}\nNot measured.\n{_END}"
    rows = {**table["kinds"], "all": table["all"]}
    depth = max(len(row["accepted_at_depth"]) for row in rows.values())
    lines = [
        _BEGIN,
        "Greedy chains on held-out records: tokens per verification, the target's own counted, and",
        "the share of verifications that accept so many drafted tokens or more.",
        "",
        "| kind | tokens per verification | " + " | ".join(map(str, range(1, depth + 1))) + " |",
        "| --- |" + " --- |" * (depth + 1),
    ]
    for kind, row in rows.items():
        shares = [f"{share:.2f}" for share in row["accepted_at_depth"]]
        cells = [f"{row['acceptance_length']:.2f}", *shares, *["0.00"] * (depth - len(shares))]
        name = kind.replace("|", "\\|")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{table['all']['verifications']} verifications.", _END])


def write_acceptance(folder: Path, table: dict[str, Any], tokens: int | None = None) -> bool:
    """Put figures into a draft's card, and how many tokens to draft into its command, if given.

    False where the draft has no card with a place for figures.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        return False
    if tokens is not None:
        before = re.sub(r'(?<="num_speculative_tokens": )\d+', str(tokens), before)
    write_text(path, before + acceptance_section(table) + after)
    return True

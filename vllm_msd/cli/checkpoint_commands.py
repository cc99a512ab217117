"""``vllm-msd convert`` and ``vllm-msd inspect``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_msd.errors import CheckpointError


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands."""
    _add_convert(subparsers)
    _add_inspect(subparsers)


def _add_convert(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="turn a published draft into this project's format",
        description="Read an MSD draft in a published layout (or our own) and write it in our own "
        "format: safetensors, the target it was trained for, a format version. Weights are not "
        "changed.",
        epilog="examples:\n"
        "  vllm-msd convert lucylyn/MSD-LLaVA1.5-7B drafts/llava-7b\n"
        "  vllm-msd convert downloads/draft drafts/qwen --target Qwen/Qwen2-VL-7B-Instruct\n"
        "  vllm-msd convert downloads/draft models/llava/msd --target models/llava\n"
        "  vllm-msd convert lucylyn/MSD-LLaVA1.5-7B drafts/llava-7b --format speculators",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="folder or hub name of the draft")
    parser.add_argument("dst", metavar="DST", help="folder to write to")
    parser.add_argument(
        "--target",
        metavar="T",
        help="folder or hub name of the target the draft was trained for; a folder is checked to "
        "fit (default: the one known for a published draft)",
    )
    parser.add_argument(
        "--format",
        choices=("msd", "speculators"),
        default="msd",
        help="speculators insists on what `vllm serve DRAFT` needs: the target's hub name or full "
        "path (default: msd, in which a pair of folders side by side can be moved)",
    )
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty"
    )
    parser.set_defaults(func=_convert)


def _convert(args: argparse.Namespace) -> int:
    from vllm_msd.checkpoint import convert_draft

    target = args.target or known_target(args.src)
    is_movable = args.format == "msd"
    if not is_movable and target is None:
        target = recorded_target(args.src)
        if target is None:
            raise CheckpointError(
                f"{args.src}: it does not say which target it is for, which --format speculators "
                "needs. Give --target."
            )
    config = convert_draft(args.src, args.dst, target, args.force, _report, is_movable)
    print(f"wrote {args.dst}: {config.layer_type} draft, hidden size {config.hidden_size}")
    if args.format == "speculators":
        print(_how_to_serve(args.dst, str(config.target.name_or_path)))
    if config.target.name_or_path is None:
        print("The target is not recorded; give --target to record it.", file=sys.stderr)
    return 0


def _how_to_serve(draft: str, target: str) -> str:
    from vllm_msd.checkpoint.files import locate, target_place

    place = target_place(locate(draft), target)
    if not Path(place).is_dir():
        return f"serve it: vllm serve {draft}"
    return (
        f"serve it: vllm serve {draft}\nThis works under vLLM 0.32. vLLM 0.33 takes targets by "
        f"their hub names alone; there: vllm serve {place} --speculative-model {draft}"
    )


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def recorded_target(draft: str) -> str | None:
    """Folder or hub name of the target that a draft names, or that a published one is known for."""
    from vllm_msd.checkpoint import load_draft_config
    from vllm_msd.checkpoint.files import locate, target_place

    folder = locate(draft)
    name = load_draft_config(folder).target.name_or_path
    return known_target(draft) if name is None else target_place(folder, name)


def known_target(src: str) -> str | None:
    """The target of a published draft, told by its name, also of a local copy's folder."""
    from vllm_msd.vllm_plugin.configuration.resolve import PUBLISHED_DRAFTS

    by_name = {draft.split("/")[1]: target for target, draft in PUBLISHED_DRAFTS.items()}
    return by_name.get(Path(src).name)


def _add_inspect(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="print what a draft checkpoint holds",
        description="Print layout, shapes, target and tensors of an MSD draft, from the files' "
        "headers. Exits 2 when config and tensors do not belong together.",
        epilog="examples:\n"
        "  vllm-msd inspect drafts/llava-7b\n"
        "  vllm-msd inspect lucylyn/MSD-LLaVA1.5-7B --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="folder or hub name of the draft")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(func=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from vllm_msd.checkpoint import inspect_draft

    found = inspect_draft(args.path)
    print(json.dumps(found, indent=2) if args.json else _table(found))
    return 2 if found["problems"] else 0


def _table(found: dict[str, Any]) -> str:
    config, target = found["config"], found["config"]["target"]
    layout = found["layout"]
    layout = (
        f"msd, version {config['format_version']}" if layout == "msd" else f"{layout} (published)"
    )
    sizes = [f"{k} {v}" for k, v in target.items() if v is not None and k != "name_or_path"]
    rows = [
        ("path", found["path"]),
        ("layout", layout),
        ("target", ", ".join([target["name_or_path"] or "not recorded", *sizes])),
        (
            "layers",
            f"{config['num_hidden_layers']} of type {config['layer_type']}, q/k/v bias "
            f"{_yes(config['attention_bias'])}, input norm in layer 0 {_yes(config['input_norm'])}",
        ),
        (
            "shape",
            f"hidden {config['hidden_size']}, MLP {config['intermediate_size']}, "
            f"{config['num_attention_heads']} heads ({config['num_key_value_heads']} key/value) of "
            f"{config['head_dim']}, vocabulary {config['vocab_size']}",
        ),
        ("proposes", _proposed(config)),
        ("rotary", f"theta {config['rope_theta']:g}, RMS eps {config['rms_norm_eps']:g}"),
        (
            "weights",
            f"{found['num_parameters']:,} parameters, {found['bytes'] / 2**20:,.1f} MiB, "
            f"embedding table {_yes(found['has_embedding'])}",
        ),
    ]
    tensors = [
        (t["name"], "x".join(map(str, t["shape"])), t["dtype"], t["file"],
         "not read" if t["ignored"] else "")
        for t in found["tensors"]
    ]  # fmt: skip
    parts = [_columns(rows), "", _columns([("tensor", "shape", "dtype", "file", ""), *tensors]), ""]
    if found["problems"]:
        parts += ["This checkpoint cannot be used:", *(f"  {p}" for p in found["problems"])]
        parts += ["Fetch it again, or check that config.json and weights belong together."]
    else:
        parts += ["Config and tensors belong together."]
    return "\n".join(parts)


def _proposed(config: dict[str, Any]) -> str:
    """Which tokens a draft proposes."""
    size = config["draft_vocab_size"]
    if size is None:
        return "any token of the target"
    of = max(config["vocab_size"], config["target"]["vocab_size"] or 0)
    return f"{size:,} of the target's {of:,} tokens (a draft vocabulary)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)

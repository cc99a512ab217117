"""Settings of a training run: one table for Python, YAML files and command-line flags.

Every field of `TrainSettings` is a key of the YAML file and, with dashes, a flag. A flag wins over
the file, the file over the default.
"""
# The call in each field builds `dataclasses.field`.
# ruff: noqa: RUF009

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from vllm_msd.errors import ConfigError
from vllm_msd.storage import storage_errors

CURRICULA = ("two-stage", "text", "multimodal", "mixed")
VISUAL_ROWS = ("decoupled", "coupled", "dropped")
LOSSES = ("msd", "kl", "lk")
# Where figures go besides log.jsonl: a folder of the run, or a tracker of accelerate.
TRACKERS = ("wandb", "trackio", "mlflow")
REPORTS = ("tensorboard", *TRACKERS, "none")

# In a draft's units (see `units`) this suits widths from 128 to 4096 alike.
RATE_BY_WIDTH = 0.4


def _setting(
    default: Any,
    group: str,
    text: str,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    free: bool = False,
) -> Any:
    """A field with what `--help`, the checks and resuming need.

    free: the setting changes nothing about the weights, so a resumed run may have another one.
    """
    about = {
        "group": group, "help": text, "choices": choices, "least": least, "most": most,
        "free": free,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainSettings:
    """All settings of `vllm-msd train`, in the groups that `--help` shows.

    Raises `ConfigError` when a value is impossible.
    """

    target: str = _setting("", "data", "folder or hub name of the model to draft for (required)")
    output: str = _setting("", "data", "folder for all results (required)", free=True)
    text_data: list[str] = _setting([], "data", "ShareGPT conversations, JSON or JSONL")
    multimodal_data: list[str] = _setting([], "data", "LLaVA instruction data, JSON or JSONL")
    image_root: list[str] = _setting(
        [], "data", "where relative image paths start, tried in order (default: the data's folder)"
    )
    max_length: int = _setting(
        2048, "data", "tokens; later turns of a record are left out", least=8
    )
    max_bad_fraction: float = _setting(
        0.01, "data", "share of broken records above which the run stops", least=0, most=1,
        free=True,
    )  # fmt: skip
    eval_records: int = _setting(
        32, "data", "records of each kind held out for evaluation", least=0
    )

    target_dtype: str = _setting(
        "auto", "target", "of the frozen target; auto is what its checkpoint says",
        ("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    attention: str = _setting("sdpa", "target", "the target's attention code", ("sdpa", "eager"))
    target_name: str = _setting(
        "", "target", "what the draft's config names as its target (default: --target)"
    )
    license: str = _setting(
        "", "target", "of the draft, for its model card (apache-2.0, llama3, ...)", free=True
    )
    cache_features: str = _setting(
        "", "target", "folder that keeps the target's features, so that it runs once per record",
        free=True,
    )  # fmt: skip

    init: str = _setting(
        "target", "draft", "target (fitted to it), random, or the folder of a draft to go on from"
    )
    layers: int = _setting(1, "draft", "decoder layers", least=1)
    layer_type: str = _setting(
        "auto", "draft", "auto follows the target's language model", ("auto", "llama", "qwen2")
    )
    visual_rows: str = _setting(
        "decoupled", "draft", "decoupled is MSD; the others are there to be compared with",
        VISUAL_ROWS,
    )  # fmt: skip

    draft_vocab: str = _setting(
        "", "draft", "propose some of the target's tokens alone: the SIZE most frequent in the "
        "training data's replies, or those of the trimmed draft in a FOLDER (default: those of "
        "--init, else all)",
    )  # fmt: skip

    curriculum: str = _setting(
        "two-stage", "curriculum", "text only first, then a ramp (two-stage); one kind only; or "
        "mixed evenly, with the shares that two-stage has over the whole run", CURRICULA,
    )  # fmt: skip
    curriculum_epochs: int = _setting(40, "curriculum", "stairs of the ramp", least=1)
    curriculum_share: float = _setting(
        1.0, "curriculum", "share of the run that the ramp takes; then it stays at its end",
        least=0.0, most=1.0,
    )  # fmt: skip
    visual_share: float = _setting(
        1.0, "curriculum", "share of multimodal records at the end of the ramp", least=0, most=1
    )

    loss: str = _setting(
        "msd", "loss", "msd: the paper's, hidden states and tokens; kl: tokens alone; lk: KL that "
        "turns into the probability of acceptance", LOSSES,
    )  # fmt: skip
    regression_weight: float = _setting(
        1.0, "loss", "of smooth L1 on hidden states (msd only)", least=0
    )
    distillation_weight: float = _setting(
        0.1, "loss", "of soft cross-entropy on tokens (msd only)", least=0
    )
    noise: float = _setting(0.2, "loss", "width of even noise on hidden states", least=0)
    draft_steps: int = _setting(
        3, "loss", "steps drafted from the draft's own outputs; the paper has 1", least=1
    )  # fmt: skip
    step_decay: float = _setting(
        0.8, "loss", "weight of a step relative to the one before", least=0
    )
    reference_mask: bool = _setting(
        False, "loss", "count the rows that the published training counts"
    )

    steps: int = _setting(0, "optimiser", "length of the run; 0 takes it from --epochs", least=0)
    epochs: float = _setting(1.0, "optimiser", "passes over as many records as there are", least=0)
    batch_size: int = _setting(8, "optimiser", "records per step, over all processes", least=1)
    micro_batch_size: int = _setting(
        0, "optimiser", "records per forward pass; 0 takes a process's share at once", least=0,
        free=True,
    )  # fmt: skip
    learning_rate: float = _setting(
        0.0, "optimiser", "highest rate; 0 takes 0.4 / hidden size, which is 1e-4 for 4096", least=0
    )
    warmup_steps: int = _setting(
        500, "optimiser", "steps of even rise to it, at most a tenth of the run", least=0
    )
    decay: str = _setting("cosine", "optimiser", "after that", ("cosine", "linear", "constant"))
    weight_decay: float = _setting(0.01, "optimiser", "of AdamW", least=0)
    max_grad_norm: float = _setting(0.5, "optimiser", "gradients are clipped to this norm", least=0)
    precision: str = _setting(
        "bf16", "optimiser", "bf16 computes under autocast, weights stay fp32", ("bf16", "no")
    )
    gradient_checkpointing: bool = _setting(
        False, "optimiser", "compute the draft again on the way back, to save memory", free=True
    )
    seed: int = _setting(0, "optimiser", "of records, noise and new weights", least=0)

    resume: bool = _setting(False, "run", "go on from the newest checkpoint in --output", free=True)
    device: str = _setting("auto", "run", "where to compute", ("auto", "cpu"), free=True)
    workers: int = _setting(0, "run", "processes that prepare records", least=0, free=True)
    packing: bool = _setting(
        False,
        "run",
        "put short records of a micro-batch into one row of the draft's batch",
        free=True,
    )
    fsdp: bool = _setting(
        False,
        "run",
        "share the draft's weights, gradients and optimizer out over the processes (torchrun)",
    )
    length_pool: int = _setting(
        8, "run", "steps whose records are sorted by length together, against padding", least=1
    )
    report_to: str = _setting(
        "tensorboard", "run", "where figures go as they come, besides log.jsonl", REPORTS, free=True
    )
    log_every: int = _setting(10, "run", "steps", least=1, free=True)
    save_every: int = _setting(500, "run", "steps between checkpoints", least=1, free=True)
    keep_checkpoints: int = _setting(2, "run", "newest checkpoints kept", least=1, free=True)
    eval_every: int = _setting(
        500, "run", "steps between evaluations; two early ones come at a twentieth and a quarter "
        "of it", least=1, free=True,
    )  # fmt: skip
    eval_depth: int = _setting(5, "run", "tokens drafted per verification in evaluation", least=1)
    eval_max_tokens: int = _setting(64, "run", "of a held-out reply", least=1)
    stop_after_minutes: float = _setting(
        0.0, "run", "save and leave after this time; 0 runs to the end", least=0, free=True
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        for name in ("target", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing. Give {flag(name)}, or set it in the file.")
        wanted = {
            "text": ("text_data",),
            "multimodal": ("multimodal_data",),
        }.get(self.curriculum, ("text_data", "multimodal_data"))
        for name in wanted:
            if not getattr(self, name):
                raise ConfigError(
                    f"{name} is missing, which the curriculum {self.curriculum!r} needs. Give "
                    f"{flag(name)}, or choose another --curriculum."
                )

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "TrainSettings":
        """Settings from a YAML file (or none), with those given here in their place.

        Raises:
            ConfigError: an unreadable file, an unknown key or an impossible value.
        """
        return cls(**{**(read_yaml(path) if path else {}), **overrides})

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)

    def highest_rate(self, hidden_size: int) -> float:
        """The learning rate after the warm-up; wider layers take smaller steps."""
        return self.learning_rate or RATE_BY_WIDTH / hidden_size

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What keeps these settings from going on with a run of the `other` ones, a line each."""
        found = []
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), other.get(f.name, _default(f))
            if not f.metadata["free"] and mine != theirs:
                found.append(f"{f.name}: got {mine!r}, the run has {theirs!r}")
        return found


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by field name (dashes count as underscores)."""
    import yaml

    with storage_errors(path, "read", "Give a YAML file."):
        text = Path(path).read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    # Impossible dates are ValueErrors, and nothing bounds how deep a file may nest.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected a table of settings.")
    fields = {f.name: f for f in dataclasses.fields(TrainSettings)}
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "`vllm-msd train --help` lists all."
            raise ConfigError(f"{path}: {key!r} is not a known setting. {hint}")
        if _is_list(fields[name]) and isinstance(value, str):
            value = [value]
        # YAML reads 1e-4 as a word, since it wants a point in it.
        if fields[name].type is float and isinstance(value, str):
            try:
                value = float(value)
            except ValueError as error:
                raise ConfigError(f"{path}: {name}: got {value!r}, expected a number.") from error
        found[name] = value
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every setting to a parser, in groups; a flag that is not given leaves no attribute."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(TrainSettings):
        about = f.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": about["help"]}
        default, kind = _default(f), _kind(f)
        if default not in ("", []):
            options["help"] += f" (default: {'no' if default is False else default})"
        options["help"] = options["help"].replace("%", "%%")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(f):
            options |= {"nargs": "+", "metavar": "PATH"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
            if about["choices"]:
                options |= {"choices": about["choices"], "metavar": None}
        groups[about["group"]].add_argument(flag(f.name), **options)


def _kind(f: dataclasses.Field) -> Any:
    """The annotation; a type, since this module does not postpone annotations."""
    return f.type


def _is_list(f: dataclasses.Field) -> bool:
    return get_origin(f.type) is list


def _default(f: dataclasses.Field) -> Any:
    return [] if f.default is dataclasses.MISSING else f.default


def _check(f: dataclasses.Field, value: Any) -> None:
    if _is_list(f):
        kind = get_args(f.type)[0]
        fits = isinstance(value, list) and all(isinstance(v, kind) for v in value)
        expected = "a list of paths"
    elif f.type is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        expected = "a number"
    elif f.type is int:
        fits, expected = type(value) is int, "a whole number"
    else:
        kind = _kind(f)
        fits, expected = isinstance(value, kind), {str: "a word", bool: "true or false"}[kind]
    about = f.metadata
    if fits and about["choices"]:
        fits, expected = value in about["choices"], "one of " + ", ".join(about["choices"])
    if fits and about["least"] is not None and not value >= about["least"]:
        fits, expected = False, f"{expected} of at least {about['least']}"
    if fits and about["most"] is not None and not value <= about["most"]:
        fits, expected = False, f"{expected} of at most {about['most']}"
    if not fits:
        raise ConfigError(f"{f.name}: got {value!r}, expected {expected}.")

"""What a run of the benchmark measures."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_msd.bench.arms import DEFAULT, NONE, Arm, parse_arms
from vllm_msd.budget.usual import PAPER_TOKENS, ratio_for
from vllm_msd.errors import ConfigError
from vllm_msd.storage import check_folder

# What --quick changes, where the user says nothing else.
QUICK: dict[str, Any] = {
    "batch": (1, 4),
    "temperature": (0.0,),
    "num_prompts": 7,
    "max_tokens": 96,
}
# What --shape changes, where the user says nothing else: no text, no probabilities, much memory.
SHAPED: dict[str, Any] = {
    "arms": (NONE, "chain", "tree", "tree:60x6x10"),
    "batch": (1,),
    "temperature": (0.0,),
    "engines": "apart",
}


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a run; all but ``output`` and ``force`` decide what is measured.

    target: folder or hub name, None for the demo pair. wide: size that the demo pair is widened to,
    None to leave it. shape: random weights of this shape in the place of a target, with the
    acceptance of a draft whose tree of 60 nodes yields ``accepted`` tokens a verification.
    draft: None to let the plugin find it. data: None for the demo's
    held-out samples. image_root: folders of relative image paths. num_prompts: requests of a
    batch size, at least twice the batch. passes: how often every cell is measured. engines:
    ``together`` in one process, or ``apart``, one after another. compile: graphs and compilation
    on a CPU too. seed: of drawn answers.
    """

    output: Path
    target: str | None = None
    wide: str | None = None
    shape: str | None = None
    accepted: float = PAPER_TOKENS
    draft: str | None = None
    data: str | None = None
    image_root: tuple[str, ...] = ()
    arms: tuple[str, ...] = DEFAULT
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    temperature: tuple[float, ...] = (0.0, 1.0)
    num_prompts: int = 21
    max_tokens: int = 256
    passes: int = 2
    dtype: str = "auto"
    engines: str = "together"
    compile: bool = False
    max_model_len: int | None = None
    seed: int = 0
    force: bool = False

    @property
    def parsed_arms(self) -> list[Arm]:
        """The arms, no speculation first."""
        return parse_arms(list(self.arms))

    def num_requests(self, batch: int) -> int:
        """Requests of a cell: enough that the batch is full for most of the time."""
        return max(self.num_prompts, 2 * batch)

    @property
    def most_requests(self) -> int:
        """Those of the largest batch, which the others' are the first of."""
        return max(map(self.num_requests, self.batch))

    def check(self) -> None:
        """Raise ConfigError or StorageError for what cannot work, before anything is loaded."""
        arms = self.parsed_arms
        if len(arms) < 2:
            raise ConfigError("--arms: got no speculation alone, expected something beside it.")
        for name in ("batch", "temperature"):
            values = getattr(self, name)
            if not values or len({*values}) < len(values):
                raise ConfigError(f"--{name}: got {list(values)}, expected some, each once.")
        for temperature in self.temperature:
            if not (math.isfinite(temperature) and temperature >= 0):
                raise ConfigError(f"--temperature: got {temperature}, expected 0 or more.")
        if self.seed < 0:
            raise ConfigError(f"--seed: got {self.seed}, expected 0 or more.")
        if self.passes < 2:
            raise ConfigError(
                f"--passes: got {self.passes}, expected at least 2: one says nothing about spread."
            )
        for name, given in (("target", self.target), ("draft", self.draft)):
            if given is not None and _is_missing(given):
                raise ConfigError(
                    f"--{name}: {given} is not a folder. Give one that is there, or a hub name."
                )
        if self.target is None and self.draft is not None:
            raise ConfigError("--draft: got one without its --target. Give both, or none of them.")
        if self.target is not None and self.wide is not None:
            raise ConfigError("--wide: only the demo pair can be widened. Leave out --target.")
        if self.shape is not None:
            self._check_shape(arms)
        elif self.accepted != PAPER_TOKENS:
            raise ConfigError("--accepted: only a --shape takes its acceptance from a table.")
        if self.data is None and self.image_root:
            raise ConfigError("--image-root: got folders without --data, whose pictures they hold.")
        check_folder(self.output, "--output")

    def _check_shape(self, arms: list[Arm]) -> None:
        from vllm_msd.bench.true_shapes import NAMES

        if self.shape not in NAMES:
            raise ConfigError(f"--shape: got {self.shape!r}, expected one of {', '.join(NAMES)}.")
        if self.target is not None or self.wide is not None:
            raise ConfigError("--shape: random weights have no --target and no --wide beside them.")
        ratio_for(self.accepted)
        for arm in arms:
            if arm.method in ("ngram", "auto"):
                raise ConfigError(
                    f"--arms: got {arm.name} with --shape, expected none, chains and trees: random "
                    "weights say nothing that an n-gram or a budget could go by."
                )
        if self.engines != "apart":
            raise ConfigError(
                "--engines: got together with --shape, expected apart: a model of the true shape "
                "is in memory once."
            )

    def about(self) -> dict[str, Any]:
        """What runs must share for one to go on with the other's cells, in JSON's types."""
        table = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("output", "force")
        }
        return {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}


def _is_missing(name: str) -> bool:
    """Whether this is a folder that is not there, and no hub name, which has one slash at most."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return looks_like_path and not Path(name).expanduser().is_dir()

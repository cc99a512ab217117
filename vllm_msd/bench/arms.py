"""The arms of a comparison: ways of drafting, each an engine's speculative config."""

import re
from dataclasses import dataclass
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.tree.config import TreeConfig

NONE = "none"
DEFAULT = (NONE, "ngram", "chain", "tree", "auto")
_SIZES = {"ngram": (5,), "chain": (5,), "tree": (16, 6, 3)}
_FORMS = "none, ngram[:TOKENS], chain[:TOKENS], tree[:NODESxDEPTHxTOP_K], auto"
# vLLM's ngram looks for what was said before among the last so many tokens.
_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Arm:
    """One way of drafting.

    name: as it was asked for, and as it is called everywhere. method: ``none``, ``ngram``,
    ``chain``, ``tree`` or ``auto``. sizes: drafted tokens; of a tree its nodes, depth and top-k.
    """

    name: str
    method: str
    sizes: tuple[int, ...] = ()

    @property
    def is_msd(self) -> bool:
        """Whether it needs an MSD draft."""
        return self.method in ("chain", "tree", "auto")

    @property
    def depth(self) -> int | None:
        """Levels that a draft model runs for each verification; None where the plugin decides."""
        return {"chain": self.sizes[:1], "tree": self.sizes[1:2], "auto": (None,)}.get(
            self.method, (0,)
        )[0]

    @property
    def width(self) -> int:
        """Rows of a level of the draft."""
        return self.sizes[2] if self.method == "tree" else 1

    def __str__(self) -> str:
        if self.method == "tree":
            return "MSD, tree of {} nodes, depth {}, top-k {}".format(*self.sizes)
        if self.method == "chain":
            return f"MSD, chain of {self.sizes[0]}"
        if self.method == "ngram":
            return f"vLLM's ngram, {self.sizes[0]} tokens"
        return {NONE: "no speculation", "auto": "MSD, sizes that follow the load"}[self.method]

    def speculative_config(self, draft: str | None) -> dict[str, Any] | None:
        """vLLM's ``speculative_config``; without ``draft`` the plugin finds it by the target."""
        if self.method == NONE:
            return None
        if self.method == "ngram":
            return {"method": "ngram", "num_speculative_tokens": self.sizes[0], **_LOOKUP}
        config: dict[str, Any] = {"method": "msd"}
        if draft is not None:
            config["model"] = draft
        if self.method == "chain":
            config |= {"num_speculative_tokens": self.sizes[0], "tree_top_k": 1}
        if self.method == "tree":
            names = ("num_speculative_tokens", "tree_depth", "tree_top_k")
            config |= dict(zip(names, self.sizes, strict=True))
        return config


def parse_arms(names: list[str]) -> list[Arm]:
    """The arms of these names, no speculation first, which all others are compared with.

    Raises:
        ConfigError: an unknown name, sizes that are none, or the same arm twice.
    """
    arms = [_parse(name) for name in names]
    if len({(arm.method, arm.sizes) for arm in arms}) < len(arms):  # `chain` is `chain:5`
        raise ConfigError(f"--arms: got {' '.join(names)}, expected each of them once.")
    return [Arm(NONE, NONE), *(arm for arm in arms if arm.method != NONE)]


def _parse(name: str) -> Arm:
    method, colon, text = name.partition(":")
    usual = _SIZES.get(method, ())
    # Not whatever int() takes: it reads " 3" and "1_0", too.
    is_sizes = re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", text)
    sizes = tuple(map(int, text.split("x"))) if is_sizes else None if colon else usual
    is_known = method in (NONE, "auto", *_SIZES)
    if not is_known or sizes is None or len(sizes) != len(usual) or min(sizes, default=1) < 1:
        raise ConfigError(f"--arms: got {name!r}, expected some of {_FORMS}.")
    if method == "tree":
        TreeConfig.from_settings(*sizes)
    return Arm(name, method, sizes)

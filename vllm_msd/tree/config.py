"""The size of a tree as users give it."""

from dataclasses import dataclass

from vllm_msd.errors import ConfigError
from vllm_msd.kernels import MAX_NODES
from vllm_msd.tree.grow import TreeShape


@dataclass(frozen=True)
class TreeConfig:
    """``num_nodes`` drafted tokens, at most ``depth`` deep, ``top_k`` wide; ``top_k`` 1 is a chain.

    Drafting feeds ``depth - 1`` levels of ``top_k`` rows to the draft, `draft_rows` in all: at most
    `MAX_NODES`, the bits of a row's mask.

    Raises:
        ConfigError: no tree has this size; the message says which setting to change, and how.
    """

    num_nodes: int
    depth: int
    top_k: int

    def __post_init__(self) -> None:
        n, d, k = self.num_nodes, self.depth, self.top_k
        for name, value in (("tree_depth", d), ("tree_top_k", k)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number from 1 on.")
        if self.is_chain:
            if d != n:
                raise ConfigError(
                    f"tree_depth: got {d} with tree_top_k 1 and num_speculative_tokens {n}. A "
                    "chain is as deep as it has tokens: leave tree_depth out."
                )
            return
        if n >= MAX_NODES:
            raise ConfigError(
                f"num_speculative_tokens: got {n}, expected at most {MAX_NODES - 1} with a tree "
                f"(tree_top_k {k})."
            )
        if d > n:
            raise ConfigError(
                f"tree_depth: got {d}, expected at most num_speculative_tokens ({n})."
            )
        if self.draft_rows > MAX_NODES:
            raise ConfigError(
                f"tree_depth {d} and tree_top_k {k} draft {self.draft_rows} rows before the last "
                f"level, expected at most {MAX_NODES}. Take a tree_depth of at most "
                f"{MAX_NODES // k + 1} or a tree_top_k of at most {MAX_NODES // (d - 1)}."
            )
        if n > k + (d - 1) * k * k:
            raise ConfigError(
                f"num_speculative_tokens: got {n}, but tree_depth {d} and tree_top_k {k} propose "
                f"only {k + (d - 1) * k * k} nodes. Make the tree deeper or wider, or take fewer."
            )

    @property
    def in_words(self) -> str:
        """As a message says it."""
        if self.is_chain:
            return f"chains of up to {self.num_nodes}"
        return f"trees of up to {self.num_nodes} nodes (depth {self.depth}, top-k {self.top_k})"

    @classmethod
    def from_settings(
        cls, num_speculative_tokens: int, tree_depth: int | None, tree_top_k: int | None
    ) -> "TreeConfig":
        """Fill in what is absent: no depth or a width of 1 means a chain.

        Raises:
            ConfigError: a width above 1 without a depth, or no tree has this size.
        """
        if tree_depth is None:
            if tree_top_k not in (None, 1):
                raise ConfigError(
                    f"tree_top_k: got {tree_top_k!r} without tree_depth. Set tree_depth too, or "
                    "leave tree_top_k out for a chain."
                )
            return cls(num_speculative_tokens, num_speculative_tokens, 1)
        if tree_top_k is None:
            raise ConfigError(
                f"tree_depth: got {tree_depth!r} without tree_top_k. Set tree_top_k too, or leave "
                "tree_depth out for a chain."
            )
        return cls(num_speculative_tokens, tree_depth, tree_top_k)

    @property
    def is_chain(self) -> bool:
        """Whether every node has one child at most."""
        return self.top_k == 1

    @property
    def draft_rows(self) -> int:
        """Rows that a request's levels feed to the draft, a KV slot each."""
        return (self.depth - 1) * self.top_k

    @property
    def shape(self) -> TreeShape:
        """What `grow_tree` takes."""
        return TreeShape(self.num_nodes + 1, self.depth - 1, self.top_k)

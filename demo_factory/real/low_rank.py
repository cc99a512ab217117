"""Small changes of large weights: what tuning learns of the language model, and ships."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of every decoder layer.
TUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A frozen layer, and ``scale * up @ down`` beside its weight (LoRA, arXiv 2106.09685, eq. 3).

    ``up`` starts at zero: nothing is changed yet.

    Args:
        frozen: ``[rows, columns]``, without a bias.
        rank: of the change.
        scale: its factor, alpha / r there.
    """

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        columns, rows = frozen.in_features, frozen.out_features
        self.down = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.scale = scale
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """``[..., columns]`` to ``[..., rows]``, changed unless `enabled` is off."""
        out = self.frozen(x)
        if not self.enabled:
            return out
        return out + self.scale * F.linear(F.linear(x, self.down), self.up)


def tune(language: nn.Module, rank: int, scale: float) -> dict[str, LowRank]:
    """Freeze a language model but for a `LowRank` on each matrix of its layers; gives those."""
    language.requires_grad_(False)
    found = {}
    for name, module in list(language.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(TUNED):
            found[name] = LowRank(module, rank, scale)
            parent, _, last = name.rpartition(".")
            setattr(language.get_submodule(parent), last, found[name])
    return found


class Unchanged:
    """Context in which the language model is as it was."""

    def __init__(self, changes: dict[str, LowRank]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        for change in self.changes.values():
            change.enabled = False

    def __exit__(self, *args: object) -> None:
        for change in self.changes.values():
            change.enabled = True

"""The scales that a draft is trained in.

Targets differ a thousandfold in the size of their embeddings, visual rows and hidden states, and
the draft reads all of them raw. AdamW moves every weight by about the learning rate, whatever its
input's size: too far behind large inputs, hardly at all behind small ones. So the draft is trained
in units of the target's own sizes, in which text rows, hidden states and outputs are about 1, and
is written out with the units folded into its weights. Units are powers of two, which folding
multiplies and divides by without rounding.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_msd.draft import DraftRows, MSDDraftConfig


def root_mean_square(rows: Tensor) -> float:
    """Median over the rows ``[N, H]`` of their root mean square; 0 where there are none.

    A median: language models have a few rows, the first one among them, with massive activations.
    """
    if not len(rows):
        return 0.0
    return float(rows.detach().float().square().mean(-1).sqrt().median())


@dataclass(frozen=True)
class Units:
    """What counts as 1 in training; powers of two.

    embeds: in the embeddings of text tokens. hidden: in hidden states, the draft's outputs, and
    visual rows, which enter the draft beside them.
    """

    embeds: float = 1.0
    hidden: float = 1.0

    @classmethod
    def measured(cls, embeds: Tensor, hidden: Tensor) -> "Units":
        """Those of a target, by rows ``[N, H]`` of its text embeddings and hidden states."""
        return cls(*(_power_of_two(root_mean_square(rows)) for rows in (embeds, hidden)))

    def scaled(self, rows: DraftRows) -> DraftRows:
        """A draft's inputs in these units."""
        size = torch.where(rows.visual_mask, self.hidden, self.embeds)
        return rows._replace(
            token_embeds=rows.token_embeds / size[..., None],
            hidden_states=rows.hidden_states / self.hidden,
        )

    def config(self, config: MSDDraftConfig) -> MSDDraftConfig:
        """The config of a draft in these units: what its norms add to a mean square shrinks too."""
        return replace(config, rms_norm_eps=config.rms_norm_eps / self.hidden**2)

    def fold(self, state: dict[str, Tensor], config: MSDDraftConfig) -> dict[str, Tensor]:
        """Weights in these units to those of the same draft in the target's own sizes."""
        return self._scale(state, config, 1)

    def unfold(self, state: dict[str, Tensor], config: MSDDraftConfig) -> dict[str, Tensor]:
        """The inverse of `fold`."""
        return self._scale(state, config, -1)

    def _scale(
        self, state: dict[str, Tensor], config: MSDDraftConfig, exponent: int
    ) -> dict[str, Tensor]:
        found = dict(state)
        for name, weight in state.items():
            factor = self._factor(name, weight, config)
            if factor is not None:
                found[name] = weight * factor**exponent
        return found

    def _factor(self, name: str, weight: Tensor, config: MSDDraftConfig) -> Tensor | float | None:
        if name == "fc.weight":
            of_input = torch.ones(weight.shape[1], device=weight.device)
            of_input[: config.hidden_size] = self.hidden / self.embeds
            return of_input
        if name == "fc.bias" or name.endswith(("o_proj.weight", "down_proj.weight")):
            return self.hidden
        reads_raw = name.startswith("layers.0.self_attn.") and not config.input_norm
        if reads_raw and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            return 1 / self.hidden
        return None  # behind a norm, a norm, or no weight at all


def _power_of_two(size: float) -> float:
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0

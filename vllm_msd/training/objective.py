"""One micro-batch's part of a step's loss, as sums that add up over micro-batches and processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_msd.draft import DraftRows, MSDDraft
from vllm_msd.training.losses import row_distances, token_losses
from vllm_msd.training.unroll import unroll


@dataclass(frozen=True)
class LossWeights:
    """Which loss, and weights of its parts and of the drafting steps after the first.

    loss: one of `settings.LOSSES`. regression, distillation: of the two parts of ``msd``; the
    others have tokens alone.
    """

    loss: str = "msd"
    regression: float = 1.0
    distillation: float = 0.1
    step_decay: float = 0.8


class DraftObjective(nn.Module):
    """The draft with its loss, in one forward pass, so that data parallelism wraps both.

    Args:
        draft: to be trained.
        steps: how deep each row is drafted; the draft reads its own outputs after the first.
        weights: of the parts.
        checkpointing: compute the draft again on the way back.
    """

    def __init__(
        self,
        draft: MSDDraft,
        steps: int = 1,
        weights: LossWeights = LossWeights(),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.steps = steps
        self.weights = weights
        self.checkpointing = checkpointing

    def forward(
        self,
        rows: DraftRows,
        hidden: Tensor,
        mask: Tensor,
        head: Tensor,
        segments: Tensor | None = None,
        kl_weights: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor]:
        """Sums over the rows that count.

        Args:
            rows: the draft's inputs, right-padded.
            hidden: ``[B, S, H]`` the target's hidden states; row j should give number j + 1.
            mask: ``[B, S]`` bool, rows that count. Never the last one.
            head: ``[V, H]`` the target's head.
            segments: of packed rows (see `packing`).
            kl_weights: of ``lk``, by drafting step (see `losses.lk_weights`).

        Returns:
            The weighted loss's sum, and float32 ``[4, K]`` without gradient: by drafting step the
            sums of smooth L1, cross-entropy, and probability of acceptance, and the rows that
            agree (see `window.FIGURES`).
        """
        wanted = hidden[:, 1:][mask[:, :-1]]
        counted = mask.any(0).nonzero()
        first = int(counted[0]) if len(counted) else 0
        outputs = unroll(self.draft, rows, self.steps, self.checkpointing, first, segments)
        predicted = torch.stack([out[mask] for out in outputs])
        weights = self.weights
        regression = row_distances(predicted, wanted).sum(1)
        ids = self.draft.token_ids
        tokens = token_losses(predicted, wanted, head, weights.loss, ids, kl_weights=kl_weights)
        loss = tokens.loss.sum(1)
        if weights.loss == "msd":
            loss = weights.regression * regression + weights.distillation * loss
        by_step = weights.step_decay ** torch.arange(self.steps, device=predicted.device)
        parts = (tokens.cross_entropy, tokens.acceptance, tokens.agrees.float())
        figures = torch.stack([regression, *(part.sum(1) for part in parts)]).detach()
        return (by_step * loss).sum(), figures

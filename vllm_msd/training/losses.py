"""The two losses of a draft: regression on hidden states, distillation on tokens.

arXiv 2505.14260, after EAGLE: smooth L1 (beta 1) between the draft's output and the target's next
hidden state, and cross-entropy between the two next-token distributions, both averaged over the
rows that count.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Keeps a batch without a single answer row from dividing by zero, as the published code does.
EPSILON = 1e-5


class DraftLoss(NamedTuple):
    """Scalars; `total` is the weighted sum, to be minimised."""

    total: Tensor
    regression: Tensor
    distillation: Tensor


def draft_loss(
    predicted: Tensor,
    target: Tensor,
    predicted_logits: Tensor,
    target_logits: Tensor,
    mask: Tensor,
    regression_weight: float = 1.0,
    distillation_weight: float = 0.1,
) -> DraftLoss:
    """The draft's loss over a batch, in float32.

    Args:
        predicted: ``[..., H]`` the draft's outputs.
        target: ``[..., H]`` the target's hidden states one position on.
        predicted_logits, target_logits: ``[..., V]`` the target's head applied to both.
        mask: ``[...]`` 1 for rows that count, 0 for others. Sums run over the whole batch.
    """
    mask = mask.float()
    count = mask.sum() + EPSILON
    distance = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)
    regression = (distance * mask).sum() / count
    wanted = target_logits.float().softmax(-1)
    surprise = -(wanted * predicted_logits.float().log_softmax(-1)).sum(-1)
    distillation = (surprise * mask).sum() / count
    total = regression_weight * regression + distillation_weight * distillation
    return DraftLoss(total, regression, distillation)

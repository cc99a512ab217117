"""The two losses of a draft: regression on hidden states, distillation on tokens.

arXiv 2505.14260, after EAGLE: smooth L1 (beta 1) between the draft's output and the target's next
hidden state, and cross-entropy between the two next-token distributions, both averaged over the
rows that count. `draft_loss` reads like the definition and is what the rest is checked against;
training uses `row_distances` and `token_losses`, which never hold the logits of a whole batch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps a batch without a single answer row from dividing by zero, as the published code does.
EPSILON = 1e-5
# Logits held at once: 64 MiB in float32, three times over.
CHUNK_LOGITS = 1 << 24


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


class _SoftCrossEntropy(torch.autograd.Function):
    """``-sum_v softmax(head(target)) * log_softmax(head(predicted))`` of each row, by chunks.

    The head is frozen, so a chunk's gradient follows at once: ``(softmax - wanted) @ head``. No
    logits outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, target: Tensor, head: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        steps, rows, _ = predicted.shape
        surprise = predicted.new_empty(steps, rows, dtype=torch.float32)
        agrees = torch.empty(steps, rows, dtype=torch.bool, device=predicted.device)
        gradient = torch.empty_like(predicted) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            wanted = F.linear(target[part].to(head.dtype), head).float()
            choice = wanted.argmax(-1)
            wanted = wanted.softmax(-1)
            for step in range(steps):
                logits = F.linear(predicted[step, part].to(head.dtype), head).float()
                agrees[step, part] = logits.argmax(-1) == choice
                logits = logits.log_softmax(-1)
                surprise[step, part] = -torch.linalg.vecdot(wanted, logits)
                if gradient is not None:
                    difference = logits.exp_().sub_(wanted).to(head.dtype)
                    gradient[step, part] = (difference @ head).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agrees)
        return surprise, agrees

    @staticmethod
    def backward(ctx: Any, surprise_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * surprise_gradient[..., None].to(gradient.dtype), None, None, None


def token_losses(
    predicted: Tensor, target: Tensor, head: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy on tokens without ever holding the logits of more than a chunk.

    Args:
        predicted: ``[K, N, H]`` the draft's outputs for the N rows that count, by drafting step.
        target: ``[N, H]`` the hidden states they should be.
        head: ``[V, H]`` the target's frozen head; its dtype is that of the logits' matrix product.
        chunk: rows at a time; 0 keeps a chunk's logits at `CHUNK_LOGITS` numbers.

    Returns:
        The loss of each row, float32 ``[K, N]``, and whether both choose the same token, bool.
    """
    chunk = chunk or max(1, CHUNK_LOGITS // head.shape[0])
    with torch.autocast(predicted.device.type, enabled=False):
        return _SoftCrossEntropy.apply(predicted, target.detach(), head.detach(), chunk)


def row_distances(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 of each row, ``[K, N, H]`` and ``[N, H]`` to float32 ``[K, N]``."""
    target = target.float().expand_as(predicted)
    return F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(-1)

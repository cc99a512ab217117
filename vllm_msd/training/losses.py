"""The losses of a draft: on hidden states, and on tokens.

``msd`` is arXiv 2505.14260's, after EAGLE: smooth L1 (beta 1) between the draft's output and the
target's next hidden state, and cross-entropy between the two next-token distributions, both
averaged over the rows that count. `draft_loss` reads like the definition and is what the rest is
checked against; training uses `row_distances` and `token_losses`, which never hold the logits of a
whole batch. ``kl`` and ``lk`` look at tokens alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_msd.training.settings import LOSSES

# Keeps a batch without a single answer row from dividing by zero, as the published code does.
EPSILON = 1e-5
# Logits held at once: 64 MiB in float32, some five times over.
CHUNK_LOGITS = 1 << 24
# How fast `lk` turns from KL to the acceptance probability: the best of arXiv 2602.23881.
LK_ETA = 3.0


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


class TokenLosses(NamedTuple):
    """By drafting step and row, float32 ``[K, N]``, but for `agrees`, bool ``[K, N]``.

    loss: what is minimised, the only one with a gradient. cross_entropy: ``-sum p log q``, in nats.
    acceptance: ``sum min(p, q)``, the probability that a token drawn from the draft is accepted.
    agrees: both choose the same token.
    """

    loss: Tensor
    cross_entropy: Tensor
    acceptance: Tensor
    agrees: Tensor


class _TokenLosses(torch.autograd.Function):
    """`token_losses` by chunks of rows.

    The head is frozen, so a chunk's gradient follows at once: that of the logits, times the head.
    No logits outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        target: Tensor,
        head: Tensor,
        ids: Tensor | None,
        name: str,
        chunk: int,
        kl_weights: list[float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps, rows, _ = predicted.shape
        found = predicted.new_empty(3, steps, rows, dtype=torch.float32)
        agrees = torch.empty(steps, rows, dtype=torch.bool, device=predicted.device)
        gradient = torch.empty_like(predicted) if ctx.needs_input_grad[0] else None
        own = head if ids is None else head.index_select(0, ids)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            wanted = F.linear(target[part].to(head.dtype), head).float()
            choice = wanted.argmax(-1)
            wanted = wanted.softmax(-1)
            if ids is not None:
                wanted = wanted.index_select(-1, ids)
            for step in range(steps):
                logits = F.linear(predicted[step, part].to(head.dtype), own).float()
                chosen = logits.argmax(-1)
                agrees[step, part] = (chosen if ids is None else ids[chosen]) == choice
                losses, slope = _of_logits(logits.log_softmax(-1), wanted, name, kl_weights[step])
                found[:, step, part] = torch.stack(losses)
                if gradient is not None:
                    gradient[step, part] = (slope.to(own.dtype) @ own).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        loss, surprise, acceptance = found
        ctx.mark_non_differentiable(surprise, acceptance, agrees)
        return loss, surprise, acceptance, agrees

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        of_rows = gradient * loss_gradient[..., None].to(gradient.dtype)
        return of_rows, None, None, None, None, None, None


def _of_logits(
    log_q: Tensor, p: Tensor, name: str, kl_weight: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Loss, cross-entropy and acceptance of rows, and the loss's gradient by the draft's logits.

    log_q: ``[N, D]`` the draft's log-probabilities, overwritten. p: ``[N, D]`` the target's
    probabilities of the same tokens.
    """
    mass = p.sum(-1, keepdim=True)  # 1 without a draft vocabulary
    surprise = -torch.linalg.vecdot(p, log_q)
    q = log_q.exp_()
    is_low = q < p
    acceptance = torch.where(is_low, q, p).sum(-1)
    loss = surprise
    if name != "msd":
        loss = surprise + torch.special.xlogy(p, p).sum(-1)
    slope = mass * q - p
    if name == "lk":
        loss = kl_weight * loss + (1 - kl_weight) * (1 - acceptance)
        raised = torch.where(is_low, q, 0.0)
        of_acceptance = raised - q * raised.sum(-1, keepdim=True)
        slope = kl_weight * slope - (1 - kl_weight) * of_acceptance
    return (loss, surprise, acceptance), slope


def lk_weights(acceptance: Sequence[float], steps: int) -> list[float]:
    """The weight of KL in ``lk`` by drafting step, ``exp(-3 a)`` (arXiv 2602.23881, section 4.2).

    Args:
        acceptance: the mean probability of acceptance at each drafting step; none is known before
            the first step, where all weight is on KL.
        steps: how many drafting steps.
    """
    known = [*acceptance, *[0.0] * (steps - len(acceptance))]
    return [math.exp(-LK_ETA * a) for a in known]


def token_losses(
    predicted: Tensor,
    target: Tensor,
    head: Tensor,
    loss: str = "msd",
    ids: Tensor | None = None,
    chunk: int = 0,
    kl_weights: Sequence[float] = (),
) -> TokenLosses:
    """Losses on next tokens, without ever holding the logits of more than a chunk of rows.

    With p the target's distribution and q the draft's, a row's loss is

    - ``msd``: ``-sum p log q``, soft cross-entropy (arXiv 2505.14260);
    - ``kl``: ``sum p log(p / q)``, which has the same gradient and ends at 0;
    - ``lk``: ``w KL + (1 - w) (1 - a)`` with ``a = sum min(p, q)`` the acceptance probability: the
      hybrid of arXiv 2602.23881, section 4.2. KL leads while little is accepted and `a` has hardly
      a gradient; later `a` itself is raised. `w` is one number for all rows of a drafting step
      (see `lk_weights`).

    Args:
        predicted: ``[K, N, H]`` the draft's outputs for the N rows that count, by drafting step.
        target: ``[N, H]`` the hidden states they should be.
        head: ``[V, H]`` the target's frozen head; its dtype is that of the logits' matrix product.
        loss: one of `LOSSES`.
        ids: ``[D]`` int64, distinct: the draft's vocabulary, as ids of the target. q has these
            tokens alone; p keeps its probabilities on them and loses the rest, so that a row counts
            as far as the target's token can be drafted at all. None: all V.
        chunk: rows at a time; 0 keeps a chunk's logits at `CHUNK_LOGITS` numbers.
        kl_weights: `w` by drafting step, K of them, for ``lk`` only.

    Raises:
        ValueError: an unknown loss, or another number of weights.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, expected one of {', '.join(LOSSES)}")
    steps = predicted.shape[0]
    if loss == "lk" and len(kl_weights) != steps:
        raise ValueError(f"kl_weights: got {len(kl_weights)}, expected {steps}, one a step")
    weights = list(kl_weights) or [1.0] * steps
    chunk = chunk or max(1, CHUNK_LOGITS // head.shape[0])
    with torch.autocast(predicted.device.type, enabled=False):
        found = _TokenLosses.apply(
            predicted, target.detach(), head.detach(), ids, loss, chunk, weights
        )
    return TokenLosses(*found)


def row_distances(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 of each row, ``[K, N, H]`` and ``[N, H]`` to float32 ``[K, N]``."""
    target = target.float().expand_as(predicted)
    return F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(-1)

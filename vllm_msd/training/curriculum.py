"""The two-stage curriculum and the feature noise of MSD's training."""

from torch import Tensor

# The noise is meant for sequences of this many rows; shorter ones get more.
NOISE_LENGTH = 512


def visual_ratio(epoch: int, total: int) -> float:
    """Probability of drawing a training sample from the visual set, arXiv 2505.14260.

    The first half of the epochs is text only; then the probability rises evenly to 1.

    Args:
        epoch: from 1; epochs past `total` are wholly visual.
        total: epochs of the whole curriculum.

    Raises:
        ValueError: an epoch or a total below 1.
    """
    if epoch < 1 or total < 1:
        raise ValueError(f"got epoch {epoch} of {total}, expected both to be at least 1")
    text_only = max(1, total // 2)
    if epoch <= text_only:
        return 0.0
    return min(1.0, (epoch - total // 2) / (total / 2))


def add_noise(hidden_states: Tensor, uniform: Tensor, std: float) -> Tensor:
    """Even noise in +-std/2, scaled by 512 / S, added to hidden states ``[B, S, H]``.

    At inference the draft reads its own inexact outputs; noise makes it expect that. ``uniform``
    holds the draws, in [0, 1).
    """
    return hidden_states + (uniform - 0.5) * (std * NOISE_LENGTH / hidden_states.shape[1])

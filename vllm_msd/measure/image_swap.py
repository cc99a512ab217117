"""Does the draft look at the image? Give it another request's, and count what is still accepted.

The target is left alone, so the answers stay what they were: only the draft's guesses get worse.
Noise of the same scale in the image's place is the control. It tells whether the visual rows reach
the draft's guesses at all, where a swap tells whether the draft reads what is in the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_msd.errors import MSDError
from vllm_msd.measure.compare import by_kind
from vllm_msd.measure.engine import Answer, Engine
from vllm_msd.measure.inputs import Sample


@dataclass
class Swap:
    """One request: with its own image in the draft, with another's, and with noise."""

    sample: Sample
    msd: Answer
    swapped: Answer | None = None
    noise: Answer | None = None

    @property
    def identical(self) -> bool:
        """Whether the answer stayed the same, as it must."""
        others = [answer for answer in (self.swapped, self.noise) if answer is not None]
        return all(self.msd.token_ids == other.token_ids for other in others)


class DraftImages:
    """Sits between vLLM's runner and the draft: keeps the image embeddings, or replaces them.

    ``seen`` is what the last request's draft was given, ``[rows, H]`` per image.
    """

    def __init__(self, engine: Engine) -> None:
        runner = engine.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator  # Runner V1, or V2
        self._embed: Callable[..., Tensor] = drafter.model.embed_input_ids
        self.seen: list[Tensor] = []
        self.replacement: list[Tensor] | None = None
        drafter.model.embed_input_ids = self._embed_other

    def _embed_other(self, input_ids: Tensor, multimodal_embeddings=None, **kwargs: Any) -> Tensor:
        if multimodal_embeddings:
            self.seen = [rows.clone() for rows in multimodal_embeddings]
            if self.replacement is not None:
                shapes = [[r.shape for r in rows] for rows in (self.seen, self.replacement)]
                if shapes[0] != shapes[1]:
                    raise MSDError(
                        f"image swap: got embeddings {shapes[1]}, expected {shapes[0]}. Images "
                        "must be of one size, and a prompt must fit into one chunk."
                    )
                multimodal_embeddings = self.replacement
        return self._embed(input_ids, multimodal_embeddings, **kwargs)


def swap_images(
    engine: Engine,
    samples: Sequence[Sample],
    *,
    max_tokens: int = 192,
    on_answer: Callable[[Swap], None] = lambda swap: None,
) -> list[Swap]:
    """Answer each sample three times; its draft sees its image, the next sample's, and noise.

    "Next" is within the kind of work, so that the swapped image is of the same style. ``samples``
    must hold one image each, and at least two of every kind.
    """
    generator = torch.Generator().manual_seed(0)
    images = DraftImages(engine)
    swaps: list[Swap] = []
    seen: dict[int, list[Tensor]] = {}
    for sample in samples:
        images.replacement = None
        swaps.append(Swap(sample, engine.answer(sample, max_tokens)))
        seen[id(sample)] = images.seen
        on_answer(swaps[-1])
    for kind, group in by_kind(swaps).items():
        if len(group) < 2:
            raise MSDError(f"image swap: got one request of kind {kind!r}, expected at least two.")
        for swap, other in zip(group, group[1:] + group[:1], strict=True):
            images.replacement = seen[id(other.sample)]
            swap.swapped = engine.answer(swap.sample, max_tokens)
            images.replacement = [_noise_like(rows, generator) for rows in seen[id(swap.sample)]]
            swap.noise = engine.answer(swap.sample, max_tokens)
            on_answer(swap)
    return swaps


def _noise_like(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``[n, H]`` of the same mean and spread in every column, with nothing in them."""
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return rows.mean(0) + rows.std(0) * noise

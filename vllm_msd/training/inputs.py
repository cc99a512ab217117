"""From a micro-batch's records to the draft's inputs: features, units, noise, rows that count."""

import torch
from torch import Tensor

from vllm_msd.draft import DraftRows
from vllm_msd.training import rows
from vllm_msd.training.data.batches import Example, collate
from vllm_msd.training.data.plan import seeded
from vllm_msd.training.feature_cache import FeatureCache, stack, unstack
from vllm_msd.training.packing import pack
from vllm_msd.training.settings import TrainSettings
from vllm_msd.training.targets import Features, Target
from vllm_msd.training.units import Units

_NOISE = 102  # a stream of random numbers beside those of the data

Cached = list[dict[str, Tensor] | None]


class DraftInputs:
    """Makes the draft's inputs, of cached records without the target.

    Args:
        settings, target, cache, units: of the run.
        device: where they are wanted.
    """

    def __init__(
        self,
        settings: TrainSettings,
        target: Target,
        cache: FeatureCache | None,
        units: Units,
        device: torch.device,
    ) -> None:
        self.settings, self.target, self.cache = settings, target, cache
        self.units, self.device = units, device

    def cached(self, examples: list[Example]) -> Cached:
        """What the cache holds of records; None where it has none."""
        if self.cache is None:
            return [None] * len(examples)
        return [self.cache.get(e.key) if e.key in self.cache else None for e in examples]

    def num_rows(self, examples: list[Example], known: Cached) -> int:
        """Rows that count in a micro-batch."""
        total = 0
        for example, record in zip(examples, known, strict=True):
            answer = record["answer_mask"] if record else example.content.answer_mask
            length = torch.tensor([len(answer)])
            total += int(self._counted(answer[None], length).sum())
        return total

    def features(self, examples: list[Example], known: Cached) -> Features:
        """Of a micro-batch: from the cache where it has them, else from the target."""
        missing = [e for e, record in zip(examples, known, strict=True) if record is None]
        if not missing:
            return stack([r for r in known if r is not None], self.target.pad_id, self.device)
        batch = collate([e.content for e in missing], self.target.pad_id).to(self.device)
        found = self.target.features(batch)
        if self.cache is None:
            return found
        new = dict(zip([e.key for e in missing], unstack(found), strict=True))
        for key, record in new.items():
            self.cache.put(key, record)
        records = [record or new[e.key] for e, record in zip(examples, known, strict=True)]
        return stack(records, self.target.pad_id, self.device)

    def of_draft(
        self, features: Features, examples: list[Example], step: int
    ) -> tuple[DraftRows, Tensor, Tensor, Tensor | None]:
        """The draft's rows, the target's hidden states ``[B, S, H]``, the rows that count, and
        the segments of packed rows (see `packing`)."""
        s = self.settings
        inputs = self.units.scaled(rows.draft_rows(features, self.target.embed, s.visual_rows))
        if s.noise:
            generators = [
                torch.Generator(self.device).manual_seed(
                    int(seeded(s.seed, _NOISE, step, e.slot).integers(2**62))
                )
                for e in examples
            ]
            inputs = rows.with_noise(inputs, features.lengths, s.noise, generators)
        mask = self._counted(features.answer_mask, features.lengths)
        hidden = features.hidden.float() / self.units.hidden
        if s.packing:
            return pack(inputs, hidden, mask, features.lengths.tolist())
        return inputs, hidden, mask, None

    def _counted(self, answer_mask: Tensor, lengths: Tensor) -> Tensor:
        if self.settings.reference_mask:
            return rows.reference_rows(answer_mask, lengths)
        return rows.drafted_rows(answer_mask)

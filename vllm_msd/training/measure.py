"""What is measured on a target's first records before training starts."""

from itertools import chain, zip_longest

import torch

from vllm_msd.errors import DataError
from vllm_msd.training import rows
from vllm_msd.training.data.batches import Corpus, collate
from vllm_msd.training.data.records import BadRecordError
from vllm_msd.training.data.render import Rendered, Renderer
from vllm_msd.training.settings import TrainSettings
from vllm_msd.training.start import Sample
from vllm_msd.training.targets import Target
from vllm_msd.training.units import Units

# Records of each kind, a few at a time; rows that count, in parts of the hidden size.
RECORDS, BATCH, MOST_ROWS = 32, 4, 4


@torch.no_grad()
def measure(
    target: Target,
    renderer: Renderer,
    corpus: Corpus,
    settings: TrainSettings,
    units: Units | None = None,
) -> tuple[Units, Sample]:
    """Run the target over a few training records of both kinds.

    Args:
        target, renderer, corpus, settings: of the run.
        units: if known; else they follow from the first batch.

    Returns:
        The units to train in, and a sample in them.

    Raises:
        DataError: the records have too few rows to start from.
    """
    talks = _talks(renderer, corpus)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    first, count, most = None, 0, MOST_ROWS * target.head.shape[1]
    for start in range(0, len(talks), BATCH):
        batch = collate(talks[start : start + BATCH], target.pad_id).to(target.device)
        features = target.features(batch)
        inputs = rows.draft_rows(features, target.embed, settings.visual_rows)
        hidden = features.hidden.float()
        if units is None:
            text = inputs.attention_mask & ~features.visual
            units = Units.measured(inputs.token_embeds[text & ~inputs.visual_mask], hidden[text])
        inputs = units.scaled(inputs)
        first = inputs if first is None else first
        mask = rows.drafted_rows(features.answer_mask)
        pair = torch.cat([inputs.token_embeds, inputs.hidden_states], -1)
        found.append((pair[mask], hidden[:, 1:][mask[:, :-1]] / units.hidden))
        count += int(mask.sum())
        if count >= most:
            break
    if units is None or first is None or count < 8:
        raise DataError(
            f"the first records have {count} reply tokens to learn from, expected at least 8. "
            "Check that the data holds replies, and --max-length."
        )
    pairs, wanted = (torch.cat(parts)[:most] for parts in zip(*found, strict=True))
    return units, Sample(first, pairs, wanted)


def _talks(renderer: Renderer, corpus: Corpus) -> list[Rendered]:
    """Rendered training records, text and multimodal in turn; broken ones are passed over.

    The run itself finds and lists those.
    """
    kinds = [
        [(kind, number) for number in range(min(size, RECORDS))]
        for kind, size in enumerate(corpus.num_training)
    ]
    talks = []
    for place in filter(None, chain.from_iterable(zip_longest(*kinds))):
        file, number = corpus.training(*place)
        try:
            talks.append(renderer.render(file[number]))
        except BadRecordError:
            continue
    return talks

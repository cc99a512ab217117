"""Draws visual rows towards the embeddings of the words that they show."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from ..data import Labels
from ..slots import FIGURES, NEVER_EMPTY, PAINTS, part_of, window_of
from ..world.charts import INKS, TOPICS, VALUES
from ..world.scene import COLOURS, SHAPES, SIZES
from ..world.signs import NUMBERS, PLATES, WORDS

# What an answer calls each class of a part, without the class for an empty slot.
NAMES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "plate": tuple(PLATES),
    "text": (*WORDS, *NUMBERS),
    "value": VALUES,
    "topic": TOPICS,
    "ink": tuple(INKS),
    "figure": FIGURES,
    "paint": PAINTS,
}
SHARPNESS = 10.0


class Anchor(nn.Module):
    """Which of a part's words is nearest to the mean of the rows that show it.

    Args:
        embeddings: of the language model, ``[V, H]``.
        tokenizer: of the language model.
    """

    def __init__(self, embeddings: Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        table = embeddings.detach().float()
        self.register_buffer("centre", table.mean(0))
        for part, words in NAMES.items():
            ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
            means = torch.stack([table[torch.tensor(one)].mean(0) for one in ids])
            self.register_buffer(part, F.normalize(means - self.centre, dim=-1))

    def forward(self, rows: Tensor, labels: Labels) -> Tensor:
        """Mean over the parts of the cross-entropy of the right word by cosine.

        rows: projected visual rows, ``[I, patches, H]``.
        """
        grouped: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for slot, (places, values) in labels.items():
            part = part_of(slot)
            if part not in NAMES:
                continue
            classes = values if part in NEVER_EMPTY else values - 1  # -1: an empty slot
            seen, wanted = grouped.setdefault(part, ([], []))
            seen.append(rows[places[classes >= 0]][:, window_of(slot)].float().mean(1))
            wanted.append(torch.from_numpy(classes[classes >= 0]))
        losses = []
        for part, (seen, wanted) in grouped.items():
            target = torch.cat(wanted).to(rows.device)
            if len(target):
                near = F.normalize(torch.cat(seen) - self.centre, dim=-1)
                logits = SHARPNESS * near @ getattr(self, part).T
                losses.append(F.cross_entropy(logits, target))
        return torch.stack(losses).mean() if losses else rows.new_zeros(())

"""A LLaVA pair with a vocabulary of 24 tokens, and its exact law: for tests of sampling.

The pair is ``tests.common.tiny``'s with other embeddings and a flatter head: the most likely token
has a probability of about a half, and the draft finds it often, so that sampling accepts and
rejects. Every token can be drawn, the image placeholder and the end of the text included: drawn
ones are plain text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests.common import tiny, tiny_targets
from tests.common.distribution import SequenceLaw, warp

LETTERS = "abcdefghijklmnopqrst"
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
VOCAB = len(LETTERS) + len(SPECIAL)
HEAD_SCALE = 0.1  # at this scale the best token's probability is about a half
DRAFT_SCALE = 0.35


@dataclass(frozen=True)
class Prompt:
    """Text in ``LETTERS``, where ``<image>`` stands for ``image``."""

    name: str
    text: str
    image: Any = None

    def for_vllm(self) -> dict[str, Any]:
        """The prompt as ``LLM.generate`` takes it."""
        media = {"multi_modal_data": {"image": [self.image]}} if self.image is not None else {}
        return {"prompt": self.text, **media}


def prompts() -> list[Prompt]:
    """One text-only prompt and one with an image in the middle."""
    return [
        Prompt("text", "<s>abcdefgh"),
        Prompt("image", "<s>kq<image>mfa", tiny.image(3)),
    ]


def build(root: Path, seed: int = 0, wide_heads: bool = False) -> tuple[str, str]:
    """Write the pair below ``root``; returns the folders of target and draft.

    ``wide_heads``: fewer heads, of 64, the smallest that the tree kernel takes.
    """
    with _wide_heads() if wide_heads else nullcontext():
        pair = tiny.build_pair(root, "llava", seed)
    target, draft = Path(pair.target), Path(pair.draft)
    _write_tokenizer(target)

    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(VOCAB, tiny.HIDDEN, generator=generator)
    order = torch.randperm(VOCAB, generator=generator)
    head = torch.empty_like(embedding)
    head[order.roll(-1)] = HEAD_SCALE * embedding[order]
    weights = load_file(target / "model.safetensors")
    weights["language_model.model.embed_tokens.weight"] = embedding
    weights["language_model.lm_head.weight"] = head
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    ids = {name: len(LETTERS) + i for i, name in enumerate(SPECIAL)}
    ends = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    config = json.loads((target / "config.json").read_text())
    config["image_token_index"] = config["image_token_id"] = ids["<image>"]
    config["text_config"].update(vocab_size=VOCAB, **ends)
    (target / "config.json").write_text(json.dumps(config))
    (target / "generation_config.json").write_text(json.dumps(ends))

    # As flat as the target's law, so that drafts drawn from the draft's own law vary as well.
    weights = load_file(draft / "model.safetensors")
    for name in ("fc.weight", "fc.bias"):
        weights[name] = DRAFT_SCALE * weights[name]
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((draft / "config.json").read_text())
    config["vocab_size"] = config["target"]["vocab_size"] = VOCAB
    (draft / "config.json").write_text(json.dumps(config))
    return str(target), str(draft)


def _write_tokenizer(target: Path) -> None:
    """Replace the target's tokenizer by one with a token per letter."""
    import transformers
    from tokenizers import Tokenizer, decoders, models

    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    processor = transformers.AutoProcessor.from_pretrained(target)
    processor.tokenizer = tokenizer
    processor.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _wide_heads() -> Iterator[None]:
    heads = {"HEADS": tiny.HIDDEN // 64, "KV_HEADS": 1}
    llava = replace(tiny_targets.FAMILIES["llava"], head_dim=64)
    with (
        mock.patch.multiple(tiny, **heads),
        mock.patch.multiple(tiny_targets, **heads),
        mock.patch.dict(tiny_targets.FAMILIES, {"llava": llava}),
    ):
        yield


class ExactTarget:
    """The target's own probabilities, computed by Hugging Face in fp32."""

    def __init__(self, target: str):
        import transformers

        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            target, dtype=torch.float32
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(target)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, prefixes: list[tuple[int, ...]]) -> torch.Tensor:
        """Logits ``[M, T, V]`` of the tokens that follow the first 0 .. T-1 tokens of M prefixes.

        Args:
            prefixes: M sequences of T - 1 token ids; an image placeholder among them is text.
        """
        inputs = self.processor(text=prompt.text, images=prompt.image, return_tensors="pt")
        start = self.model(**inputs, use_cache=True)
        cache = start.past_key_values
        cache.batch_repeat_interleave(len(prefixes))
        tokens = torch.tensor(prefixes)
        embeds = self.model.get_input_embeddings()(tokens)
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(length, length + tokens.shape[1]).expand(len(prefixes), -1)
        rest = self.model(inputs_embeds=embeds, past_key_values=cache, position_ids=positions)
        first = start.logits[:, -1:].expand(len(prefixes), 1, -1)
        return torch.cat([first, rest.logits], dim=1)

    def law(
        self, prompt: Prompt, draws: list[tuple[int, ...]], setting: dict[str, Any]
    ) -> SequenceLaw:
        """The law along ``draws`` (all of one length) after `warp` with these settings."""
        prefixes = sorted({draw[:-1] for draw in draws})
        return SequenceLaw(prefixes, warp(self.logits(prompt, prefixes), **setting))

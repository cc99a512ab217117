"""What a pair's draft should read, answer and draft, from whole sequences in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.common import tiny
from vllm_msd.checkpoint import load_draft
from vllm_msd.draft import DraftCache, MSDDraft, shift
from vllm_msd.tree import TreeConfig, draft_tree


@dataclass
class Oracle:
    """Target (Hugging Face) and draft (`MSDDraft`) of a pair, run on whole sequences."""

    kind: str
    target: str
    draft_path: str

    def __post_init__(self) -> None:
        import transformers

        architecture = getattr(transformers, tiny.FAMILIES[self.kind].architecture)
        self.model = architecture.from_pretrained(self.target, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(self.target)
        self.image_token = self.processor.image_token_id
        config, state = load_draft(self.draft_path)
        self.draft = MSDDraft.from_state_dict(config, state).float()

    @torch.inference_mode()
    def target_rows(self, ids: list[int], images: list[Any]) -> tuple[Tensor, Tensor]:
        """Input embeddings (images merged) and last hidden states, ``[1, L, H]`` each."""
        seen: dict[str, Tensor] = {}
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda _, __, named: seen.update(embeds=named["inputs_embeds"]), with_kwargs=True
        )
        token_ids = torch.tensor([ids])
        media = {}
        if images:
            media = dict(self.processor.image_processor(images, return_tensors="pt"))
            if tiny.FAMILIES[self.kind].is_qwen_vl:
                media["mm_token_type_ids"] = (token_ids == self.image_token).int()
        hidden = self.model.model(input_ids=token_ids, **media).last_hidden_state
        hook.remove()
        return seen["embeds"], hidden

    @torch.inference_mode()
    def draft_rows(self, ids: list[int], embeds: Tensor, hidden: Tensor) -> tuple[Any, Tensor]:
        """The shifted rows of the sequence and the draft's outputs ``[L, H]``."""
        table = self.model.get_input_embeddings()
        token_ids = torch.tensor([ids])
        is_visual = token_ids == self.image_token
        rows = shift(embeds, hidden, token_ids, torch.tensor([0]), is_visual, table)
        outputs = self.draft(
            rows.token_embeds, rows.hidden_states, rows.visual_mask, rows.position_ids
        )
        return rows, outputs[0]

    @torch.inference_mode()
    def chain(self, rows: Any, outputs: Tensor, position: int, length: int) -> list[int]:
        """The ``length`` tokens drafted greedily after the row at ``position``."""
        embeds = rows.token_embeds[:, : position + 1]
        hidden = rows.hidden_states[:, : position + 1]
        visual = rows.visual_mask[:, : position + 1]
        last, tokens = outputs[position], []
        for _ in range(length):
            tokens.append(int(self.model.lm_head(last).argmax()))
            embed = self.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            embeds = torch.cat([embeds, embed], 1)
            hidden = torch.cat([hidden, last[None, None]], 1)
            visual = torch.cat([visual, torch.zeros(1, 1, dtype=torch.bool)], 1)
            positions = torch.arange(embeds.shape[1])[None]
            last = self.draft(embeds, hidden, visual, positions)[0, -1]
        return tokens

    @torch.inference_mode()
    def tree(
        self, rows: Any, position: int, root: int, config: TreeConfig
    ) -> tuple[list[int], list[int]]:
        """Tokens, but for the root's, and parents of the tree grown after a row."""
        cache, beginning = DraftCache(), slice(position + 1)
        outputs = self.draft(
            rows.token_embeds[:, beginning],
            rows.hidden_states[:, beginning],
            rows.visual_mask[:, beginning],
            rows.position_ids[:, beginning],
            cache=cache,
        )
        grown = draft_tree(
            self.draft, cache, outputs[:, -1], torch.tensor([root]),
            self.model.get_input_embeddings(), self.model.lm_head, config.shape,
        )  # fmt: skip
        return grown.tokens[0, 1:].tolist(), grown.parents[0].tolist()

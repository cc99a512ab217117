"""What the draft learns from: the frozen target's embeddings and hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vllm_msd.draft import DraftRows, shift
from vllm_msd.training.rows import drafted_rows


@dataclass
class TargetFeatures:
    """One right-padded batch through the target.

    rows: the draft's inputs, row j holding hidden state j and token j + 1.
    hidden: ``[B, S, H]`` after the target's final norm.
    loss_mask: ``[B, S]`` bool, True at rows that draft a token of an answer. The first step of a
        reply (last prompt hidden state, first answer token) is among them.
    next_hidden: ``[B, S, H]`` hidden state one position on, what row j should predict.
    tokens: ``[B, S]`` int64, the batch's token ids.
    """

    rows: DraftRows
    hidden: Tensor
    next_hidden: Tensor
    loss_mask: Tensor
    tokens: Tensor


@torch.no_grad()
def target_features(
    target: LlavaForConditionalGeneration,
    input_ids: Tensor,
    answer_mask: Tensor,
    pixel_values: Tensor | None,
    draft_images: Tensor | None = None,
) -> TargetFeatures:
    """Run a LLaVA target over a batch.

    Args:
        target: frozen, in evaluation mode.
        input_ids: ``[B, S]`` int64, placeholders expanded, padded on the right.
        answer_mask: ``[B, S]`` bool, answer tokens.
        pixel_values: ``[I, 3, H, W]``, or None without images.
        draft_images: other images ``[I, 3, H, W]`` for the draft alone, to measure what its visual
            branch is worth.
    """
    placeholder = input_ids == target.config.image_token_index
    # Right padding is invisible to what comes before it, and its own rows are masked out.
    lengths = _lengths(input_ids, target.config.text_config.pad_token_id)
    tokens_only = input_ids.masked_fill(placeholder, 0)
    embeds = target.get_input_embeddings()(tokens_only)
    seen = embeds
    if pixel_values is not None:
        seen = _with_images(target, embeds, placeholder, pixel_values)
        embeds = seen
        if draft_images is not None:
            seen = _with_images(target, embeds, placeholder, draft_images)
    hidden = target.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    hidden = hidden.float()
    rows = shift(
        seen.float(),
        hidden,
        input_ids,
        torch.zeros_like(lengths),
        placeholder,
        target.get_input_embeddings(),
        lengths,
    )
    return TargetFeatures(
        rows=rows,
        hidden=hidden,
        next_hidden=hidden.roll(-1, 1),
        loss_mask=drafted_rows(answer_mask),
        tokens=input_ids,
    )


def _lengths(input_ids: Tensor, pad_id: int) -> Tensor:
    column = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return ((input_ids != pad_id) * column).amax(1)


def _with_images(
    target: LlavaForConditionalGeneration, embeds: Tensor, placeholder: Tensor, pixels: Tensor
) -> Tensor:
    features = target.get_image_features(pixel_values=pixels).pooler_output
    features = torch.cat(list(features)).to(embeds.dtype)
    return embeds.masked_scatter(placeholder[..., None].expand_as(embeds), features)

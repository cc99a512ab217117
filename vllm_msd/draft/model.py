"""The MSD draft: one small decoder that treats text and images by two branches.

arXiv 2505.14260, decoupled drafting: a text row fuses the next token's embedding with the target's
hidden state; a visual row is the image's own embedding, untouched. Draft row j stands for "hidden
state j, token j + 1" (see `shift`). The output has no final norm: the target's head is applied to
it as it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vllm_msd.draft.cache import DraftCache
from vllm_msd.draft.config import MSDDraftConfig
from vllm_msd.draft.layers import DecoderLayer, rotary_cos_sin
from vllm_msd.draft.vocabulary import token_ids_of


class TextBranch(nn.Linear):
    """Text rows: ``fc([embedding ; hidden])``, embedding first."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__(2 * hidden_size, hidden_size, bias=bias)

    # A Linear for its parameters' names, not to stand in for one: it takes two tensors.
    def forward(  # type: ignore[override]
        self, token_embeds: Tensor, hidden_states: Tensor
    ) -> Tensor:
        """Both ``[B, S, H]``; returns ``[B, S, H]``."""
        return super().forward(torch.cat([token_embeds, hidden_states], -1))


class VisualBranch(nn.Module):
    """Visual rows: the image's embedding raw, without the fusion layer and without a hidden state.

    The encoder's output has already been projected into the language model's embedding space, and
    the hidden state of an image position predicts no token; fusing the two only adds noise.
    """

    def forward(self, token_embeds: Tensor) -> Tensor:
        """``[B, S, H]`` to the same."""
        return token_embeds


class MSDDraft(nn.Module):
    """The draft model. Parameter names are those of the published checkpoints.

    The embedding table is optional: in serving the target's is shared, in training it is frozen.
    With a draft vocabulary there is a buffer ``d2t`` (see ``vocabulary.py``), zero until it is
    loaded or set: the first tokens.
    """

    d2t: Tensor

    def __init__(self, config: MSDDraftConfig, with_embedding: bool = False) -> None:
        super().__init__()
        self.config = config
        self.fc = TextBranch(config.hidden_size, config.fc_bias)
        self.visual = VisualBranch()
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        if with_embedding:
            self.embed_tokens = nn.Embedding(*config.embedding_shape())
            self.embed_tokens.requires_grad_(False)
        if config.draft_vocab_size is not None:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    @property
    def token_ids(self) -> Tensor | None:
        """``[D]`` int64, the target tokens that the draft proposes; None if it is all of them."""
        return None if self.config.draft_vocab_size is None else token_ids_of(self.d2t)

    @classmethod
    def from_state_dict(cls, config: MSDDraftConfig, state: Mapping[str, Tensor]) -> "MSDDraft":
        """A draft with these weights, in ``fc``'s dtype; keeps an embedding table if given one."""
        with torch.device("meta"):
            draft = cls(config, with_embedding="embed_tokens.weight" in state)
        draft.load_state_dict(state, assign=True)
        if hasattr(draft, "embed_tokens"):
            draft.embed_tokens.requires_grad_(False)
        return draft.to(draft.fc.weight.dtype)

    def merge_branches(
        self, token_embeds: Tensor, hidden_states: Tensor, visual_mask: Tensor
    ) -> Tensor:
        """The decoder's input: `VisualBranch` where ``visual_mask``, `TextBranch` elsewhere.

        Hidden states of visual rows are never read; whatever they hold, even NaN, has no effect on
        outputs or gradients.
        """
        is_visual = visual_mask[..., None]
        text = self.fc(token_embeds, hidden_states.masked_fill(is_visual, 0))
        # Under autocast the sum of residuals stays in the embeddings' precision.
        return torch.where(is_visual, self.visual(token_embeds), text.to(token_embeds.dtype))

    def forward(
        self,
        token_embeds: Tensor,
        hidden_states: Tensor,
        visual_mask: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DraftCache | None = None,
    ) -> Tensor:
        """Run draft rows through the decoder.

        Args:
            token_embeds: ``[B, S, H]`` embedding of each row's token (the one after its hidden
                state).
            hidden_states: ``[B, S, H]`` the target's hidden states after its final norm, or the
                draft's own output for drafted tokens.
            visual_mask: ``[B, S]`` bool, True where the row's token is part of an image.
            position_ids: ``[B, S]`` int64, plain sequential.
            attention_mask: ``[B, S]`` bool, False at right padding (default: no padding); or
                ``[B, S, C]`` bool, which of all C columns, cached ones first, a row sees (for
                trees). Without the latter a row sees every column before it and itself.
            cache: columns of earlier calls, extended by this call's.

        Returns:
            ``[B, S, H]`` the draft's hidden states, without a final norm. Padded rows hold finite
            numbers of no meaning.

        Raises:
            ValueError: shapes do not match.
        """
        batch, rows = visual_mask.shape
        expected = (batch, rows, self.config.hidden_size)
        for name, x in (("token_embeds", token_embeds), ("hidden_states", hidden_states)):
            if x.shape != expected:
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
        if position_ids.shape != (batch, rows):
            raise ValueError(
                f"position_ids: got shape {tuple(position_ids.shape)}, expected {(batch, rows)}"
            )
        visible = _visibility(attention_mask, batch, rows, cache, visual_mask.device)
        rotary = rotary_cos_sin(position_ids, self.config.head_dim, self.config.rope_theta)
        x = self.merge_branches(token_embeds, hidden_states, visual_mask)
        for layer in self.layers:
            x = layer(x, rotary, visible, cache)
        return x


def _visibility(
    attention_mask: Tensor | None,
    batch: int,
    rows: int,
    cache: DraftCache | None,
    device: torch.device,
) -> Tensor | None:
    """Columns each new row sees, ``[B, 1, S, C]`` bool; None for plain causal attention."""
    if attention_mask is None and cache is None:
        return None
    past = 0 if cache is None else cache.num_columns
    columns = past + rows
    is_tree = attention_mask is not None and attention_mask.dim() == 3
    expected = (batch, rows, columns) if is_tree else (batch, rows)
    if attention_mask is not None and attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {(batch, rows)} "
            f"or {(batch, rows, columns)}"
        )
    new_valid = torch.ones(batch, rows, dtype=torch.bool, device=device)
    if attention_mask is not None and not is_tree:
        new_valid = attention_mask.bool()
    valid = new_valid if cache is None else cache.extend_valid(new_valid)
    row = torch.arange(rows, device=device)[:, None] + past
    column = torch.arange(columns, device=device)
    seen = attention_mask.bool() if attention_mask is not None and is_tree else column <= row
    visible = seen & valid[:, None]
    # A padded row with nothing real before it sees itself, to stay finite.
    sees_nothing = ~visible.any(-1, keepdim=True)
    return (visible | sees_nothing & (column == row))[:, None]

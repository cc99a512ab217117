"""The MSD draft as vLLM models: same arithmetic and weight names as `vllm_msd.draft`.

vLLM hands a draft the *shifted* rows (row j: hidden state j, token j + 1) and calls
`embed_input_ids` with the equally shifted multimodal mask right before each forward pass. That call
leaves the mask in a persistent buffer, and the forward pass chooses each row's branch by it: an
image's own embedding raw, or ``fc([embedding ; hidden])`` for text.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    _merge_multimodal_embeddings,
    get_draft_quant_config,
    maybe_prefix,
)

from vllm_msd.checkpoint.weights import EMBEDDING, is_derived
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.draft.vocabulary import OFFSETS, check_token_ids, token_ids_of
from vllm_msd.errors import CheckpointError
from vllm_msd.vllm_plugin.own_head import own_head


class MsdDecoderLayer(nn.Module):
    """Pre-norm decoder layer; ``has_input_norm`` is False for layer 0 of a Llama-type draft."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config,
        draft: MSDDraftConfig,
        has_input_norm: bool,
        prefix: str,
    ) -> None:
        super().__init__()
        quant_config = get_draft_quant_config(vllm_config)
        # vLLM's Llama attention serves both layer types: Qwen2's differs in the q/k/v bias only.
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=draft.hidden_size,
            num_heads=draft.num_attention_heads,
            num_kv_heads=draft.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            bias=draft.attention_bias,
            bias_o_proj=False,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = LlamaMLP(
            hidden_size=draft.hidden_size,
            intermediate_size=draft.intermediate_size,
            hidden_act=draft.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        norm_size, eps = draft.hidden_size, draft.rms_norm_eps
        self.input_layernorm = RMSNorm(norm_size, eps=eps) if has_input_norm else nn.Identity()
        self.post_attention_layernorm = RMSNorm(norm_size, eps=eps)

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``positions [T]`` int64, ``x [T, H]``; returns ``[T, H]``."""
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedEmbedding(nn.Module):
    """Stands where the draft's embedding table would be, until vLLM puts the target's there.

    Allocating a table only to throw it away would cost hundreds of megabytes. ``weight [0, H]``
    tells vLLM the width, by which it decides that the target's table fits.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, hidden_size), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the target's embedding has not been shared with the MSD draft yet")


# input_ids never enter here: they are None for multimodal batches and would break the graph.
@support_torch_compile
class MsdModel(nn.Module):
    """Fusion and decoder layers of the draft; no final norm."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.draft_config = draft = MSDDraftConfig.from_dict(self.config.msd_draft)
        # Attention layers are known by their index, so the draft's follow the target's.
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.config.target_layer_count = first
        self.embed_tokens = SharedEmbedding(draft.hidden_size)
        self.fc = ReplicatedLinear(
            input_size=2 * draft.hidden_size,
            output_size=draft.hidden_size,
            bias=draft.fc_bias,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )
        self.layers = nn.ModuleList(
            MsdDecoderLayer(
                vllm_config,
                self.config,
                draft,
                has_input_norm=i > 0 or draft.input_norm,
                prefix=maybe_prefix(prefix, f"layers.{first + i}"),
            )
            for i in range(draft.num_hidden_layers)
        )

    def text_branch(self, embeds: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Text rows: the next token's embedding fused with the target's hidden state."""
        return self.fc(torch.cat([embeds, hidden_states], dim=-1))

    def visual_branch(self, embeds: torch.Tensor) -> torch.Tensor:
        """Visual rows: the image's embedding raw, without fusion and without a hidden state."""
        return embeds

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        is_visual: torch.Tensor,
    ) -> torch.Tensor:
        """Run T draft rows.

        Args:
            positions: ``[T]`` int64, plain sequential, also under an M-RoPE target.
            hidden_states: ``[T, H]`` the target's hidden states, or the draft's own output.
            inputs_embeds: ``[T, H]`` embedding of each row's token, images already merged in.
            is_visual: ``[T]`` bool, True where the row's token belongs to an image.

        Returns:
            ``[T, H]`` the draft's hidden states.
        """
        x = torch.where(
            is_visual.unsqueeze(-1),
            self.visual_branch(inputs_embeds),
            self.text_branch(inputs_embeds, hidden_states),
        )
        for layer in self.layers:
            x = layer(positions, x)
        return x


class EagleMsdForCausalLM(nn.Module):
    """What vLLM's runners drive: branch mask, inner model, and the target's head.

    Attributes:
        vocab_size: of the target, of its embedding table and head.
        token_ids: ``[D]`` int64 the tokens that the draft proposes, None if it is all of them. Then
            `lm_head` has D columns, once `keep_own_head` was called.
    """

    # Both runners share the target's embedding and head when the draft says it has none.
    has_own_embed_tokens = False
    has_own_lm_head = False
    # Makes the runners pass image embeddings and the shifted mask to `embed_input_ids`.
    supports_multimodal_embeddings = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = MsdModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.config = self.model.config
        # The head is the target's, so is the vocabulary: a published draft may list fewer rows.
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        draft_vocab_size = self.model.draft_config.draft_vocab_size
        self.num_columns = draft_vocab_size or self.vocab_size
        self.logits_processor = LogitsProcessor(self.num_columns)
        token_ids = None if draft_vocab_size is None else torch.arange(draft_vocab_size)
        self.register_buffer("token_ids", token_ids, persistent=False)
        # Persistent, so that CUDA graphs read the same memory that later steps write.
        max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("is_visual", torch.zeros(max_rows, dtype=torch.bool), persistent=False)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: list[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed each row's token and note which rows are visual, for the forward pass that follows.

        A row is visual by the mask alone. A placeholder id outside the mask is text: the target may
        generate it, and an image that the encoder has not reached yet has no embedding to use.

        Args:
            input_ids: ``[T]`` int, shifted by one; any value on visual rows.
            multimodal_embeddings: embeddings of the visual rows, in order, ``[n_i, H]`` each, or
                wider: Qwen3-VL appends what its first layers add later (deepstack). That is the
                target's own business; the draft reads the first H columns, which are what the
                target's language model is handed as these rows' input.
            is_multimodal: ``[T]`` bool, on the CPU or the model's device.

        Returns:
            ``[T, H]`` embeddings.
        """
        self.is_visual.zero_()  # whole buffer: padding rows must be text as well
        if is_multimodal is None or not multimodal_embeddings:
            return self.model.embed_tokens(self._in_table(input_ids))
        num_rows = input_ids.shape[0]
        if is_multimodal.shape[0] != num_rows:
            raise ValueError(
                f"is_multimodal: got {is_multimodal.shape[0]} rows, expected {num_rows}, as many "
                "as input_ids. Is disable_padded_drafter_batch set? MSD needs it off."
            )
        self.is_visual[:num_rows].copy_(is_multimodal, non_blocking=True)
        embeds = self.model.embed_tokens(self._in_table(input_ids))
        return _merge_multimodal_embeddings(
            inputs_embeds=embeds,
            multimodal_embeddings=[image[:, : embeds.shape[-1]] for image in multimodal_embeddings],
            is_multimodal=is_multimodal,
        )

    def embed_drafted(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` tokens that the draft itself proposed, all in the table, to ``[T, H]``."""
        return self.model.embed_tokens(input_ids)

    def _in_table(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids outside the table (placeholders of some targets, stale rows) become ids inside it."""
        return input_ids.clamp(0, self.vocab_size - 1)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft rows in, draft hidden states out, twice: for the head and for the next step.

        ``input_ids`` is read only in an engine without multimodal inputs, where ``inputs_embeds``
        is None.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        is_visual = self.is_visual[: positions.shape[0]]
        x = self.model(positions, hidden_states, inputs_embeds, is_visual)
        return x, x

    def keep_own_head(self) -> None:
        """With a draft vocabulary, put its rows in the place of the head that the runners share.

        Raises:
            CheckpointError, ConfigError: the target's head has no such rows.
        """
        if self.token_ids is not None:
            shared = self.lm_head
            del self.lm_head
            self.lm_head = own_head(shared, self.token_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``[T, H]`` to ``[T, vocab]`` by the target's head, without a norm before it.

        Tokens that the draft does not propose get -inf: a probability of exactly 0.
        """
        logits = self.column_logits(hidden_states)
        if self.token_ids is None or logits is None:
            return logits
        spread = logits.new_full((logits.shape[0], self.vocab_size), float("-inf"))
        return spread.index_copy_(1, self.token_ids, logits)

    def column_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``[T, H]`` to ``[T, num_columns]``, of the tokens that the draft proposes alone."""
        return self.logits_processor(self.lm_head, hidden_states)

    def local_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, columns]`` of this rank's part of the head, its padding included."""
        return self.logits_processor(self.lm_head, hidden_states, skip_gather=True)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T]`` most likely tokens, without gathering logits of all ranks."""
        columns = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return columns if self.token_ids is None else self.token_ids[columns]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint with the published names.

        An embedding table is skipped (the target's is shared), and what follows from the config.

        Raises:
            CheckpointError: a weight is missing, unknown or has the wrong shape.
        """
        expected = self.model.draft_config.weight_shapes()
        checked = {}
        has_vocabulary = False
        for name, weight in weights:
            if name == EMBEDDING or is_derived(name):
                continue
            if name == OFFSETS and self.token_ids is not None:
                self._load_vocabulary(weight)
                has_vocabulary = True
                continue
            if name not in expected:
                raise CheckpointError(
                    f"draft weight {name!r} is not part of an MSD draft with this config. Expected "
                    "names like 'fc.weight' and 'layers.0.self_attn.q_proj.weight'; check the "
                    "checkpoint with: vllm-msd inspect PATH"
                )
            if tuple(weight.shape) != expected[name]:
                raise CheckpointError(
                    f"draft weight {name!r}: got shape {tuple(weight.shape)}, expected "
                    f"{expected[name]} from the draft's config."
                )
            checked[f"model.{name}"] = weight
        missing = [name for name in expected if f"model.{name}" not in checked]
        if self.token_ids is not None and not has_vocabulary:
            missing.append(OFFSETS)
        if missing:
            raise CheckpointError(
                f"draft weights missing: {', '.join(missing)}. The checkpoint is incomplete; fetch "
                "or convert it again."
            )
        loader = AutoWeightsLoader(self)
        return loader.load_weights(checked.items(), mapper=self.model.hf_to_vllm_mapper)

    def _load_vocabulary(self, offsets: torch.Tensor) -> None:
        if offsets.shape != self.token_ids.shape or offsets.is_floating_point():
            raise CheckpointError(
                f"draft weight {OFFSETS!r}: got {offsets.dtype} {tuple(offsets.shape)}, expected "
                f"integers {tuple(self.token_ids.shape)}, as many as draft_vocab_size says."
            )
        token_ids = token_ids_of(offsets.long())
        check_token_ids(token_ids, self.vocab_size, "the target's vocabulary")
        self.token_ids.copy_(token_ids)


class EagleMsdLlamaForCausalLM(EagleMsdForCausalLM):
    """MSD draft with a Llama-type layer (LLaVA targets)."""


class EagleMsdQwen2ForCausalLM(EagleMsdForCausalLM):
    """MSD draft with a Qwen2-type layer (Qwen-VL and LLaVA-OneVision targets)."""

"""The demo target: a small LLaVA of standard architecture, and its checkpoint folder."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .tokenizer import PATCH_SIZE, VOCAB_SIZE, build_processor, save_processor
from .world.base import IMAGE_SIZE

VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def target_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """About 7.8M parameters: CLIP 192 x 4, Llama 256 x 6, heads of 64 in both."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        # Trained from scratch, so the tower's last layer is as good as any and none is wasted.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


def build_target(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised target in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(target_config(tokenizer)).float()
    table = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        table[1:] += grid_positions(table.shape[1])
    _initialise_language(model)
    return model


@torch.no_grad()
def _initialise_language(model: LlavaForConditionalGeneration) -> None:
    """Weights by their fan-in instead of the fixed 0.02 made for wide models.

    At this width 0.02 leaves attention nearly even for thousands of steps, and with it the answers
    blind to where things are. Layers that add to the residual stream start smaller, as in GPT-2.
    """
    language = model.model.language_model
    depth = len(language.layers)
    for module in (language.layers, model.model.multi_modal_projector):
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                adds = name.endswith(("o_proj", "down_proj"))
                std = layer.in_features**-0.5 * ((2 * depth) ** -0.5 if adds else 1.0)
                layer.weight.normal_(0.0, std)
    language.embed_tokens.weight.normal_(0.0, 0.5)
    model.lm_head.weight.normal_(0.0, 0.5 * model.lm_head.in_features**-0.5)


def grid_positions(width: int) -> torch.Tensor:
    """Sines and cosines of a patch's row and column, [patches, width].

    A learned position table that starts near zero leaves the patches alike for long: what is where
    is then found late.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    rates = torch.pi * torch.arange(1, width // 4 + 1) / (width // 4)
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    return 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict under the names of the published LLaVA-1.5 checkpoints.

    Transformers and vLLM both read these; transformers' own newer names only it reads.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("lm_head."):
            new = "language_model." + name
        elif name.startswith("model.language_model."):
            new = name.replace("model.language_model.", "language_model.model.", 1)
        elif name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            new = "vision_tower.vision_model." + rest
        elif name.startswith("model.multi_modal_projector."):
            new = name.removeprefix("model.")
        else:
            raise ValueError(f"got unknown weight name {name!r}: transformers changed its layout?")
        renamed[new] = tensor
    return renamed


def export_target(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write the checkpoint folder that transformers and vLLM load, weights in bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    state = published_names(model.state_dict())
    state = {k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in state.items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    config = model.config
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.bfloat16
    config.save_pretrained(path)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    ).save_pretrained(path)
    save_processor(build_processor(tokenizer), path)

"""Tiny random LoRA adapters, in PEFT's format, whose answers differ from the base model's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.common.tiny_targets import FAMILIES, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB

RANK = 4
STRENGTH = 0.3


def write_adapter(folder: Path, kind: str, seed: int, head: bool = False) -> str:
    """Write an adapter of a tiny target's attention and MLP; returns its folder.

    Args:
        folder: to write to.
        kind: of the target, one of ``tiny.KINDS``.
        seed: of its weights.
        head: also adapt the embedding table and the head.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (STRENGTH / shape[-1]) ** 0.5

    width = FAMILIES[kind].head_dim
    shapes = {
        "self_attn.q_proj": (HEADS * width, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * width, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * width),
        "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
        "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
    }
    weights = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.language_model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = random(RANK, columns)
            weights[f"{name}.lora_B.weight"] = random(rows, RANK)
    modules = sorted({module.split(".")[1] for module in shapes})
    if head:
        name = "base_model.model.model.language_model.embed_tokens"
        weights[f"{name}.lora_embedding_A"] = random(RANK, VOCAB)
        weights[f"{name}.lora_embedding_B"] = random(HIDDEN, RANK)
        weights["base_model.model.lm_head.lora_A.weight"] = random(RANK, HIDDEN)
        weights["base_model.model.lm_head.lora_B.weight"] = random(VOCAB, RANK)
        modules += ["embed_tokens", "lm_head"]
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": modules,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)

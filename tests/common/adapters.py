"""Random LoRA adapters of small targets, in PEFT's format; their answers differ from the base's."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
STRENGTH = 0.3


def write_adapter(folder: Path, target: str, seed: int, head: bool = False) -> str:
    """Write an adapter of a target's attention and MLP; returns its folder.

    Args:
        folder: to write to.
        target: folder of the target.
        seed: of the adapter's weights.
        head: also adapt the embedding table and the head.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target).get_text_config()
    hidden, inner = config.hidden_size, config.intermediate_size
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, values = (
        count * width for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (STRENGTH / shape[-1]) ** 0.5

    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {}
    for layer in range(config.num_hidden_layers):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.language_model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = random(RANK, columns)
            weights[f"{name}.lora_B.weight"] = random(rows, RANK)
    modules = sorted({module.split(".")[1] for module in shapes})
    if head:
        name = "base_model.model.model.language_model.embed_tokens"
        weights[f"{name}.lora_embedding_A"] = random(RANK, config.vocab_size)
        weights[f"{name}.lora_embedding_B"] = random(hidden, RANK)
        weights["base_model.model.lm_head.lora_A.weight"] = random(RANK, hidden)
        weights["base_model.model.lm_head.lora_B.weight"] = random(config.vocab_size, RANK)
        modules += ["embed_tokens", "lm_head"]
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": modules,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return str(folder)

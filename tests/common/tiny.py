"""Constructed tiny pairs of target and MSD draft: random weights, yet drafts get accepted.

A random target repeats itself and a random draft is never right, so neither would test acceptance.
Here the target's head is a permutation of its embedding table: without its layers it walks round
one long cycle through the printable characters. Its layers, scaled up far enough, push it off that
walk every few tokens, by what it attends to (text and image). The draft passes the embedding
through its fusion layer and disturbs it little, so it follows the cycle: it is right most of the
time and wrong often enough. For trees there is a draft that is unsure (``decoys``): after some
tokens it finds others about as likely as the right one, which then stands second or third.

Folders are in the standard Hugging Face layout (hub key names, tokenizer, processor) and load in
vLLM and in Transformers. Sizes respect vLLM's CPU attention: head size 32, tensor parallel 2.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.draft.config import TargetInfo

KINDS = ("llava", "qwen2_vl", "qwen2_5_vl")
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
HIDDEN, HEADS, KV_HEADS, LAYERS, HEAD_DIM = 128, 4, 2, 2, 32
VOCAB = 320
MAX_POSITIONS = 2048
SPECIAL_TOKENS = {
    "llava": ["<s>", "</s>", "<pad>", "<image>"],
    "qwen2_vl": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
}
SPECIAL_TOKENS["qwen2_5_vl"] = SPECIAL_TOKENS["qwen2_vl"]
IMAGE_PLACEHOLDER = {
    "llava": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
IMAGE_TOKEN = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>"}
IMAGE_SIZE = 70  # llava: 5 x 5 patches of 14


@dataclass(frozen=True)
class TinyPair:
    """Paths of one pair. ``draft`` is in our own format, ``published`` in the flat layout."""

    kind: str
    target: str
    draft: str
    published: str


def build_pair(root: Path, kind: str, seed: int = 0, decoys: int = 0) -> TinyPair:
    """Write the pair's three folders below ``root`` and return their paths.

    Args:
        root: folder to write to.
        kind: one of ``KINDS``.
        seed: of all weights.
        decoys: wrong tokens that the draft finds about as likely as the right one, after every
            second token.
    """
    torch.manual_seed(seed)
    root = Path(root)
    target, draft, published = root / "target", root / "draft", root / "published"
    embedding = torch.randn(VOCAB, HIDDEN)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        _write_target(target, kind, embedding, seed)
    config = _draft_config(kind)
    state = _draft_state(config, seed + 2)
    if decoys:
        state["fc.weight"][:, :HIDDEN] += _decoys(embedding, decoys, seed + 4)
    _write(
        draft,
        {
            **config.to_dict(),
            "target": {
                "name_or_path": "../target",
                "architecture": ARCHITECTURES[kind],
                "hidden_size": HIDDEN,
                "vocab_size": VOCAB,
            },
        },
        state,
    )
    _write(published, _published_config(config, kind), {**state, "embed_tokens.weight": embedding})
    return TinyPair(kind, str(target), str(draft), str(published))


def image(seed: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """A picture of a few coloured blocks, ``size`` in pixels (width, height)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def prompt(kind: str, text: str, images: list[Image.Image] | None = None) -> dict:
    """A vLLM prompt; every ``{}`` in ``text`` stands for the next image."""
    images = images or []
    if text.count("{}") != len(images):
        raise ValueError(f"{text.count('{}')} places in the text, {len(images)} images")
    request = {"prompt": text.replace("{}", IMAGE_PLACEHOLDER[kind])}
    if images:
        request["multi_modal_data"] = {"image": images}
    return request


# Target ---------------------------------------------------------------------------------------


def _write_target(folder: Path, kind: str, embedding: torch.Tensor, seed: int) -> None:
    folder.mkdir(parents=True)
    tokenizer = _write_processor(folder, kind)
    config = _target_config(kind, tokenizer)
    config.architectures = [ARCHITECTURES[kind]]
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, ARCHITECTURES[kind])(config)
    state = {_hub_name(kind, name): w.clone() for name, w in model.state_dict().items()}
    _scramble(state, seed)
    language = "language_model." if kind == "llava" else ""
    state[f"{language}model.embed_tokens.weight"].copy_(embedding)
    state[f"{language}lm_head.weight"].copy_(_head(embedding, seed))
    save_file(
        {name: w.contiguous() for name, w in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _hub_name(kind: str, name: str) -> str:
    """Transformers 5 names modules otherwise than the hub's checkpoints do; vLLM reads those."""
    if kind == "llava":
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("lm_head.", "language_model.lm_head.")
    name = name.replace("model.visual.", "visual.")
    return name.replace("model.language_model.", "model.")


def _scramble(state: dict[str, torch.Tensor], seed: int) -> None:
    """Random weights of a size at which attention picks and the layers push."""
    generator = torch.Generator().manual_seed(seed + 3)
    for name, weight in state.items():
        if weight.dim() < 2 or "embed" in name or "lm_head" in name:
            continue
        fan_in = weight[0].numel()
        scale = fan_in**-0.5
        if "q_proj" in name or "k_proj" in name:
            scale *= 1.6  # attention that picks single tokens instead of averaging
        elif "o_proj" in name or "down_proj" in name:
            scale *= 3.0
        elif "multi_modal_projector" in name:
            scale *= 2.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def _head(embedding: torch.Tensor, seed: int) -> torch.Tensor:
    """Row ``next(t)`` is t's embedding, for printable t along one random cycle; else zero."""
    printable = torch.tensor(_printable_ids())
    order = printable[torch.randperm(len(printable), generator=torch.Generator().manual_seed(seed))]
    head = torch.zeros_like(embedding)
    head[order.roll(-1)] = embedding[order]
    return head


def _target_config(kind: str, tokenizer):
    import transformers

    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS[kind]}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if kind == "llava":
        vision = transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=14,
            projection_dim=64,
        )
        return transformers.LlavaConfig(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**text),
            image_token_index=ids["<image>"],
            image_seq_length=(IMAGE_SIZE // 14) ** 2,
            dtype="float32",
        )
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    }
    ids_of = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    if kind == "qwen2_vl":
        vision = {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
        }
        return transformers.Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            dtype="float32",
            tie_word_embeddings=False,
            **ids_of,
        )
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "intermediate_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, dtype="float32", tie_word_embeddings=False, **ids_of
    )


# Tokenizer and processor ----------------------------------------------------------------------


def _byte_vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}


def _printable_ids() -> list[int]:
    """Ids of the letters, digits, punctuation and the space ("Ġ" in byte-level vocabularies)."""
    vocabulary = _byte_vocabulary()
    return [vocabulary[chr(c)] for c in range(33, 127)] + [vocabulary["Ġ"]]


def _write_processor(folder: Path, kind: str):
    """One token per byte and the special tokens; returns the tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL_TOKENS[kind])
    if kind == "llava":
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:
        names = {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=MAX_POSITIONS, **names
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", IMAGE_PLACEHOLDER[kind])
    if kind == "llava":
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        )
        processor = transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    else:
        limits = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
        images = transformers.Qwen2VLImageProcessor(size=limits)
        video = transformers.Qwen2VLVideoProcessor(size=limits)
        cls = (
            transformers.Qwen2VLProcessor
            if kind == "qwen2_vl"
            else (transformers.Qwen2_5_VLProcessor)
        )
        processor = cls(images, tokenizer, video, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# Draft ----------------------------------------------------------------------------------------


def _draft_config(kind: str) -> MSDDraftConfig:
    is_llama = kind == "llava"
    return MSDDraftConfig(
        layer_type="llama" if is_llama else "qwen2",
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        rms_norm_eps=1e-5 if is_llama else 1e-6,
        rope_theta=1e4 if is_llama else 1e6,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_POSITIONS,
        attention_bias=not is_llama,
        input_norm=not is_llama,
        target=TargetInfo("../target", ARCHITECTURES[kind], HIDDEN, VOCAB),
    )


def _draft_state(config: MSDDraftConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that pass the embedding through; the rest is large enough to show in the numbers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in config.weight_shapes().items():
        weight = torch.randn(shape, generator=generator)
        if "norm" in name:
            weight = 1 + 0.1 * weight
        elif len(shape) == 1:
            weight = 0.05 * weight
        elif name == "fc.weight":
            weight *= 0.02
            weight[:, : config.hidden_size] += torch.eye(config.hidden_size)
        else:
            weight *= shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                weight *= 0.3
        state[name] = weight
    return state


def _decoys(embedding: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """What to add to the identity, so that it adds other embeddings to some tokens' own.

    The head finds those tokens' successors as well. Their weights are drawn from around 1: near
    enough for the rest of the draft to have a say in the order, so that it varies with the context.
    """
    generator = torch.Generator().manual_seed(seed)
    printable = torch.tensor(_printable_ids())
    rows = embedding[printable]
    mixed = torch.zeros_like(rows)
    for i in range(0, len(rows), 2):
        others = torch.randperm(len(rows), generator=generator)
        others = others[others != i][:count]
        weights = 1.0 + 0.15 * torch.rand(count, 1, generator=generator)
        mixed[i] = (weights * rows[others]).sum(0)
    return mixed.T @ torch.linalg.pinv(rows).T


def _published_config(config: MSDDraftConfig, kind: str) -> dict:
    """The flat config of a published draft; Qwen2.5-VL's is published in the Qwen2-VL layout."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "rope_theta",
        "hidden_act",
        "vocab_size",
        "max_position_embeddings",
    )
    fields = {name: getattr(config, name) for name in names}
    model_type = "llava" if kind == "llava" else "qwen2_vl"
    return {"model_type": model_type, "torch_dtype": "float32", **fields}


def _write(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

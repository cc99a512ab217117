"""The families of tiny targets: configs, tokenizers and processors (see `tiny`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KV_HEADS, LAYERS = 128, 4, 2, 2
VOCAB = 320
MAX_POSITIONS = 2048
IMAGE_SIZE = 70  # pixels of a side of a LLaVA-1.5 image: 5 x 5 patches of 14
CROP = 42  # of a crop of a target that cuts images into several: 3 x 3 patches
PINPOINTS = [[CROP, 2 * CROP], [2 * CROP, CROP], [2 * CROP, 2 * CROP]]

_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Pictures for those: one of four crops, with padding to be cut off, and one of two.
_CROPPED = ((140, 84), (50, 100))


@dataclass(frozen=True)
class Family:
    """What tells one kind of target from another.

    picture_sizes: width and height in pixels of the tests' pictures, which take turns.
    draft_layer: layer type of its drafts. head_dim: of target and draft.
    """

    architecture: str
    special_tokens: tuple[str, ...]
    image_token: str
    placeholder: str
    picture_sizes: tuple[tuple[int, int], ...]
    draft_layer: str
    head_dim: int = HIDDEN // HEADS

    @property
    def is_qwen_vl(self) -> bool:
        """Whether it has the vision tokens and the M-RoPE of the Qwen-VL models."""
        return self.special_tokens == _QWEN_TOKENS

    @property
    def takes_video(self) -> bool:
        """Whether it has a placeholder for videos."""
        return any("video" in token for token in self.special_tokens)


def _qwen(architecture: str, head_dim: int = HIDDEN // HEADS) -> Family:
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    # Wide pictures, so that M-RoPE has two axes.
    return Family(
        architecture, _QWEN_TOKENS, "<|image_pad|>", placeholder, ((140, 84),), "qwen2", head_dim
    )


FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        ("<s>", "</s>", "<pad>", "<image>"),
        "<image>",
        "<image>",
        ((IMAGE_SIZE, IMAGE_SIZE),),
        "llama",
    ),
    "qwen2_vl": _qwen("Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLForConditionalGeneration"),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        ("<s>", "</s>", "<pad>", "<image>"),
        "<image>",
        "<image>",
        _CROPPED,
        "llama",
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        ("<s>", "</s>", "<pad>", "<image>", "<video>"),
        "<image>",
        "<image>",
        _CROPPED,
        "qwen2",
    ),
    # Heads wider than the hidden size has room for, as in the published small ones.
    "qwen3_vl": _qwen("Qwen3VLForConditionalGeneration", head_dim=64),
}


def hub_name(kind: str, name: str) -> str:
    """Transformers 5 names modules otherwise than the hub's checkpoints do; vLLM reads those."""
    if kind == "qwen3_vl":
        return name
    if FAMILIES[kind].is_qwen_vl:
        name = name.replace("model.visual.", "visual.")
        return name.replace("model.language_model.", "model.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    name = name.replace("model.image_newline", "image_newline")
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def target_config(kind: str, tokenizer: Any, tied: bool) -> Any:
    """The Transformers config of a target; ``tied``: its head is its embedding table."""
    import transformers

    family = FAMILIES[kind]
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in family.special_tokens}
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
        "tie_word_embeddings": tied,
    }
    common = {
        "architectures": [family.architecture],
        "dtype": "float32",
        "tie_word_embeddings": tied,
    }
    if family.is_qwen_vl:
        common |= {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
        return _qwen_config(kind, text, common)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE if kind == "llava" else CROP,
        "patch_size": 14,
    }
    common["image_token_index"] = ids["<image>"]
    if kind == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=transformers.Qwen2Config(**text),
            video_token_index=ids["<video>"],
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
    clip = transformers.CLIPVisionConfig(**vision, projection_dim=64)
    if kind == "llava_next":
        return transformers.LlavaNextConfig(
            vision_config=clip,
            # As in the most used ones; the others' language model is a Llama.
            text_config=transformers.MistralConfig(**text, sliding_window=None),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=(CROP // 14) ** 2,
            **common,
        )
    return transformers.LlavaConfig(
        vision_config=clip,
        text_config=transformers.LlamaConfig(**text),
        image_seq_length=(IMAGE_SIZE // 14) ** 2,
        **common,
    )


def _qwen_config(kind: str, text: dict, common: dict) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2}
        config_class = transformers.Qwen2VLConfig
    elif kind == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        config_class = transformers.Qwen2_5_VLConfig
    else:
        rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
        text["head_dim"] = FAMILIES[kind].head_dim
        # Position embeddings of a grid of 8 x 8; features of two layers go to the language model.
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        config_class = transformers.Qwen3VLConfig
    if kind != "qwen2_vl":
        vision |= {"hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 128}
    return config_class(
        text_config=text | {"rope_parameters": rope}, vision_config=vision, **common
    )


# Tokenizer and processor ----------------------------------------------------------------------


def byte_vocabulary() -> dict[str, int]:
    """One token per byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}


def printable_ids() -> list[int]:
    """Ids of the letters, digits, punctuation and the space ("Ġ" in byte-level vocabularies)."""
    vocabulary = byte_vocabulary()
    return [vocabulary[chr(c)] for c in range(33, 127)] + [vocabulary["Ġ"]]


def write_processor(folder: Path, kind: str) -> Any:
    """One token per byte and the special tokens; returns the tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    family = FAMILIES[kind]
    core = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(family.special_tokens))
    pad, bos, eos = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    if not family.is_qwen_vl:
        pad, bos, eos = ("<pad>", "<s>", "</s>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_POSITIONS,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", family.placeholder)
    processor = _processor(kind, tokenizer, {"chat_template": tokenizer.chat_template})
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _processor(kind: str, tokenizer: Any, template: dict) -> Any:
    import transformers

    if kind == "llava":
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        )
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **template,
        )
    if kind == "llava_next":
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": CROP},
            crop_size={"height": CROP, "width": CROP},
            image_grid_pinpoints=PINPOINTS,
        )
        return transformers.LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **template,
        )
    if kind == "llava_onevision":
        size = {"height": CROP, "width": CROP}
        return transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=(CROP // 14) ** 2,
            vision_feature_select_strategy="full",
            **template,
        )
    limits = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    patches = {"patch_size": 16} if kind == "qwen3_vl" else {}
    images = transformers.Qwen2VLImageProcessor(size=limits, **patches)
    processor, video = {
        "qwen2_vl": (transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_vl": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    }[kind]
    return processor(images, tokenizer, video(size=limits), **template)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

"""Models of the true shape of published ones, with random weights: their cost without their files.

The target's config is written and vLLM fills it with random numbers (`load_format` dummy); the
draft is written whole, one layer of the same shape. Text goes through the demo's tokenizer, which
is smaller than theirs; embedding table and head have the true size.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_msd.roofline.shapes import SHAPES, Shape

NOTE = "acceptance from a table, cost from the true shape"
TINY = "tiny"  # made up, to try the command
NAMES = (*SHAPES, TINY)
_TINY = Shape(TINY, 256, 2, 4, 4, 512, 2304, head_size=64)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_ENDS = ("bos", "eos", "pad", "unk")
_PATCH = 14  # pixels of a side, of both families
_DRAFT_STD = 0.02


def language_shape(name: str) -> Shape:
    """The language model's shape; one of `NAMES`."""
    return _TINY if name == TINY else SHAPES[name]


def is_qwen(name: str) -> bool:
    """Whether the shape is of the Qwen2-VL family, else of LLaVA-1.5's."""
    return name.startswith("qwen")


def true_pair(name: str, dtype: str) -> tuple[Path, Path]:
    """Folders of the target, without weights, and of its draft; made in the cache if needed.

    Args:
        name: one of `NAMES`.
        dtype: of the draft's weights.
    """
    from vllm_msd.demo.paths import cached, demo_pair, folder_digest

    demo = demo_pair().target
    provenance = {
        "algorithm_version": 2,
        "shape": asdict(language_shape(name)),
        "dtype": dtype,
        "demo target": folder_digest(demo),
    }

    def make(new: Path) -> None:
        write_target(name, demo, new / "target", dtype)
        write_draft(name, new / "draft", dtype)

    folder = cached(f"shape-{name}-{dtype}", provenance, make)
    return folder / "target", folder / "draft"


def target_config(name: str, ids: dict[str, int], dtype: str) -> Any:
    """The Hugging Face config of a target.

    Args:
        name: one of `NAMES`.
        ids: of the tokenizer's special tokens.
        dtype: of its weights.
    """
    import transformers

    shape = language_shape(name)
    text = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    common = {"dtype": dtype, "tie_word_embeddings": False}
    if is_qwen(name):
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_parameters": rope}
        return transformers.Qwen2VLConfig(
            architectures=["Qwen2VLForConditionalGeneration"],
            text_config=text,
            vision_config={"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16,
                           "hidden_size": shape.hidden, "patch_size": _PATCH},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            **common,
        )  # fmt: skip
    size = image_size(name)
    # CLIP ViT-L/14 at 336 pixels, of which the last layer but one is read.
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "projection_dim": 768}  # fmt: skip
    if name == TINY:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "projection_dim": 64}  # fmt: skip
    return transformers.LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=size, patch_size=_PATCH),
        text_config=transformers.LlamaConfig(
            **text,
            head_dim=shape.head_size,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_token_index=ids["<image>"],
        image_seq_length=(size // _PATCH) ** 2,
        vision_feature_layer=-2,
        **common,
    )


def image_size(name: str) -> int:
    """Pixels of a side of a LLaVA-1.5 image."""
    return 112 if name == TINY else 336


def write_target(name: str, demo: Path, folder: Path, dtype: str) -> None:
    """Config, tokenizer and processor, without weights.

    Args:
        name: one of `NAMES`.
        demo: the demo's target, whose tokenizer and template are taken.
        folder: made.
        dtype: of the weights that it will get.
    """
    import transformers

    folder.mkdir(parents=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    if is_qwen(name):
        template = tokenizer.chat_template.replace("<image>", _QWEN_IMAGE)
        tokenizer = transformers.PreTrainedTokenizerFast(  # which knows of no other image token
            tokenizer_file=str(demo / "tokenizer.json"),
            **{f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in _ENDS},
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN_TOKENS)})
        tokenizer.chat_template = template
        transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(),
            chat_template=template,
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        for file in demo.iterdir():
            if file.suffix not in (".safetensors",) and file.name != "provenance.json":
                shutil.copyfile(file, folder / file.name)
        size = image_size(name)
        edges = {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
        for file, inside in (
            ("preprocessor_config.json", None),
            ("processor_config.json", "image_processor"),
        ):
            table = json.loads((folder / file).read_text())
            (table if inside is None else table[inside]).update(edges)
            (folder / file).write_text(json.dumps(table, indent=2) + "\n")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<image>", *_QWEN_TOKENS)}
    target_config(name, ids, dtype).save_pretrained(folder)


def draft_config(name: str, dtype: str) -> Any:
    """The config of the draft: a layer of the target's shape."""
    from vllm_msd.draft import MSDDraftConfig, TargetInfo

    shape, qwen = language_shape(name), is_qwen(name)
    architecture = "Qwen2VL" if qwen else "Llava"
    return MSDDraftConfig(
        layer_type="qwen2" if qwen else "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        num_hidden_layers=1,
        rms_norm_eps=1e-6 if qwen else 1e-5,
        rope_theta=1e6 if qwen else 1e4,
        vocab_size=shape.vocab,
        max_position_embeddings=32768 if qwen else 4096,
        attention_bias=qwen,
        input_norm=qwen,
        torch_dtype=dtype,
        target=TargetInfo(
            "../target", f"{architecture}ForConditionalGeneration", shape.hidden, shape.vocab
        ),
    )


def write_draft(name: str, folder: Path, dtype: str) -> None:
    """A draft of random weights."""
    import torch

    from vllm_msd.checkpoint import save_draft

    config = draft_config(name, dtype)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: (torch.randn(size, generator=generator) * _DRAFT_STD).to(getattr(torch, dtype))
        for key, size in config.weight_shapes().items()
    }
    save_draft(folder, config, state)


def weight_bytes(name: str, dtype: str) -> int:
    """Of target, with its vision encoder, and draft, in memory."""
    import torch
    import transformers

    ids = dict.fromkeys(("<image>", *_QWEN_TOKENS), 0)
    with torch.device("meta"):  # nothing is made
        model = transformers.AutoModelForImageTextToText.from_config(
            target_config(name, ids, dtype)
        )
    parameters = sum(p.numel() for p in model.parameters())
    parameters += sum(map(math.prod, draft_config(name, dtype).weight_shapes().values()))
    return parameters * getattr(torch, dtype).itemsize

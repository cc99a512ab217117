"""Constructed tiny pairs of target and MSD draft: random weights, yet drafts get accepted.

A random target repeats itself and a random draft is never right, so neither would test acceptance.
Here the target's head is a permutation of its embedding table: without its layers it walks round
one long cycle through the printable characters. Its layers, scaled up far enough, push it off that
walk every few tokens, by what it attends to (text and image). The draft passes the embedding
through its fusion layer and disturbs it little, so it follows the cycle: it is right most of the
time and wrong often enough. For trees there is a draft that is unsure (``decoys``): after some
tokens it finds others about as likely as the right one, which then stands second or third.

Folders are in the standard Hugging Face layout (hub key names, tokenizer, processor) and load in
vLLM and in Transformers. Sizes respect vLLM's CPU attention (head sizes 32 and 64) and tensor
parallel 2.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.common.tiny_targets import (
    FAMILIES,
    HEADS,
    HIDDEN,
    IMAGE_SIZE,
    KV_HEADS,
    MAX_POSITIONS,
    VOCAB,
    hub_name,
    printable_ids,
    target_config,
    write_processor,
)
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.draft.config import TargetInfo

KINDS = tuple(FAMILIES)
# Kinds of target that drafts in the flat layout were published for.
PUBLISHED_KINDS = ("llava", "qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class TinyPair:
    """Paths of one pair. ``draft`` is in our own format, ``published`` in the flat layout.

    ``published`` is None for a target for which no flat draft was ever published.
    """

    kind: str
    target: str
    draft: str
    published: str | None


def build_pair(
    root: Path, kind: str, seed: int = 0, decoys: int = 0, tied: bool = False
) -> TinyPair:
    """Write the pair's folders below ``root`` and return their paths.

    Args:
        root: folder to write to.
        kind: one of ``KINDS``.
        seed: of all weights.
        decoys: wrong tokens that the draft finds about as likely as the right one, after every
            second token.
        tied: the target's head is its embedding table, so that it walks on the spot where its
            layers do not push it.
    """
    torch.manual_seed(seed)
    root = Path(root)
    target, draft, published = root / "target", root / "draft", root / "published"
    embedding = torch.randn(VOCAB, HIDDEN)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        _write_target(target, kind, embedding, seed, tied)
    config = _draft_config(kind)
    state = _draft_state(config, seed + 2)
    if decoys:
        state["fc.weight"][:, :HIDDEN] += _decoys(embedding, decoys, seed + 4)
    _write(draft, config.to_dict(), state)
    if kind not in PUBLISHED_KINDS:
        return TinyPair(kind, str(target), str(draft), None)
    _write(published, _published_config(config, kind), {**state, "embed_tokens.weight": embedding})
    return TinyPair(kind, str(target), str(draft), str(published))


def image(seed: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """A picture of a few coloured blocks, ``size`` in pixels (width, height)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def picture(kind: str, seed: int) -> Image.Image:
    """A picture of one of the sizes that a kind of target is tested with."""
    sizes = FAMILIES[kind].picture_sizes
    return image(seed, sizes[seed % len(sizes)])


def prompt(kind: str, text: str, images: list[Image.Image] | None = None) -> dict:
    """A vLLM prompt; every ``{}`` in ``text`` stands for the next image."""
    images = images or []
    if text.count("{}") != len(images):
        raise ValueError(f"{text.count('{}')} places in the text, {len(images)} images")
    request = {"prompt": text.replace("{}", FAMILIES[kind].placeholder)}
    if images:
        request["multi_modal_data"] = {"image": images}
    return request


# Target ---------------------------------------------------------------------------------------


def _write_target(folder: Path, kind: str, embedding: torch.Tensor, seed: int, tied: bool) -> None:
    import transformers

    folder.mkdir(parents=True)
    tokenizer = write_processor(folder, kind)
    config = target_config(kind, tokenizer, tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, FAMILIES[kind].architecture)(config)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    _scramble(state, seed)
    state["model.language_model.embed_tokens.weight"].copy_(embedding)
    if tied:
        del state["lm_head.weight"]
    else:
        state["lm_head.weight"].copy_(_head(embedding, seed))
    save_file(
        {hub_name(kind, name): weight.contiguous() for name, weight in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _scramble(state: dict[str, torch.Tensor], seed: int) -> None:
    """Random weights of a size at which attention picks and the layers push."""
    generator = torch.Generator().manual_seed(seed + 3)
    for name, weight in state.items():
        if name.endswith("q_norm.weight"):
            weight.fill_(2.5)  # there the size of a projection has no say
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
    printable = torch.tensor(printable_ids())
    order = printable[torch.randperm(len(printable), generator=torch.Generator().manual_seed(seed))]
    head = torch.zeros_like(embedding)
    head[order.roll(-1)] = embedding[order]
    return head


# Draft ----------------------------------------------------------------------------------------


def _draft_config(kind: str) -> MSDDraftConfig:
    family = FAMILIES[kind]
    is_llama = family.draft_layer == "llama"
    return MSDDraftConfig(
        layer_type=family.draft_layer,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=family.head_dim,
        num_hidden_layers=1,
        rms_norm_eps=1e-5 if is_llama else 1e-6,
        rope_theta=1e4 if is_llama else 1e6,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_POSITIONS,
        attention_bias=not is_llama,
        input_norm=not is_llama,
        target=TargetInfo("../target", family.architecture, HIDDEN, VOCAB),
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
    printable = torch.tensor(printable_ids())
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

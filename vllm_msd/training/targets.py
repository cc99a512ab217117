"""A frozen target of any Hugging Face vision-language family, as training needs it.

All families are read alike: the model's own forward pass gives the hidden states after the final
norm, and what its language model is handed are the merged embeddings, images included. Positions
(M-RoPE among them) and the merging stay the model's own business.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_msd.errors import CheckpointError, MSDError
from vllm_msd.training.data.batches import TokenBatch
from vllm_msd.training.data.render import Renderer

# Model types that drafts can be trained for. A test trains and serves one for each.
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Language models whose drafts are Llama-type layers; others get Qwen2-type ones. So do Qwen3-VL's:
# nothing was published for them, and a draft's layer need not have the target's q/k norms.
_LLAMA_LIKE = ("llama", "mistral")


@dataclass
class Features:
    """What the target gives for a batch, right-padded.

    input_ids: int64 [B, S]. lengths: int64 [B]. answer_mask: bool [B, S].
    visual: bool [B, S], True at visual tokens. embeds: ``[B, S, H]`` inputs of the language model,
    read at visual tokens only. hidden: ``[B, S, H]`` its outputs after the final norm.
    """

    input_ids: Tensor
    lengths: Tensor
    answer_mask: Tensor
    visual: Tensor
    embeds: Tensor
    hidden: Tensor


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Tell what is wrong with a target's files in a sentence.

    They are read by Transformers, the tokenizers and safetensors, each of which has errors of its
    own for files that are missing, cut short, Git LFS pointers or something else.
    """
    try:
        yield
    except MSDError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"target {path} cannot be loaded: {reason}. Give the folder or hub name of a model, "
            "with its weights (no Git LFS pointers), tokenizer.json and processor."
        ) from error


def complete_processor(processor: Any, config: Any) -> None:
    """Fill in what a LLaVA processor's file leaves out, from the target's config, as vLLM does.

    The processor writes as many visual tokens as the model makes features, which follows from the
    vision encoder alone.
    """
    vision = getattr(config, "vision_config", None)
    patch_size, image_size = (getattr(vision, n, None) for n in ("patch_size", "image_size"))
    filled = {
        "patch_size": patch_size,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    if isinstance(patch_size, int) and isinstance(image_size, int):
        filled["num_image_tokens"] = (image_size // patch_size) ** 2
    for name, value in filled.items():
        if hasattr(processor, name) and getattr(processor, name) is None:
            setattr(processor, name, value)
    # CLIP puts a class token before its patches; a file that leaves it out says 0.
    has_class_token = getattr(vision, "model_type", None) == "clip_vision_model"
    if has_class_token and getattr(processor, "num_additional_image_tokens", None) == 0:
        processor.num_additional_image_tokens = 1


def load_renderer(path: str | Path) -> tuple[Renderer, Any]:
    """What renders a target's texts, and its config, without its weights.

    Raises:
        CheckpointError: it is not there, or of a family that training does not know.
        ConfigError: its tokenizer or chat template cannot render.
    """
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    with _loading(path):
        config = AutoConfig.from_pretrained(path)
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"target {path}: got a model of type {config.model_type!r}, expected one of "
            f"{', '.join(FAMILIES)}. Give a model in the Hugging Face form."
        )
    with _loading(path):
        processor = AutoProcessor.from_pretrained(path)
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # few targets are without one
        ends = None
    end_ids = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return Renderer(processor, config.image_token_id, end_ids - {None}, []), config


class Target:
    """A target in evaluation mode, without gradients.

    Attributes:
        model: the Hugging Face model. name: what it was loaded from.
        text: the language model's config.
        image_token_id: id of a visual token. pad_id: of padding. end_ids: that end a reply.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        """Wrap a loaded model and its processor.

        Raises:
            CheckpointError: a family that training does not know.
        """
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.config = model.config
        if self.config.model_type not in FAMILIES:
            raise CheckpointError(
                f"target {name}: got a model of type {self.config.model_type!r}, expected one of "
                f"{', '.join(FAMILIES)}."
            )
        self.text = self.config.get_text_config(decoder=True)
        self.image_token_id: int = self.config.image_token_id
        if type(self.image_token_id) is not int:
            raise CheckpointError(
                f"target {name}: config.json has no image_token_id. Give the whole target."
            )
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise CheckpointError(
                f"target {name}: got a {type(processor).__name__}, expected a processor of texts "
                "and images. Add its processor_config.json or preprocessor_config.json."
            )
        ends = model.generation_config.eos_token_id
        self.end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.end_ids.discard(None)
        if not self.end_ids:
            raise CheckpointError(
                f"target {name}: no token ends a reply. Its tokenizer_config.json names an "
                "eos_token, or its generation_config.json an eos_token_id."
            )
        self.pad_id: int = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = min(self.end_ids)
        self._embeds: Tensor | None = None
        self.model.model.language_model.register_forward_pre_hook(self._keep, with_kwargs=True)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "auto",
        attention: str = "sdpa",
        device: torch.device | str = "cpu",
    ) -> "Target":
        """Load a target and its processor.

        Raises:
            CheckpointError: it is not there, or of a family that training does not know.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

        with _loading(path):
            model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        # Before Transformers looks for it: it knows other families, and not all that there are.
        if model_type not in FAMILIES:
            raise CheckpointError(
                f"target {path}: got a model of type {model_type!r}, expected one of "
                f"{', '.join(FAMILIES)}. Give a model in the Hugging Face form."
            )
        with _loading(path):
            processor = AutoProcessor.from_pretrained(path)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attention,
                output_loading_info=True,
            )
        model, about = loaded
        if missing := sorted(about["missing_keys"]):
            raise CheckpointError(
                f"target {path}: weights are missing: {', '.join(missing[:5])}"
                f"{' and others' if len(missing) > 5 else ''}. Fetch it again."
            )
        complete_processor(processor, model.config)
        return cls(model.to(device), processor, str(path))

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def layer_type(self) -> str:
        """The type of decoder layer that suits a draft for this target."""
        return "llama" if self.text.model_type in _LLAMA_LIKE else "qwen2"

    @property
    def head(self) -> Tensor:
        """Weight of the head, ``[V, H]``."""
        return self.model.get_output_embeddings().weight

    @property
    def last_layer(self) -> torch.nn.Module:
        """The language model's last decoder layer."""
        return self.model.model.language_model.layers[-1]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of text tokens, ``[...]`` to ``[..., H]``."""
        return self.model.get_input_embeddings()(token_ids)

    def renderer(self, roots: list[Path], max_length: int) -> Renderer:
        """Renders records as this target reads them."""
        video = getattr(self.config, "video_token_id", None)
        return Renderer(
            self.processor,
            self.image_token_id,
            self.end_ids,
            roots,
            max_length,
            () if video is None else (video,),
        )

    @torch.no_grad()
    def features(self, batch: TokenBatch) -> Features:
        """Run the target over a right-padded batch on its own device."""
        self._forget_positions()
        with self._reading():
            out = self.model.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **self._typed(batch.extras),
            )
        embeds, self._embeds = self._embeds, None
        if embeds is None:
            raise RuntimeError("the target's language model ran without inputs_embeds")
        return Features(
            batch.input_ids,
            batch.lengths,
            batch.answer_mask,
            batch.input_ids == self.image_token_id,
            embeds,
            out.last_hidden_state,
        )

    @torch.no_grad()
    def generate(self, batch: TokenBatch, max_tokens: int, beyond: int = 0) -> list[list[int]]:
        """Greedy replies to a left-padded batch of prompts.

        Args:
            batch: prompts on the target's device.
            max_tokens: of a reply, its end-of-turn token included.
            beyond: tokens to go on for after a reply's end, as if it had not ended.

        Returns:
            Token ids of each reply, with up to ``beyond`` tokens after its end.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList

        self._forget_positions()
        width = batch.input_ids.shape[1]
        ends = torch.tensor(sorted(self.end_ids), device=batch.input_ids.device)

        class AfterEnd(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                replies = input_ids[:, width : input_ids.shape[1] - beyond]
                return torch.isin(replies, ends).any(1)

        with self._reading():
            out = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                **self._typed(batch.extras),
                max_new_tokens=max_tokens + beyond,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                # The criterion ends replies; an end-of-turn token itself must not.
                eos_token_id=[self.text.vocab_size],
                pad_token_id=self.pad_id,
                stopping_criteria=StoppingCriteriaList([AfterEnd()]),
            )[:, width:]
        self._embeds = None
        replies = []
        for reply in out.tolist():
            end = next((i for i, t in enumerate(reply) if t in self.end_ids), max_tokens - 1)
            replies.append(reply[: min(end, max_tokens - 1) + 1 + beyond])
        return replies

    def identity(self) -> dict[str, Any]:
        """What tells this target from another: its config, and sizes of its weight files."""
        folder = Path(self.name)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return {
            "name": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "config": json.loads(self.config.to_json_string(use_diff=True)),
            "weights": {file.name: file.stat().st_size for file in files},
        }

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Tell in a sentence that processor and model do not belong together."""
        try:
            yield
        except ValueError as error:
            if "do not match" not in str(error):
                raise
            raise CheckpointError(
                f"target {self.name}: its processor writes other numbers of visual tokens than its "
                f"model makes features ({error}). Check that processor_config.json, "
                "preprocessor_config.json and config.json are those of one model."
            ) from error

    def _keep(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._embeds = kwargs["inputs_embeds"]

    def _typed(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pixels in the model's dtype."""
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in extras.items()
        }

    def _forget_positions(self) -> None:
        """Qwen models keep the last batch's M-RoPE offsets and would use them for a text batch."""
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None

"""Conversations as the target reads them: its own chat template, tokenizer and image processor."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_msd.errors import ConfigError
from vllm_msd.training.data.images import load_image
from vllm_msd.training.data.records import BadRecordError, Record

# Bytes of a tensor that is copied to another process, see `Rendered`.
_LARGEST_COPIED = 1 << 18
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Rendered:
    """One conversation, ready for the target.

    input_ids: int64 [S], each image's placeholder expanded to its visual tokens.
    answer_mask: bool [S], True at reply tokens, the end-of-turn token included.
    extras: the processor's other tensors: per token ``[1, S]``, or per image.
    """

    input_ids: Tensor
    answer_mask: Tensor
    extras: dict[str, Tensor]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, small tensors as arrays.

        PyTorch hands over every tensor in an open file of its own: slow for small ones, and those
        of a few steps are more files than a process may have.
        """
        extras = {name: _passed(value) for name, value in self.extras.items()}
        return {"input_ids": _passed(self.input_ids), "answer_mask": _passed(self.answer_mask),
                "extras": extras}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.input_ids, self.answer_mask = map(_taken, (state["input_ids"], state["answer_mask"]))
        self.extras = {name: _taken(value) for name, value in state["extras"].items()}


def _passed(value: Tensor) -> Tensor | np.ndarray:
    return value if value.nbytes > _LARGEST_COPIED else value.numpy()


def _taken(value: Tensor | np.ndarray) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)


class Renderer:
    """Renders records with a target's processor.

    Args:
        processor: the target's, with a chat template and a fast tokenizer.
        image_token_id: id of the visual tokens.
        end_ids: ids that end a reply.
        image_roots: folders that relative image paths are looked for in, in order.
        max_length: longest rendering, in tokens; turns that go beyond it are left out.
        forbidden_ids: ids that no text may hold (video placeholders).

    Raises:
        ConfigError: the processor has no chat template or no fast tokenizer.
    """

    def __init__(
        self,
        processor: Any,
        image_token_id: int,
        end_ids: set[int],
        image_roots: list[Path],
        max_length: int = 2048,
        forbidden_ids: tuple[int, ...] = (),
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        self.end_ids = end_ids
        self.image_roots = image_roots
        self.max_length = max_length
        self.forbidden_ids = set(forbidden_ids)
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "the target's tokenizer is not a fast one (tokenizer.json), which finding the "
                "replies needs. Convert it with transformers' AutoTokenizer and save it."
            )
        template: str | None = getattr(processor, "chat_template", None)
        if not template:
            raise ConfigError(
                "the target's processor has no chat template, which training data is rendered "
                "with. Add a chat_template.jinja to the target's folder."
            )
        self.template = template

    def render(self, record: Record) -> Rendered:
        """Render a conversation; whole turns are dropped from its end while it is too long.

        Raises:
            BadRecordError: an image is missing or corrupt, the template does not fit, or nothing of
                a reply is within ``max_length``.
        """
        images = self._load_images(record)
        messages = list(record.messages)
        while True:
            text = self._text(messages)
            used = images[: sum(p["type"] == "image" for m in messages for p in m["content"])]
            inputs = self._process(text, used)
            ids = inputs.pop("input_ids")[0]
            first_exchange = 3 if messages[0]["role"] == "system" else 2
            if len(ids) <= self.max_length or len(messages) <= first_exchange:
                break
            messages = messages[:-2]
        mask = self._expand(*self._replies(messages, text), ids)
        cut = self.max_length
        if len(ids) > cut:
            if (ids[cut:] == self.image_token_id).any():
                raise BadRecordError(f"its images need more than max_length ({cut}) tokens")
            inputs = {k: v[:, :cut] if _is_per_token(v, ids) else v for k, v in inputs.items()}
            ids, mask = ids[:cut], mask[:cut]
        if not mask.any():
            raise BadRecordError(f"no reply within max_length ({cut}) tokens")
        inputs.pop("attention_mask", None)
        return Rendered(ids, mask, inputs)

    def reply_ids(self, record: Record) -> Tensor:
        """The tokens of all replies, int64 ``[N]``, as `render` marks them; no image is read.

        Raises:
            BadRecordError: the template does not fit.
        """
        ids, marked = self._replies(record.messages, self._text(record.messages))
        return ids[marked]

    def prompt(self, record: Record) -> Rendered:
        """Everything before the last reply (see `ask`)."""
        return self.ask(record.messages[:-1], self._load_images(record))

    def ask(self, messages: list[dict], images: list[Image.Image]) -> Rendered:
        """Chat messages with the generation prompt, to be answered; ``answer_mask`` is all False.

        Raises:
            BadRecordError: the template does not fit, or more than ``max_length`` tokens.
        """
        text = self._text(messages, add_generation_prompt=True)
        inputs = self._process(text, images)
        ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        if len(ids) > self.max_length:
            raise BadRecordError(f"its prompt is longer than max_length ({self.max_length}) tokens")
        return Rendered(ids, torch.zeros(len(ids), dtype=torch.bool), inputs)

    def _load_images(self, record: Record) -> list[Image.Image]:
        return [load_image(name, self.image_roots) for name in record.images]

    def _text(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        # A template is a program of its own: it can refuse a talk, or stumble over it, in any way.
        except Exception as error:
            raise BadRecordError(f"the chat template refused it: {_said(error)}") from error

    def _options(self, text: str) -> dict[str, Any]:
        """A template that writes the first token itself must not get it twice."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, Tensor]:
        typed = self._tokens(text)[0]
        places = int((typed == self.image_token_id).sum())
        if places != len(images) or self.forbidden_ids & set(typed.tolist()):
            raise BadRecordError("its text holds the target's own placeholder")
        try:
            # Flat, as vLLM hands them over: nested, LLaVA-OneVision's would not cut several images
            # of one talk into crops.
            found = self.processor(
                images=images or None,
                text=[text],
                return_tensors="pt",
                **self._options(text),
            )
        # Processors refuse odd images each in their own way.
        except Exception as error:
            raise BadRecordError(f"the processor refused it: {_said(error)}") from error
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _tokens(self, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
        """Ids of the text with placeholders as they stand, and where each token lies in it."""
        found = self.tokenizer(text, return_offsets_mapping=True, **self._options(text))
        return torch.tensor(found["input_ids"]), found["offset_mapping"]

    def _replies(self, messages: list[dict], text: str) -> tuple[Tensor, Tensor]:
        """Ids of a rendered talk with placeholders as they stand, and which belong to replies."""
        plain, offsets = self._tokens(text)
        marked = torch.zeros(len(plain), dtype=torch.bool)
        for start, end in self._reply_spans(messages, text):
            self._mark(plain, offsets, start, end, marked)
        return plain, marked

    def _reply_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """Where the replies lie in the text: what comes after the generation prompt.

        Each reply is found by rendering the talk up to it. Templates that write earlier turns
        differently in a longer talk are left to their own generation markers.
        """
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], add_generation_prompt=True)
            after = self._text(messages[: number + 1])
            if not text.startswith(before) or not after.startswith(before):
                return self._marked_spans(messages, text)
            end = len(after)
            # The end of a reply may be written differently when another turn follows; one that was
            # cut has none of the target's.
            if message.get("cut") or not text.startswith(after):
                end = text.find(_reply(message), len(before))
                if end < 0:
                    return self._marked_spans(messages, text)
                end += len(_reply(message))
            spans.append((len(before), end))
        return spans

    def _marked_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not _GENERATION.search(self.template):
            raise BadRecordError(
                "the replies cannot be found in the target's chat template: it rewrites earlier "
                "turns and has no {% generation %} markers"
            )
        try:
            found: Any = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:  # as in `_text`
            raise BadRecordError(f"the chat template refused it: {_said(error)}") from error
        rendered, spans = found
        if rendered[0] != text:
            raise BadRecordError("the chat template gives another text with generation markers")
        return [(start, end) for start, end in spans[0]]

    def _mark(
        self, ids: Tensor, offsets: list[tuple[int, int]], start: int, end: int, mask: Tensor
    ) -> None:
        """Mark one reply's tokens, up to its end-of-turn token; what follows is the template's."""
        for index, (first, last) in enumerate(offsets):
            if first >= start and last <= end and last > first:
                mask[index] = True
                if int(ids[index]) in self.end_ids:
                    return

    def _expand(self, plain: Tensor, marked: Tensor, ids: Tensor) -> Tensor:
        """Carry the marks over to the processor's ids, in which images take many tokens."""
        plain_runs, plain_first = self._runs(plain)
        runs, first = self._runs(ids)
        if not torch.equal(plain_runs, runs):
            raise BadRecordError("the processor's tokens are not those of its tokenizer")
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[first] = marked[plain_first]
        return mask & (ids != self.image_token_id)

    def _runs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids with each run of visual tokens taken as one, and where each of them starts."""
        visual = ids == self.image_token_id
        goes_on = visual.clone()
        goes_on[1:] &= visual[:-1]
        goes_on[0] = False
        first = (~goes_on).nonzero().flatten()
        return ids[first], first


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _reply(message: dict) -> str:
    return "".join(part["text"] for part in message["content"]).strip()


def _is_per_token(value: Tensor, ids: Tensor) -> bool:
    return value.dim() == 2 and value.shape == (1, len(ids))

"""The demo pair's tokenizer and processor, trained on the world's own text."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from .world import KINDS, sample
from .world.base import IMAGE_SIZE
from .world.signs import NUMBERS, WORDS

VOCAB_SIZE = 2048
PATCH_SIZE = 14
PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"

# LLaVA-1.5's form. No token is put in front, so that chat requests and plain prompts agree.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] == 'system' %}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def world_text(per_kind: int) -> Iterator[str]:
    """Training text: rendered train conversations of all kinds."""
    for kind in KINDS:
        for seed in range(per_kind):
            text = "".join(render_parts(sample(kind, seed, "train").messages))
            yield text.replace(IMAGE, "").replace(EOS, " ")
    yield " ".join(WORDS) + " " + " ".join(w.lower() for w in WORDS) + " " + " ".join(NUMBERS)


def render_parts(messages: list[dict]) -> list[str]:
    """Text pieces by turn, user and assistant alternating; they concatenate to the template's."""
    pieces = []
    for message in messages:
        text = "".join(p["text"] for p in message["content"] if p["type"] == "text")
        if message["role"] == "user":
            images = "".join("<image>\n" for p in message["content"] if p["type"] == "image")
            pieces.append(f"USER: {images}{text} ASSISTANT:")
        else:
            pieces.append(f" {text}{EOS}")
    return pieces


def train_tokenizer(per_kind: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCAB_SIZE entries (the closed vocabulary may need fewer)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, UNK, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(world_text(per_kind), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor for images of IMAGE_SIZE squared (64 visual tokens)."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(processor: LlavaProcessor, path: Path) -> None:
    """Write tokenizer, image processor and chat template into a checkpoint folder."""
    processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(path)
    processor.image_processor.save_pretrained(path)

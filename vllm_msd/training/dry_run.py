"""What a run would take, told from configs and data files alone: no weights are loaded.

Memory and operations are arithmetic on shapes, lengths are guessed from the size of records, and
the time is that of the matrix products at the speed measured here. A run takes longer than that.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from vllm_msd.errors import CheckpointError
from vllm_msd.training.data.batches import Corpus
from vllm_msd.training.data.index import RecordFile
from vllm_msd.training.data.plan import share_of_multimodal
from vllm_msd.training.losses import CHUNK_LOGITS
from vllm_msd.training.settings import TrainSettings
from vllm_msd.training.targets import FAMILIES

# Of a record's JSON; images are counted by the index as so many bytes of text.
BYTES_PER_TOKEN = 4.0
# Weights, gradients and AdamW's two moments, all float32.
TRAINED_BYTES = 16
_LOGIT_BUFFERS = 5
# Float32 numbers kept for the way back, per row and drafting step, in parts of the widths.
_KEPT_HIDDEN, _KEPT_WIDE = 14, 4


@dataclass(frozen=True)
class Shapes:
    """Parameters of target and draft, and the widths that the arithmetic needs."""

    target: int
    draft: int
    hidden: int
    intermediate: int
    vocabulary: int
    target_bytes: int


def estimate(settings: TrainSettings) -> dict[str, Any]:
    """Figures of a run before it starts.

    Raises:
        CheckpointError: the target has no config, or is of an unknown family.
        DataError: a data file cannot be read.
    """
    shapes = _shapes(settings)
    corpus = _corpus(settings)
    text, multimodal = corpus.num_training
    records = text + multimodal
    steps = settings.steps or max(1, round(settings.epochs * records / settings.batch_size))
    share = share_of_multimodal(
        settings.curriculum, steps, settings.curriculum_epochs, settings.curriculum_share,
        settings.visual_share,
    )  # fmt: skip
    of_steps = [share(step) for step in range(steps)]
    mean_share = sum(of_steps) / steps
    lengths = [float(w.mean()) / BYTES_PER_TOKEN if len(w) else 0.0 for w in corpus.weights()]
    length = min(settings.max_length, (1 - mean_share) * lengths[0] + mean_share * lengths[1])
    drawn = steps * settings.batch_size
    micro = settings.micro_batch_size or settings.batch_size
    kept = _KEPT_HIDDEN * shapes.hidden + _KEPT_WIDE * shapes.intermediate
    logits = min(CHUNK_LOGITS, int(micro * length * shapes.vocabulary))
    memory = {
        "target": shapes.target_bytes,
        "draft and optimizer": TRAINED_BYTES * shapes.draft,
        "head": 2 * shapes.hidden * shapes.vocabulary * (settings.precision == "bf16"),
        "logits": 4 * _LOGIT_BUFFERS * logits,
        "activations": int(4 * micro * length * settings.draft_steps * kept),
    }
    tokens = drawn * length
    head = shapes.hidden * shapes.vocabulary
    operations = tokens * (
        2 * shapes.target + settings.draft_steps * (6 * shapes.draft + 4 * head) + 2 * head
    )
    return {
        "steps": steps,
        "records": {"text": text, "multimodal": multimodal, "held out": len(corpus.held_out())},
        "drawn": {
            "text": round(drawn * (1 - mean_share)), "multimodal": round(drawn * mean_share),
        },
        "share": {"start": of_steps[0], "mean": mean_share, "end": of_steps[-1]},
        "tokens_per_record": round(length),
        "tokens": round(tokens),
        "memory": {**memory, "in all": sum(memory.values())},
        "operations": operations,
    }  # fmt: skip


def matrix_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of a matrix product, measured for a moment."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.3:
        (a @ a).sum().item()
        count += 1
    return count * 2 * size**3 / seconds


def describe(settings: TrainSettings, found: dict[str, Any], speed: float) -> str:
    """The figures as lines of text; `speed` in operations per second."""
    records, drawn, share = found["records"], found["drawn"], found["share"]
    seconds = found["operations"] / speed
    lines = [
        f"steps        {found['steps']} of {settings.batch_size} records, "
        f"{settings.draft_steps} drafting step(s), loss {settings.loss}",
        f"records      {records['text']} text, {records['multimodal']} multimodal, "
        f"{records['held out']} more held out",
        f"drawn        {drawn['text']} text, {drawn['multimodal']} multimodal; multimodal share "
        f"{share['start']:.0%} at the start, {share['end']:.0%} at the end",
        f"tokens       about {found['tokens_per_record']} a record, {found['tokens']:,} in all",
        "memory       "
        + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in found["memory"].items()),
        f"time         {_span(seconds)} at least: {found['operations']:.2e} operations at the "
        f"{speed / 1e9:.0f} GFLOP/s measured here",
    ]
    return "\n".join(lines)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _shapes(settings: TrainSettings) -> Shapes:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(settings.target)
    # Transformers stumbles over what is no config in ways of its own.
    except Exception as error:
        raise CheckpointError(
            f"target {settings.target}: its config.json cannot be read: {error}. Give the folder "
            "or hub name of a model."
        ) from error
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"target {settings.target}: got a model of type {config.model_type!r}, expected one "
            f"of {', '.join(FAMILIES)}."
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text = config.get_text_config(decoder=True)
    dtype = settings.target_dtype
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.language_model.layers[-1].parameters())
    return Shapes(
        target=parameters,
        draft=settings.layers * layer + 2 * text.hidden_size**2,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        target_bytes=parameters * (4 if dtype == "float32" else 2),
    )


def _corpus(settings: TrainSettings) -> Corpus:
    text = [RecordFile(path, with_images=False) for path in settings.text_data]
    multimodal = [RecordFile(path) for path in settings.multimodal_data]
    return Corpus(text, multimodal, settings.eval_records, settings.seed)

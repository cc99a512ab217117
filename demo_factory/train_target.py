"""Train the demo target from scratch on the procedural world (bf16 autocast).

    python -m demo_factory.train_target --output build/target --minutes 55

Two stages share one clock: first the vision tower alone learns to read slots (see `slots`), then
everything learns to answer, with slot reading as a small side loss. The learning rate follows the
clock, so a slower machine trains less rather than longer. A killed run resumes from its last
checkpoint.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vllm_msd.errors import CheckpointError, ConfigError

from . import parallel
from .data import MIX, VISION_MIX, Batch, TrainingStream, pixels
from .records import write_record
from .slots import SlotReader
from .target_model import build_target, export_target
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class TargetTraining:
    """Settings of one run.

    minutes: wall-clock budget over all resumed parts; vision_share: its part for the first stage.
    batch_size: sequences a step in each of the `processes`.
    cap: most text tokens in a training sequence.
    vision_rate: the tower's share of the learning rate in the second stage, where the untrained
        language model's first gradients would spoil what it has learned.
    compile: fuse the layers' operators with torch.compile (needs a C++ compiler), half as fast
        again on a CPU after a minute of compiling.
    workers: of a single process, others that draw pictures and words; 0 does it between the steps.
    """

    output: str
    minutes: float = 58.0
    vision_share: float = 0.12
    processes: int = 2
    batch_size: int = 8
    cap: int = 144
    learning_rate: float = 1.2e-3
    vision_rate: float = 0.4
    weight_decay: float = 0.05
    warmup_steps: int = 150
    slot_weight: float = 0.3
    checkpoint_minutes: float = 8.0
    seed: int = 1
    max_steps: int = 0
    compile: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers and self.processes > 1:
            raise ConfigError(
                f"workers: got {self.workers} and {self.processes} processes. Only one process can "
                "have workers: give --processes 1, or --workers 0."
            )


def schedule(progress: float, step: int, warmup_steps: int) -> float:
    """Learning-rate factor: linear warm-up by steps, then cosine to 2% by the clock."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / warmup_steps) * cosine


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses [N] on answer positions, and the batch row of each [N].

    The head runs on answer positions only. Padding is on the right, so causal attention alone
    keeps it out of every answer.
    """
    hidden = model.model(
        input_ids=batch.input_ids,
        pixel_values=images if len(images) else None,
        use_cache=False,
    ).last_hidden_state
    predicts = batch.loss_mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicts])
    losses = F.cross_entropy(logits.float(), batch.input_ids[:, 1:][predicts], reduction="none")
    return losses, predicts.nonzero()[:, 0]


def loss_figures(losses: torch.Tensor, rows: torch.Tensor, kinds: list[str]) -> dict[str, float]:
    """Means of token losses [N], over all and by kind of their rows [N]; for the log."""
    figures = {"loss": losses.mean().item()}
    for kind in sorted({kinds[row] for row in rows.unique().tolist()}):
        of_kind = torch.tensor([k == kind for k in kinds], device=rows.device)[rows]
        figures[f"loss.{kind}"] = losses[of_kind].mean().item()
    return figures


def prepare_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, trained on first use."""
    saved = folder / "tokenizer"
    if not saved.exists():
        train_tokenizer().save_pretrained(saved)
    return PreTrainedTokenizerFast.from_pretrained(saved)


class TargetTrainer:
    """Holds the state of a run; `run` goes on until the budget is spent."""

    what = "target"

    def __init__(self, settings: TargetTraining) -> None:
        self.settings = settings
        self.folder = Path(settings.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.model = self.start()
        self.model.to(self.device)
        # Plain attention is faster than the fused kernel on CPU at these lengths, mostly backward.
        self.model.set_attn_implementation("eager" if self.device.type == "cpu" else "sdpa")
        if settings.compile:
            for layers in (
                self.model.model.vision_tower.encoder.layers,
                self.model.model.language_model.layers,
            ):
                for layer in layers:
                    layer.compile(dynamic=True)
        self.reader = SlotReader(self.model.config.vision_config.hidden_size).to(self.device)
        self.model.model.vision_tower.register_forward_hook(self._keep_features)
        self.features = torch.empty(0)
        tower = list(self.model.model.vision_tower.parameters())
        seen = [*tower, *self.reader.parameters()]
        in_tower = {id(p) for p in tower}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in in_tower]
        groups = [
            {
                "params": [p for p in members if (p.ndim >= 2) == decays],
                "weight_decay": settings.weight_decay if decays else 0.0,
                "is_tower": members is tower,
            }
            for members in (tower, [*self.reader.parameters(), *rest])
            for decays in (True, False)
        ]
        self.stage_parameters = {"vision": seen, "answers": [*seen, *rest]}
        self.optimizer = torch.optim.AdamW(
            groups,
            settings.learning_rate,
            (0.9, 0.95),
            fused=True,
        )
        self.step = 0
        self.stage_step = 0
        self.stage = "vision"
        self.elapsed = 0.0
        self._resume()

    # What another target has its own way of doing.

    @property
    def export_folder(self) -> Path:
        """Where `export` writes."""
        return self.folder / "model"

    def start(self) -> tuple[PreTrainedTokenizerFast, LlavaForConditionalGeneration]:
        """The tokenizer, and the model that training starts with."""
        tokenizer = prepare_tokenizer(self.folder)
        return tokenizer, build_target(tokenizer, self.settings.seed)

    def stream(self, stage: str) -> TrainingStream:
        """The batches of a stage; a resumed run goes on with contents that no part has used."""
        s = self.settings
        seed = (s.seed, stage, parallel.rank())
        mix = VISION_MIX if stage == "vision" else MIX
        return TrainingStream(self.tokenizer, seed, s.batch_size, s.cap, self.step, mix)

    def answers_loss(
        self, batch: Batch, images: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What the second stage learns by, and figures for the log."""
        losses, rows = answer_loss(self.model, batch, images)
        return losses.mean(), loss_figures(losses, rows, batch.kinds)

    def export(self) -> None:
        """Write the checkpoint folder."""
        export_target(self.model, self.tokenizer, self.export_folder)

    def stage_ended(self) -> None:
        """Called at the end of each stage of a run."""

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, self.device, weights_only=True)
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if trained != saved["model"].keys():
            raise CheckpointError(
                f"{path} is of another model: its weights have other names. Delete it, or give "
                "another --output."
            )
        self.model.load_state_dict(saved["model"], strict=False)
        self.reader.load_state_dict(saved["reader"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.elapsed = saved["step"], saved["elapsed"]
        self.stage, self.stage_step = saved["stage"], saved["stage_step"]
        print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} min", flush=True)

    def save(self) -> None:
        """Write the resumable state and a loadable checkpoint folder."""
        state = {
            "model": {n: p for n, p in self.model.named_parameters() if p.requires_grad},
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "stage": self.stage,
            "stage_step": self.stage_step,
        }
        partial = self.folder / "checkpoint.tmp"
        torch.save(state, partial)
        partial.replace(self.folder / "checkpoint.pt")
        self.export()

    def _keep_features(self, module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        """Forward hook of the vision tower: patch features as the projector sees them."""
        self.features = output.last_hidden_state[:, 1:]

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        figures: dict[str, float] = {}
        images = pixels(batch.images) if len(batch.images) else batch.images
        loss = torch.zeros((), device=self.device)
        if self.stage == "answers":
            loss, figures = self.answers_loss(batch, images)
        elif len(images):
            self.model.model.vision_tower(images)
        if len(images):
            slot_loss, accuracy = self.reader(self.features, batch.labels)
            weight = 1.0 if self.stage == "vision" else self.settings.slot_weight
            loss = loss + weight * slot_loss
            figures["slots"] = slot_loss.item()
            figures |= {f"slot.{part}": value for part, value in accuracy.items()}
        return loss, figures

    def _set_rate(self) -> None:
        """Each stage has its own warm-up and cosine."""
        share = self.settings.vision_share
        progress = self.elapsed / 60 / self.settings.minutes
        if self.stage == "vision" and progress >= share:
            self.stage_ended()
            self.stage, self.stage_step = "answers", 0
        if self.stage == "vision":
            # The tower goes on learning, so its first stage ends at half rate, not at none.
            within = 0.5 * progress / share
        else:
            within = (progress - share) / (1 - share)
        factor = schedule(within, self.stage_step, self.settings.warmup_steps)
        for group in self.optimizer.param_groups:
            slow = group["is_tower"] and self.stage == "answers"
            share = self.settings.vision_rate if slow else 1.0
            group["lr"] = self.settings.learning_rate * factor * share

    def _spent(self) -> bool:
        """Whether the budget is used up; of a finished run it is before the first step."""
        settings = self.settings
        return self.elapsed >= settings.minutes * 60 or (0 < settings.max_steps <= self.step)

    def _batches(self, stage: str) -> Iterator[Batch]:
        """Drawn in this process, or ahead of it in others, from the first batch asked for."""
        workers = self.settings.workers
        stream = self.stream(stage)
        if workers:
            stream = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4)
        yield from stream

    def run(self) -> None:
        """Train until the budget (or `max_steps`) is spent, then save and write provenance."""
        settings = self.settings
        streams = {stage: self._batches(stage) for stage in self.stage_parameters}
        first = parallel.rank() == 0
        log = (self.folder / "log.jsonl").open("a") if first else None
        bar = tqdm(
            total=round(settings.minutes * 60),
            unit="s",
            mininterval=10,
            initial=round(self.elapsed),
            disable=not first,
        )
        sums: dict[str, list[float]] = defaultdict(list)
        tokens, last, last_save = 0, time.monotonic(), self.elapsed
        window = last
        self.model.train()
        while not self._spent():
            self._set_rate()
            batch = next(streams[self.stage]).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, figures = self._losses(batch)
            if loss.requires_grad:
                loss.backward()
            active = self.stage_parameters[self.stage]
            parallel.average_gradients(active)
            torch.nn.utils.clip_grad_norm_(active, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.stage_step += 1
            for name, value in figures.items():
                sums[name].append(value)
            tokens += batch.input_ids.numel()
            now = time.monotonic()
            self.elapsed = parallel.from_first(self.elapsed + now - last)
            bar.update(round(self.elapsed) - bar.n)
            last = now
            if first and self.step % 50 == 0:
                means = {k: round(sum(v) / len(v), 4) for k, v in sums.items()}
                rate = tokens * parallel.size() / (now - window)
                row = {
                    "step": self.step,
                    "stage": self.stage,
                    "minutes": self.elapsed / 60,
                    "tokens_per_second": round(rate),
                    **means,
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix_str(
                    f"step {self.step} {rate:.0f} tok/s "
                    f"loss {means.get('loss', 0):.3f} slots "
                    f"{means.get('slots', 0):.2f}"
                )
                sums.clear()
                tokens, window = 0, now
            if self._spent() or self.elapsed - last_save > settings.checkpoint_minutes * 60:
                last_save = self.elapsed
                if first:
                    self.save()
        self.stage_ended()
        if first:
            write_record(
                self.export_folder,
                self.what,
                asdict(settings),
                {"steps": self.step, "minutes": round(self.elapsed / 60, 1)},
            )


def train(settings: TargetTraining) -> None:
    """One process's part of a run."""
    TargetTrainer(settings).run()


def add_flags(parser: argparse.ArgumentParser, settings: type, *required: str) -> None:
    """Make every field of a dataclass of settings a flag."""
    for field in fields(settings):
        kind: dict[str, Any] = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, default=field.default, required=field.name in required, **kind)


def main() -> None:
    """Command line: every field of `TargetTraining` is a flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flags(parser, TargetTraining, "output")
    settings = TargetTraining(**vars(parser.parse_args()))
    prepare_tokenizer(Path(settings.output))
    parallel.launch(train, (settings,), settings.processes, Path(settings.output))


if __name__ == "__main__":
    main()

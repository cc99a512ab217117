"""Teach a real language model to see: a vision tower from nothing, then a little of the model.

    python -m demo_factory.real.train_target --talks build/real/own/own.json \\
        --output build/real/target

Two stages share one clock. First the tower alone learns to read slots (see `demo_factory.slots`);
then tower, projector and a low-rank change of SmolLM2-135M learn to answer about pictures. The
projector's rows are drawn to the words they show, and on talks of its own the model is held to
what it said before. A killed run goes on. What ships is written to ``pictures/``.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vllm_msd.demo.real.pair import real_target
from vllm_msd.demo.real.target import DELTA, WEIGHTS, projector
from vllm_msd.storage import write_json

from .. import parallel
from ..data import Batch, TrainingStream, collate, pixels
from ..target_model import grid_positions, published_names
from ..tokenizer import PATCH_SIZE
from ..train_target import TargetTrainer, TargetTraining, add_flags, loss_figures
from ..world import sample
from ..world.base import IMAGE_SIZE, Sample
from . import pictures
from .anchor import Anchor
from .low_rank import Unchanged, tune
from .pictures import TALK, VISION_MIX, Contents, easy_questions, easy_test, render_parts

SLOT_KINDS = ("vqa", "textvqa", "chart", "reasoning")
HELD_OUT_SEED = 20_000


@dataclass(frozen=True)
class RealTraining(TargetTraining):
    """Settings of a run (see `TargetTraining` for the others).

    talks: conversations with the language model's own replies.
    vision_batch_size: pictures in a step of the first stage.
    rank, scale: of the low-rank change.
    anchor_weight: of drawing visual rows to words. talk_weight: of holding the model to its words.
    held_out: contents of each kind whose slots are read at the end of a stage.
    """

    talks: str = ""
    vision_batch_size: int = 32
    minutes: float = 200.0
    vision_share: float = 0.5
    processes: int = 1
    cap: int = 256
    learning_rate: float = 8e-4
    weight_decay: float = 0.02
    rank: int = 12
    scale: float = 2.0
    anchor_weight: float = 0.2
    talk_weight: float = 2.0
    held_out: int = 300


def tower_config() -> CLIPVisionConfig:
    """About 5M parameters."""
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=256,
    )


class RealTrainer(TargetTrainer):
    """Trains the tower, then tower, projector and change together."""

    what = "pictures for SmolLM2-135M"
    settings: RealTraining

    def start(self) -> tuple[PreTrainedTokenizerFast, LlavaForConditionalGeneration]:
        """SmolLM2-135M behind a fresh tower and projector."""
        easy_questions("train")  # fetched before other processes look for them
        base = real_target(print, tuned=None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        old = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(self.settings.seed)  # alike in all processes from here on
        config = LlavaConfig.from_pretrained(base)
        config.vision_config = tower_config()
        model = LlavaForConditionalGeneration(config).float()
        model.model.language_model.load_state_dict(old.model.language_model.state_dict())
        model.tie_weights()
        table = model.model.vision_tower.embeddings.position_embedding.weight
        embeddings = model.get_input_embeddings().weight
        fresh = projector(config, embeddings)
        prefix = "multi_modal_projector."
        with torch.no_grad():
            table[1:] += grid_positions(table.shape[1])
        model.model.multi_modal_projector.load_state_dict(
            {name.removeprefix(prefix): one for name, one in fresh.items()}
        )
        self.changes = tune(model.model.language_model, self.settings.rank, self.settings.scale)
        self.anchor = Anchor(embeddings, tokenizer).to(self.device)
        model.model.multi_modal_projector.register_forward_hook(self._keep_rows)
        self.rows = torch.empty(0)
        return tokenizer, model

    def _keep_rows(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.rows = output

    def stream(self, stage: str) -> TrainingStream:
        """Pictures first, then all the kinds."""
        s = self.settings
        seed = (s.seed, stage, parallel.rank())
        if stage == "vision":
            size, draw, mix = s.vision_batch_size, Contents(turns=1), VISION_MIX
        else:
            size, draw, mix = s.batch_size, Contents(Path(s.talks)), pictures.MIX
        return TrainingStream(
            self.tokenizer, seed, size, s.cap, self.step, mix, draw, render_parts, pool=4
        )

    def answers_loss(
        self, batch: Batch, images: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of answers, distance of talks to the unchanged model, anchoring."""
        s = self.settings
        model = self.model
        own = torch.tensor([kind == TALK for kind in batch.kinds], device=self.device)
        hidden = model.model(
            input_ids=batch.input_ids,
            pixel_values=images if len(images) else None,
            use_cache=False,
        ).last_hidden_state[:, :-1]
        predicts = batch.loss_mask[:, 1:]
        loss = torch.zeros((), device=self.device)
        figures: dict[str, float] = {}
        answers = predicts & ~own[:, None]
        if bool(answers.any()):
            logits = model.lm_head(hidden[answers]).float()
            losses = F.cross_entropy(logits, batch.input_ids[:, 1:][answers], reduction="none")
            loss = loss + losses.mean()
            figures = loss_figures(losses, answers.nonzero()[:, 0], batch.kinds)
        if bool(own.any()):
            said = predicts[own]
            with torch.no_grad(), Unchanged(self.changes):
                before = model.model(input_ids=batch.input_ids[own], use_cache=False)
                wanted = model.lm_head(before.last_hidden_state[:, :-1][said]).float()
            found = model.lm_head(hidden[own][said]).float()
            kl = F.kl_div(
                found.log_softmax(-1), wanted.log_softmax(-1), log_target=True,
                reduction="batchmean",
            )  # fmt: skip
            loss = loss + s.talk_weight * kl
            figures["talk_kl"] = kl.item()
        if len(images):
            rows = self.rows.reshape(len(images), -1, hidden.shape[-1])
            near = self.anchor(rows, batch.labels)
            loss = loss + s.anchor_weight * near
            figures["anchor"] = near.item()
        return loss, figures

    @property
    def export_folder(self) -> Path:
        """Where `export` writes."""
        return self.folder / "pictures"

    def export(self) -> None:
        """Write what ships: tower, projector and change, in bfloat16."""
        folder = self.export_folder
        folder.mkdir(parents=True, exist_ok=True)
        state = published_names(
            {
                name: one
                for name, one in self.model.state_dict().items()
                if "vision_tower" in name or "multi_modal_projector" in name
            }
        )
        for name, change in self.changes.items():
            state[f"{DELTA}{name}.down"] = change.down
            state[f"{DELTA}{name}.up"] = change.scale * change.up
        state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items()}
        save_file(state, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / "config.json", {"vision_config": tower_config().to_diff_dict()})

    def stage_ended(self) -> None:
        """Read the slots of held-out pictures."""
        if parallel.rank():
            return
        path = self.export_folder / "slots.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text()) if path.is_file() else {}
        found[self.stage] = self.read_held_out()
        write_json(path, found)
        print(json.dumps(found), flush=True)

    @torch.no_grad()
    def read_held_out(self) -> dict[str, float]:
        """Share of held-out slots that are read right, by part; ``all`` counts every slot."""
        s = self.settings
        samples = [
            sample(kind, HELD_OUT_SEED + i, "test")
            for kind in SLOT_KINDS
            for i in range(s.held_out)
        ]
        samples += easy_test(max(1, s.held_out // len(pictures.ANSWERS)))
        right: dict[str, list[int]] = {}
        for start in range(0, len(samples), 64):
            batch = picture_batch(samples[start : start + 64]).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                self.model.model.vision_tower(pixels(batch.images))
                counts = self.reader.hits(self.features, batch.labels)
            for part, (hits, total) in counts.items():
                mine = right.setdefault(part, [0, 0])
                mine[0] += hits
                mine[1] += total
        shares = {part: hits / total for part, (hits, total) in right.items() if total}
        hits, total = (sum(one[i] for one in right.values()) for i in (0, 1))
        return {"all": round(hits / total, 4)} | {k: round(v, 4) for k, v in shares.items()}


def picture_batch(samples: list[Sample]) -> Batch:
    """Pictures and labels alone."""
    return collate([(one, [0], [False]) for one in samples], 0)


def main() -> None:
    """Command line: every field of `RealTraining` is a flag."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_factory.real.train_target",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, RealTraining, "output", "talks")
    settings = RealTraining(**vars(parser.parse_args()))
    parallel.launch(train, (settings,), settings.processes, Path(settings.output))


def train(settings: RealTraining) -> None:
    """One process's part of a run."""
    RealTrainer(settings).run()


if __name__ == "__main__":
    main()

"""A first training loop for MSD drafts of LLaVA-type targets, with the demo world as data.

    python -m vllm_msd.training.train_draft --target build/target/model --output build/draft

The target runs frozen beside the draft and yields hidden states as they are needed. The text-only
stage comes first, then the share of image conversations rises (see `curriculum`). Each batch is
drafted several steps deep (see `unroll`), so that the draft learns to go on from its own outputs.
Part of the conversations are the target's own replies, since acceptance is counted on those.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from vllm_msd.checkpoint import save_draft
from vllm_msd.draft import DraftRows, MSDDraft, MSDDraftConfig, TargetInfo
from vllm_msd.training import parallel
from vllm_msd.training.curriculum import hidden_noise, visual_ratio
from vllm_msd.training.features import TargetFeatures, target_features
from vllm_msd.training.initial import open_heads_for_images
from vllm_msd.training.losses import draft_loss
from vllm_msd.training.unroll import unroll


@dataclass(frozen=True)
class DraftTraining:
    """Settings of one run.

    minutes: wall-clock budget. curriculum_share: the part of it over which the curriculum's epochs
    are spread; after it the share of image conversations stays at `visual_share`.
    replies_share: how much of the budget, at its end, trains on the target's own replies.
    steps: how deep each batch is drafted; step_decay weighs step k by step_decay ** (k - 1).
    """

    target: str
    output: str
    minutes: float = 12.0
    processes: int = 2
    batch_size: int = 8
    cap: int = 144
    curriculum_epochs: int = 10
    curriculum_share: float = 0.15
    visual_share: float = 0.92
    replies_share: float = 0.5
    steps: int = 3
    step_decay: float = 0.8
    noise: float = 0.15
    regression_weight: float = 0.5
    distillation_weight: float = 1.0
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 60
    target_name: str = "../target"
    initial: str = ""
    seed: int = 2


@dataclass
class DraftBatch:
    """Right-padded conversations: see `features.target_features` for the fields."""

    input_ids: Tensor
    answer_mask: Tensor
    pixel_values: Tensor | None


Batches = Callable[[str], DraftBatch]


def draft_config(target: LlavaForConditionalGeneration, name: str) -> MSDDraftConfig:
    """A one-layer Llama-type draft with the target's own layer shapes."""
    text = target.config.text_config
    return MSDDraftConfig(
        layer_type="llama",
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        num_hidden_layers=1,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=10000.0,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        attention_bias=False,
        input_norm=False,
        torch_dtype="bfloat16",
        target=TargetInfo(name, "LlavaForConditionalGeneration", text.hidden_size, text.vocab_size),
    )


def initial_draft(target: LlavaForConditionalGeneration, config: MSDDraftConfig) -> MSDDraft:
    """A new draft: the decoder layer starts as a copy of the target's last one.

    The fusion layer starts by passing the hidden state on, next to a random map of the embedding.
    """
    draft = MSDDraft(config)
    last = target.model.language_model.layers[-1].state_dict()
    state = draft.state_dict()
    for name in state:
        source = name.removeprefix("layers.0.")
        if source in last:
            state[name] = last[source].float().clone()
    draft.load_state_dict(state)
    hidden = config.hidden_size
    with torch.no_grad():
        draft.fc.weight[:, hidden:] += torch.eye(hidden)
        open_heads_for_images(draft)
    return draft


def batch_loss(
    draft: MSDDraft,
    target: LlavaForConditionalGeneration,
    features: TargetFeatures,
    settings: DraftTraining,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted loss over all unrolled steps, and figures: losses and agreement by step."""
    rows = features.rows
    if settings.noise:
        rows = DraftRows(*rows)._replace(
            hidden_states=hidden_noise(rows.hidden_states, settings.noise)
        )
    mask = features.loss_mask
    wanted_hidden = features.next_hidden[mask]
    with torch.no_grad():
        wanted_logits = target.lm_head(wanted_hidden).float()
    choice = wanted_logits.argmax(-1)
    total = torch.zeros(())
    figures: dict[str, float] = {}
    for step, out in enumerate(unroll(draft, rows, settings.steps)):
        predicted = out[mask]
        logits = target.lm_head(predicted)
        ones = torch.ones(len(predicted), device=predicted.device)
        loss = draft_loss(
            predicted,
            wanted_hidden,
            logits,
            wanted_logits,
            ones,
            settings.regression_weight,
            settings.distillation_weight,
        )
        total = total + settings.step_decay**step * loss.total
        figures[f"regression{step + 1}"] = loss.regression.item()
        figures[f"distillation{step + 1}"] = loss.distillation.item()
        figures[f"agree{step + 1}"] = (logits.argmax(-1) == choice).float().mean().item()
    return total, figures


class DraftTrainer:
    """Holds the state of a run."""

    def __init__(
        self,
        settings: DraftTraining,
        target: LlavaForConditionalGeneration,
        batches: Batches,
    ) -> None:
        self.settings = settings
        self.target = target.eval().requires_grad_(False)
        self.batches = batches
        torch.manual_seed(settings.seed)
        self.config = draft_config(target, settings.target_name)
        if settings.initial:
            from vllm_msd.checkpoint import load_draft

            state = {k: v.float() for k, v in load_draft(settings.initial)[1].items()}
            self.draft = MSDDraft(self.config)
            self.draft.load_state_dict(state)
        else:
            self.draft = initial_draft(target, self.config)
        self.optimizer = torch.optim.AdamW(
            self.draft.parameters(),
            settings.learning_rate,
            (0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        torch.manual_seed(settings.seed + parallel.rank())

    def _kind_of_batch(self, progress: float) -> str:
        """`text`, `image` or `replies`, by the curriculum's stage."""
        settings = self.settings
        within = progress / settings.curriculum_share if settings.curriculum_share else 1.0
        epoch = 1 + int(within * settings.curriculum_epochs)
        ratio = settings.visual_share * visual_ratio(epoch, settings.curriculum_epochs)
        if torch.rand(()).item() >= ratio:
            return "text"
        past = (progress - (1 - settings.replies_share)) / max(settings.replies_share, 1e-9)
        return "replies" if past > 0 and torch.rand(()).item() < 0.6 else "image"

    def run(self, log_path: Path | None) -> dict[str, float]:
        """Train for the budget; returns the last window's figures."""
        settings = self.settings
        budget = settings.minutes * 60
        first = parallel.rank() == 0
        bar = tqdm(total=round(budget), unit="s", mininterval=10, disable=not first)
        sums: dict[str, list[float]] = defaultdict(list)
        parameters = list(self.draft.parameters())
        start = last = time.monotonic()
        elapsed, tokens, means, step = 0.0, 0, {}, 0
        self.draft.train()
        while elapsed < budget:
            progress = elapsed / budget
            rate = min(1.0, (step + 1) / settings.warmup_steps)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            batch = self.batches(self._kind_of_batch(progress))
            with torch.autocast("cpu", torch.bfloat16):
                features = target_features(
                    self.target, batch.input_ids, batch.answer_mask, batch.pixel_values
                )
                loss, figures = batch_loss(self.draft, self.target, features, settings)
            loss.backward()
            parallel.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += batch.input_ids.numel()
            for name, value in figures.items():
                sums[name].append(value)
            elapsed = parallel.from_first(time.monotonic() - start)
            bar.update(round(elapsed) - bar.n)
            if first and step % 25 == 0:
                means = {k: round(sum(v) / len(v), 4) for k, v in sums.items()}
                now = time.monotonic()
                speed = tokens * parallel.size() / (now - last)
                row = {"step": step, "minutes": elapsed / 60, "tokens_per_second": round(speed)}
                if log_path:
                    with log_path.open("a") as log:
                        log.write(json.dumps(row | means) + "\n")
                bar.set_postfix_str(
                    f"step {step} {speed:.0f} tok/s agree {means['agree1']:.3f} "
                    f"{means[f'agree{settings.steps}']:.3f}"
                )
                sums.clear()
                tokens, last = 0, now
        return {"steps": step, "minutes": round(elapsed / 60, 1), **means}


def train(settings: DraftTraining) -> None:
    """One process's part of a run over the demo world; the first process writes the draft."""
    from vllm_msd.demo.draft_data import WorldBatches
    from vllm_msd.demo.records import write_record

    target = LlavaForConditionalGeneration.from_pretrained(
        settings.target, dtype=torch.float32, attn_implementation="eager"
    )
    batches = WorldBatches(
        target,
        Path(settings.target),
        (settings.seed, parallel.rank()),
        settings.batch_size,
        settings.cap,
    )
    trainer = DraftTrainer(settings, target, batches)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = trainer.run(folder.parent / f"{folder.name}.log.jsonl")
    if parallel.rank() == 0:
        state = {k: v.detach().bfloat16() for k, v in trainer.draft.state_dict().items()}
        save_draft(folder, trainer.config, state, trainer.config.target)
        write_record(folder, "draft", asdict(settings), outcome)


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `DraftTraining` is a flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, field in DraftTraining.__dataclass_fields__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=field.type,
            default=field.default,
            required=name in ("target", "output"),
        )
    settings = DraftTraining(**vars(parser.parse_args(arguments)))
    parallel.launch(train, (settings,), settings.processes, Path(settings.output).parent)


if __name__ == "__main__":
    main()

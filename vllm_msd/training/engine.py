"""The training loop: one process here, any number under `torchrun` or `accelerate launch`.

A step is a pure function of settings, step number and weights; under the loss ``lk`` also of what
the step before accepted. Records, their order and the noise come from the seed and the step; every
process takes its part of the step's records, and the loss is divided by the count of rows in all of
them. So neither the number of processes, nor the size of micro-batches, nor a kill and resume
changes the losses beyond rounding.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from vllm_msd.checkpoint import load_draft_config
from vllm_msd.draft.vocabulary import offsets_of
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.storage import check_folder
from vllm_msd.training import curves, sharding
from vllm_msd.training.data.batches import (
    Corpus,
    StepData,
    StepDataset,
)
from vllm_msd.training.data.index import RecordFile, image_roots
from vllm_msd.training.data.plan import DataPlan, share_of_multimodal
from vllm_msd.training.feature_cache import FeatureCache
from vllm_msd.training.initial import draft_config, initial_draft
from vllm_msd.training.inputs import DraftInputs
from vllm_msd.training.losses import EPSILON, lk_weights
from vllm_msd.training.measure import measure
from vllm_msd.training.objective import DraftObjective, LossWeights
from vllm_msd.training.results import Results
from vllm_msd.training.run_files import RunFolder, describe_data
from vllm_msd.training.settings import TRACKERS, TrainSettings
from vllm_msd.training.start import parameter_groups
from vllm_msd.training.targets import Target
from vllm_msd.training.vocabulary import training_vocabulary
from vllm_msd.training.window import FIGURES, Window, not_learning

# Fewer steps say nothing about whether a run learns.
_STEPS_TO_JUDGE = 20


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a draft; returns the last figures.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend.
    """
    return Trainer(settings).run()


class Trainer:
    """State of one process of a run.

    Args:
        settings: of the run.
        target: instead of loading the one that the settings name.
    """

    def __init__(self, settings: TrainSettings, target: Target | None = None) -> None:
        self.settings = settings
        self.folder = RunFolder(settings.output)
        curves.check_report(settings.report_to)
        self.accelerator = Accelerator(
            # Unasked, accelerate lets processes on CPUs each believe that they are alone.
            cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
            log_with=settings.report_to if settings.report_to in TRACKERS else None,
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        if settings.batch_size % self.world:
            raise ConfigError(
                f"batch_size: got {settings.batch_size}, expected a multiple of the "
                f"{self.world} processes."
            )
        if settings.fsdp:
            sharding.check_processes(self.world)
        # What is wrong with places and files is told before the target is loaded.
        self.folder.check(settings)
        if settings.cache_features:
            check_folder(settings.cache_features, "cache_features")
        if settings.init not in ("target", "random"):
            load_draft_config(settings.init)
        with_text, with_images = settings.text_data, settings.multimodal_data
        text = [RecordFile(p, with_images=False) for p in with_text]
        multimodal = [RecordFile(p) for p in with_images]
        files = [*text, *multimodal]
        names = [file.path.name for file in files]
        if len(set(names)) < len(names):
            raise ConfigError("data files: got two of the same name. Rename one of them.")
        self.corpus = Corpus(text, multimodal, settings.eval_records, settings.seed)
        self.data = describe_data(files)
        roots = image_roots(settings.image_root, files)
        self.target = target or Target.load(
            settings.target, settings.target_dtype, settings.attention, self.device
        )
        self.renderer = self.target.renderer(roots, settings.max_length)
        self.steps = settings.steps or max(
            1, round(settings.epochs * sum(self.corpus.num_training) / settings.batch_size)
        )
        self.warmup = min(settings.warmup_steps, max(1, self.steps // 10))
        self.plan = self._plan()
        self.cache = self._cache()
        self.dataset = StepDataset(
            self.corpus, self.plan, self.renderer, self.rank, self.world, self.cache
        )
        self._prepare_draft()
        self.results = Results(
            settings, self.folder, self.data, self.accelerator, self.target, self.renderer,
            self.corpus, self.config, self.units, self.optimizer,
        )  # fmt: skip

    def _plan(self) -> DataPlan:
        s = self.settings
        share = share_of_multimodal(
            s.curriculum, self.steps, s.curriculum_epochs, s.curriculum_share, s.visual_share
        )
        return DataPlan(self.corpus.weights(), s.batch_size, share, s.length_pool, s.seed)

    def _cache(self) -> FeatureCache | None:
        s = self.settings
        if not s.cache_features:
            return None
        about = {
            "target": self.target.identity(),
            "data": {entry["file"]: entry["sha256"] for entry in self.data},
            "max_length": s.max_length,
        }
        return FeatureCache(Path(s.cache_features).expanduser(), about, self.rank)

    def _prepare_draft(self) -> None:
        s = self.settings
        self.config = draft_config(self.target, s.target_name, s.layers, s.layer_type)
        with self.accelerator.main_process_first():  # the others find what it has counted
            vocabulary = training_vocabulary(
                s, self.renderer, self.corpus, self.target.text.vocab_size, self.folder.folder
            )
        if vocabulary is not None:
            self.config = replace(self.config, draft_vocab_size=len(vocabulary))
        # A resumed run's weights are in the units that it was started with.
        known = self.folder.units() if s.resume else None
        self.units, sample = measure(self.target, self.renderer, self.corpus, s, known)
        draft = initial_draft(self.target, self.config, s.init, s.seed, self.units, sample)
        if vocabulary is not None:
            draft.d2t.copy_(offsets_of(vocabulary))
        weights = LossWeights(s.loss, s.regression_weight, s.distillation_weight, s.step_decay)
        objective = DraftObjective(draft, s.draft_steps, weights, s.gradient_checkpointing)
        if s.fsdp:
            sharding.shard(objective, self.device, self.world)
        optimizer = torch.optim.AdamW(
            parameter_groups(draft, sample),
            self.rate(0),
            (0.9, 0.95),
            weight_decay=s.weight_decay,
            fused=True,
        )
        self.objective, self.optimizer = objective, optimizer
        if not s.fsdp:
            self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=s.precision == "bf16"
        )
        head = self.target.head * self.units.hidden
        self.head = head.bfloat16() if s.precision == "bf16" else head
        self.inputs = DraftInputs(s, self.target, self.cache, self.units, self.device)

    # The run ----------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end (or `stop_after_minutes`); returns the last figures."""
        s = self.settings
        self._start_or_resume()
        results, progress = self.results, self.results.progress
        started = time.monotonic() - progress.seconds
        deadline = time.monotonic() + 60 * s.stop_after_minutes if s.stop_after_minutes else None
        window = Window(s.draft_steps)
        bar = tqdm(
            total=self.steps, initial=progress.step, unit="step", disable=not self.is_main,
            dynamic_ncols=True,
        )  # fmt: skip
        figures: dict[str, Any] = results.last_figures()
        stopped = warned = False
        self.objective.train()
        batches = iter(self._batches())
        while progress.step < self.steps and not stopped:
            with window.phase("data", self.device):
                data = next(batches)
            is_late = deadline is not None and time.monotonic() > deadline
            stopped = self.train_step(data, window, is_late)
            progress.step += 1
            progress.seconds = time.monotonic() - started
            bar.update()
            is_last = stopped or progress.step == self.steps
            is_saving = is_last or progress.step % s.save_every == 0
            if is_saving or progress.step % s.log_every == 0:
                figures = window.row(progress.step, self.rate(progress.step - 1), self.plan)
                is_past_warmup = window.steps[0] >= max(self.warmup, _STEPS_TO_JUDGE)
                window = Window(s.draft_steps)
                results.log(figures)
                if is_past_warmup and (is_last or not warned):
                    tokens = self.config.draft_vocab_size or self.config.vocab_size
                    warning = not_learning(figures, tokens)
                    warned = warned or bool(warning)
                    if warning and self.is_main:
                        bar.write(warning, file=sys.stderr)
                bar.set_postfix_str(
                    f"loss {figures['loss']:.3f}, agree {figures['agreement'][0]:.3f}, "
                    f"{figures['tokens_per_second']:.0f} tok/s"
                )
            is_early = progress.step in (s.eval_every // 20, s.eval_every // 4)
            if s.eval_records and (is_last or is_early or progress.step % s.eval_every == 0):
                figures |= results.evaluate(self.objective)
            if is_saving:
                if self.cache is not None:
                    self.cache.flush()
                results.save(self.objective)
        bar.close()
        results.finish(self.objective, figures)
        skipped = len(self.folder.listed())
        return {**figures, "steps": progress.step, "of": self.steps, "skipped": skipped}

    def _start_or_resume(self) -> None:
        if self.is_main:
            if self.settings.resume:
                self.folder.check_data(self.data)
                self.folder.go_on(self.corpus.bad)
            else:
                about = {
                    "settings": self.settings.as_dict(),
                    "data": self.data,
                    "target": self.target.identity(),
                    "units": asdict(self.units),
                }
                self.folder.start(about, self.corpus.bad)
        self.accelerator.wait_for_everyone()
        self.bad = self.folder.listed()
        # Every process counts what it finds; what is known already is counted by the first one.
        self.num_bad = len(self.bad) if self.is_main else 0
        self._check_bad(len(self.bad))
        if self.settings.resume:
            self.results.restore(self.objective)
        self.accelerator.wait_for_everyone()
        self.results.open()

    def _batches(self) -> Iterator[StepData]:
        workers = self.settings.workers
        return iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=range(self.results.progress.step, self.steps),
                num_workers=workers,
                prefetch_factor=2 if workers else None,
            )
        )

    def rate(self, step: int) -> float:
        """The learning rate at a step, from 0."""
        s = self.settings
        highest = s.highest_rate(self.config.hidden_size)
        if step < self.warmup:
            return highest * (step + 1) / self.warmup
        past = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * past)), "linear": 1 - past}
        return highest * factor.get(s.decay, 1.0)

    def train_step(self, data: StepData, window: Window, is_late: bool = False) -> bool:
        """One step; returns whether the first process wants to stop here."""
        s = self.settings
        if data.error:
            raise DataError(data.error)
        fresh = [bad for bad in dict.fromkeys(data.bad) if bad not in self.bad]
        self.bad.update(fresh)
        self.folder.skip(fresh)
        self.num_bad += len(fresh)
        size = s.micro_batch_size or len(data.examples)
        micro = [data.examples[i : i + size] for i in range(0, len(data.examples), size)]
        cached = [self.inputs.cached(examples) for examples in micro]
        count = sum(self.inputs.num_rows(*pair) for pair in zip(micro, cached, strict=True))
        totals = torch.tensor(
            [count, self.num_bad, is_late and self.is_main], dtype=torch.float64,
            device=self.device,
        )  # fmt: skip
        count, num_bad, stop = self.accelerator.reduce(totals, "sum").tolist()
        self._check_bad(int(num_bad))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(data.step) * group["factor"]
        # Of the step before: this one's mean is known only when all micro-batches are through.
        kl_weights = lk_weights(self.results.progress.acceptance, s.draft_steps)
        sums = torch.zeros(len(FIGURES), s.draft_steps, device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        tokens = places = 0
        for number, (examples, known) in enumerate(zip(micro, cached, strict=True), 1):
            with window.phase("target", self.device), self.autocast:
                features = self.inputs.features(examples, known)
            tokens += int(features.lengths.sum())
            is_last = number == len(micro)
            with window.phase("draft", self.device):
                with self._gradients_meet(is_last):
                    parts = self.inputs.of_draft(features, examples, data.step)
                    inputs, hidden, mask, segments = parts
                    places += mask.numel()
                    with self.autocast:
                        loss, figures = self.objective(
                            inputs, hidden, mask, self.head, segments, kl_weights
                        )
                    # Averaging over processes divides by their number once more.
                    self.accelerator.backward(loss * (self.world / (count + EPSILON)))
                sums += figures
                loss_sum += loss.detach()
        with window.phase("draft", self.device):
            norm = sharding.whole(
                self.accelerator.clip_grad_norm_(self.objective.parameters(), s.max_grad_norm)
            )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        sizes = loss_sum.new_tensor([tokens, places])
        together = torch.cat([sums.flatten(), loss_sum[None], sizes])
        together = self.accelerator.reduce(together, "sum")
        *sums_list, loss_total, tokens, places = together.tolist()
        accepted = sums_list[FIGURES.index("acceptance") * s.draft_steps :][: s.draft_steps]
        self.results.progress.acceptance = [part / (count + EPSILON) for part in accepted]
        window.add(data.step, sums_list, loss_total, count, tokens, places, float(norm))
        return bool(stop)

    def _gradients_meet(self, is_last: bool) -> AbstractContextManager:
        """Gradients of all processes meet once, on the last micro-batch."""
        if self.settings.fsdp:
            sharding.meet(self.objective, is_last)
        elif not is_last:
            return self.accelerator.no_sync(self.objective)
        return nullcontext()

    def _check_bad(self, count: int) -> None:
        limit = self.settings.max_bad_fraction * self.corpus.num_found
        if count > limit:
            shown = "".join(f"\n  {bad}" for bad in sorted(self.bad, key=str)[:5])
            raise DataError(
                f"{count} of {self.corpus.num_found} records are broken, more than "
                f"max_bad_fraction ({self.settings.max_bad_fraction:g}) allows.{shown}\nAll are "
                f"listed in {self.folder.skipped}. Mend the data or --image-root, or raise "
                "--max-bad-fraction."
            )

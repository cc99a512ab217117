"""What a run leaves behind: figures, evaluations, checkpoints to resume from, drafts to serve."""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vllm_msd.checkpoint import save_draft
from vllm_msd.draft import MSDDraft, MSDDraftConfig
from vllm_msd.errors import CheckpointError
from vllm_msd.provenance import provenance
from vllm_msd.storage import (
    PARTIAL,
    commit_folder,
    remove,
    storage_errors,
    write_json,
    write_text,
)
from vllm_msd.training import acceptance, curves, model_card, sharding
from vllm_msd.training.data.batches import Corpus
from vllm_msd.training.data.render import Renderer
from vllm_msd.training.profile import preferred_tokens
from vllm_msd.training.run_files import RunFolder
from vllm_msd.training.settings import TrainSettings
from vllm_msd.training.targets import Target
from vllm_msd.training.units import Units

_GO_ON = "Mend that, then go on with --resume."


@dataclass
class Progress:
    """How far a run is; kept with each checkpoint.

    step: steps done. best: acceptance length of the best draft so far. seconds: trained.
    table: figures of the last evaluation. acceptance: mean probability of acceptance in the last
    step, by drafting step.
    """

    step: int = 0
    best: float = 0.0
    seconds: float = 0.0
    table: dict[str, Any] | None = None
    acceptance: list[float] = field(default_factory=list)


class Results:
    """Writes a run's folder, from every process; only the first one touches shared files.

    Args:
        settings, folder: of the run. data: what is kept about its files.
        accelerator: holds objective and optimizer.
        target, renderer, corpus: what held-out records are answered and rendered with.
        config: of the draft. units: that it is trained in. optimizer: of the objective.
    """

    def __init__(
        self,
        settings: TrainSettings,
        folder: RunFolder,
        data: list[dict[str, Any]],
        accelerator: Accelerator,
        target: Target,
        renderer: Renderer,
        corpus: Corpus,
        config: MSDDraftConfig,
        units: Units,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.settings, self.folder, self.data = settings, folder, data
        self.accelerator, self.target, self.renderer = accelerator, target, renderer
        self.corpus, self.config, self.units = corpus, config, units
        self.optimizer = optimizer
        self.is_main = accelerator.is_main_process
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.progress = Progress()
        self.replies: list[acceptance.Reply] | None = None
        self.report: curves.Reporter | None = None

    def open(self) -> None:
        """Begin to log at the step the run is at."""
        if self.is_main:
            self.folder.cut_log(self.progress.step)
            name, folder = self.settings.report_to, self.folder.folder
            with storage_errors(folder, advice=_GO_ON):
                if name == "tensorboard":
                    self.report = curves.Board(folder / name, self.progress.step)
                elif name != "none":
                    self.report = curves.Tracker(self.accelerator, self.settings.as_dict())

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of figures to the log."""
        if self.is_main:
            self.folder.write_log(row)
        if self.report is not None:  # the first process's
            with storage_errors(self.folder.folder, advice=_GO_ON):
                self.report.write(row)

    def last_figures(self) -> dict[str, Any]:
        """Figures of the step a resumed run is at, so that one that was done says the same."""
        rows = self.folder.read_log()
        return {k: v for row in rows if row["step"] == self.progress.step for k, v in row.items()}

    @torch.no_grad()
    def evaluate(self, objective: torch.nn.Module) -> dict[str, Any]:
        """Acceptance length on held-out records; keeps the draft if it is the best so far."""
        s = self.settings
        draft = MSDDraft.from_state_dict(self.config, self._weights(objective)).eval()
        if self.replies is None:
            mine = self.corpus.held_out()[self.rank :: self.world]
            self.replies, bad = acceptance.greedy_replies(
                self.target, self.renderer, mine, s.eval_max_tokens, s.eval_depth
            )
            known = self.folder.listed()
            self.folder.skip([b for b in bad if b not in known])
        found = acceptance.chain_acceptance(
            self.target, draft, self.replies, s.eval_depth, s.visual_rows
        )
        parts = gather_object([found]) if self.world > 1 else [found]
        table = self.progress.table = acceptance.summary(acceptance.merge(parts))
        lengths = {kind: f["acceptance_length"] for kind, f in table["kinds"].items()}
        lengths["all"] = table["all"]["acceptance_length"]  # whatever a record calls its kind
        row = {
            "step": self.progress.step,
            "acceptance_length": lengths,
            "accuracy_at_depth": table["all"].get("accuracy_at_depth", []),
        }
        self.log(row)
        if lengths["all"] > self.progress.best:
            self.progress.best = lengths["all"]
            self.export("best", objective, table)
        return row

    def save(self, objective: torch.nn.Module) -> None:
        """Write a checkpoint to resume from."""
        partial, final = self.folder.checkpoint(self.progress.step)
        try:
            with storage_errors(partial, advice=_GO_ON):
                if self.settings.fsdp:
                    sharding.save(objective, self.optimizer, partial, self.is_main)
                else:
                    self.accelerator.save_state(str(partial))
                self.accelerator.wait_for_everyone()
                if self.is_main:
                    torch.save(vars(self.progress), partial / "trainer.pt")
        except BaseException:
            if self.is_main:  # what it takes up may be what is missing
                remove(partial)
            raise
        if self.is_main:
            commit_folder(partial, final)
            self.folder.keep_checkpoints(self.settings.keep_checkpoints)
            curves.draw(self.folder.read_log(), self.folder.folder / "curves.png")
        self.accelerator.wait_for_everyone()

    def restore(self, objective: torch.nn.Module) -> None:
        """Go back to the newest checkpoint that can be read; to the beginning where there is none.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        found = self.folder.complete_checkpoints()
        for path in found:
            try:
                if self.settings.fsdp:
                    sharding.load(objective, self.optimizer, path)
                else:
                    self.accelerator.load_state(str(path))
                self.progress = Progress(**torch.load(path / "trainer.pt", weights_only=True))
                return
            # A damaged file can raise anything while it is read.
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                print(f"{path} is damaged and passed over: {reason}", file=sys.stderr)
        if found:
            raise CheckpointError(
                f"resume: no checkpoint in {self.folder.checkpoints} can be read. Delete that "
                "folder to train from the beginning, or start a new run in another one."
            )

    def export(self, name: str, objective: torch.nn.Module, outcome: dict[str, Any]) -> None:
        """Write the draft as it is served, with its provenance and model card."""
        weights = {
            name: x.bfloat16() if x.is_floating_point() else x
            for name, x in self._weights(objective).items()
        }
        if not self.is_main:
            return
        folder = self.folder.folder / name
        table = self.progress.table
        profile = table.get("profile") if table else None
        config = replace(self.config, msd_acceptance=profile)
        if profile:
            tokens = preferred_tokens(profile["by_depth"])
            config = replace(config, num_speculative_tokens=tokens)
        save_draft(folder, config, weights)
        content = {
            "what": "draft",
            **provenance(**self.settings.as_dict()),
            "steps": self.progress.step,
            "processes": self.world,
            "minutes": round(self.progress.seconds / 60, 2),
            "data": self.data,
            "skipped": len(self.folder.listed()),
            "target": self.target.identity(),
            "outcome": outcome,
        }
        write_json(folder / "provenance.json", content)
        card = model_card.model_card(config, content, self.settings, table)
        write_text(folder / model_card.CARD, card)

    def _weights(self, objective: torch.nn.Module) -> dict[str, Tensor]:
        """The draft's weights as it is served, float32."""
        if self.settings.fsdp:
            state = {name: sharding.whole(x) for name, x in objective.state_dict().items()}
        else:
            state = self.accelerator.get_state_dict(objective)
        state = {name.removeprefix("draft."): x.detach() for name, x in state.items()}
        return self.units.fold(state, self.config)

    def finish(self, objective: torch.nn.Module, figures: dict[str, Any]) -> None:
        """Write the last draft, which is the best one where none was evaluated."""
        self.export("last", objective, figures)
        if self.report is not None:
            self.report.close()
        if self.is_main:
            self._keep_a_best(self.folder.folder / "last", self.folder.folder / "best")
        self.accelerator.wait_for_everyone()

    def _keep_a_best(self, last: Path, best: Path) -> None:
        if (best / "config.json").is_file():
            return
        partial = best.with_name(best.name + PARTIAL)
        with storage_errors(best, advice=_GO_ON):
            remove(partial)
            shutil.copytree(last, partial)
        commit_folder(partial, best)

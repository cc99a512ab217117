"""A whole run: every arm at every batch size and temperature, in turn, in several passes."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.bench.arms import NONE
from vllm_msd.bench.data import Requests, in_turn, load_requests
from vllm_msd.bench.drive import Cell, run_cell
from vllm_msd.bench.engines import GIB, Engines, Models, models_of
from vllm_msd.bench.figures import Results, summary
from vllm_msd.bench.ideal import measure_ideal
from vllm_msd.bench.origin import of_model, of_requests
from vllm_msd.bench.settings import BenchSettings
from vllm_msd.bench.table import closing_table, heading, line
from vllm_msd.bench.ties import Difference, differences, examine
from vllm_msd.bench.true_shapes import NOTE
from vllm_msd.budget import ratio_for
from vllm_msd.measure.engine import Engine
from vllm_msd.provenance import machine, provenance, versions
from vllm_msd.regenerate.journal import Journal
from vllm_msd.storage import write_json, write_text

RESULT, PAGE = "bench.json", "report.html"
# Records of the journal that are no cell.
_TIES, _IDEAL = -1, -2
_PROFILED = 3  # requests


@dataclass(frozen=True)
class Place:
    """One cell's place in the comparison."""

    temperature: float
    batch: int
    arm: str


def run_bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure what is not measured yet, print it as it comes, and write JSON, charts and page.

    ``bench.json.journal`` in the output folder keeps each cell as soon as it is done; the same
    command goes on after a kill, and makes the page anew when all is done. The process should have
    been started by `vllm_msd.measure.engine.restart_tuned`.

    Returns:
        `vllm_msd.bench.figures.summary`, with where it was measured.

    Raises:
        MSDError: settings, data or models that cannot work; a run with other settings was begun.
    """
    settings.check()
    facts = provenance(**settings.about())
    requests = load_requests(settings.data, settings.image_root, settings.most_requests)
    models = models_of(settings)
    output = settings.output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    about = {
        **settings.about(),
        "machine": machine(),
        "versions": versions(),
        "requests": len(requests.samples),
        **fingerprints(requests, models),
    }
    _print_start(settings, requests, models)
    with open_journal(output, about, settings.force) as journal:
        run = Run(settings, models, requests, journal)
        with closing(run):
            run.measure()
            results = run.results()
        facts["date"] = journal[_IDEAL, 0]["date"]  # of measuring, not of a later page
        facts["dtype"] = journal[0, 0]["dtype"]
    found = {**facts, "data": _about(requests), **summary(results)}
    if settings.shape is not None:
        found["shape"] = about_shape(settings, models)
    write_json(output / RESULT, found)
    print(closing_table(found), flush=True)
    write_pictures(found, output)
    return found


def about_shape(settings: BenchSettings, models: Models) -> dict[str, Any]:
    """What a run with random weights says of itself, in JSON's types."""
    return {
        "note": NOTE,
        "name": settings.shape,
        "weights_gib": models.weights / GIB,
        "tokens_of_a_tree_of_60": settings.accepted,
        "first_choice_right": ratio_for(settings.accepted),
    }


def fingerprints(requests: Requests, models: Models) -> dict[str, str]:
    """What the same settings must stand for, that cells of two runs go together.

    Raises:
        CheckpointError: a model is not to be found.
    """
    found = {
        "digest of the requests": of_requests(requests.samples),
        "digest of the target": of_model(models.target),
    }
    if models.draft is not None:
        found["digest of the draft"] = of_model(models.draft)
    return found


def open_journal(output: Path, about: dict[str, Any], force: bool) -> Journal:
    """What is measured so far in a folder; nothing of it with ``force``.

    Raises:
        ConfigError: a run with other settings was begun there, or another process is at it.
    """
    journal = Journal(output / RESULT, about, force)  # has the lock: what is forgotten is nobody's
    if force:
        journal.forget(about)
    return journal


class Run:
    """What is measured, what is left, and the engines it takes."""

    def __init__(
        self, settings: BenchSettings, models: Models, requests: Requests, journal: Journal
    ) -> None:
        self._settings, self._models, self._journal = settings, models, journal
        self._samples = requests.samples
        self._engines = Engines(settings, models, requests.samples)
        self._prompts: list[dict[str, Any]] | None = None
        names = [arm.name for arm in settings.parsed_arms]
        self.places = [
            Place(temperature, batch, arm)
            for temperature in settings.temperature
            for batch in settings.batch
            for arm in names
        ]
        self._order = order(self.places, names, settings.passes, settings.engines == "apart")

    def close(self) -> None:
        """Let the engines go."""
        self._engines.close()

    def cells(self, place: Place) -> list[Cell]:
        """What is measured of a place, by pass."""
        number = self.places.index(place)
        passes = range(self._settings.passes)
        return [
            Cell.from_dict(self._journal[number, n]) for n in passes if (number, n) in self._journal
        ]

    def measure(self) -> None:
        """Every cell that the journal lacks; then what differs, and what would be ideal."""
        left = [key for key in self._order if key not in self._journal]
        total = sum(self._settings.num_requests(self.places[n].batch) for n, _ in left)
        if not left and (_TIES, 0) in self._journal and (_IDEAL, 0) in self._journal:
            print("everything is measured already; --force measures anew", flush=True)
        elif not left:
            print("all cells are measured; what is ideal is not yet", flush=True)
        elif self._journal.resumed:
            print(f"going on: {len(left)} of {len(self._order)} cells are left", flush=True)
        arms = self._settings.parsed_arms
        if left and self._settings.engines == "together":
            for arm in arms:  # all of them before the first is timed
                self._engines.get(arm.name)
        bar = tqdm(total=total, unit="request", disable=None, leave=False)
        with bar:
            if left:
                with bar.external_write_mode(file=sys.stdout):
                    print(heading(arms), flush=True)
            for number, turn in left:
                place = self.places[number]
                engine = self._engines.get(place.arm)
                bar.unpause()
                arm = next(arm for arm in arms if arm.name == place.arm)
                cell = run_cell(
                    engine,
                    self._chosen(engine, place.batch),
                    place.batch,
                    arm.depth,
                    temperature=place.temperature,
                    max_tokens=self._settings.max_tokens,
                    seed=self._settings.seed,
                    fixed_length=self._settings.shape is not None,
                    on_reply=bar.update,
                )
                self._journal.add(number, turn, dtype=engine.dtype, **cell.to_dict())
                self._tell(bar, place, turn)
        self._examine()
        self._measure_ideal()

    def _chosen(self, engine: Engine, batch: int) -> list[dict[str, Any]]:
        """The prompts of a batch size; where the data have too few, some come again."""
        if self._prompts is None:
            self._prompts = [engine.prompt(sample) for sample in self._samples]
        count = self._settings.num_requests(batch)
        return [self._prompts[n % len(self._prompts)] for n in range(count)]

    def _tell(self, bar: tqdm, place: Place, turn: int) -> None:
        """A line of the table, once all arms have been there."""
        group = [
            p for p in self.places if (p.temperature, p.batch) == (place.temperature, place.batch)
        ]
        numbers = [self.places.index(p) for p in group]
        if not all((number, turn) in self._journal for number in numbers):
            return
        cells = {
            p.arm: Cell.from_dict(self._journal[n, turn])
            for p, n in zip(group, numbers, strict=True)
        }
        with bar.external_write_mode(file=sys.stdout):
            print(line(place.temperature, place.batch, turn, cells), flush=True)

    def _examine(self) -> None:
        """Find the greedy answers that differ from those of no speculation, and how nearly."""
        if (_TIES, 0) in self._journal:
            return
        found: list[Difference] = []
        for place in self.places:
            if place.temperature == 0 and self._settings.shape is None:
                plain = self.cells(replace(place, arm=NONE))[0].replies
                for turn, cell in enumerate(self.cells(place)):
                    found += differences(plain, cell.replies, place.batch, place.arm, turn)
        if found:
            print(f"looking at {len(found)} answers that differ", flush=True)
            engine = self._engines.get(NONE)
            prompts = self._chosen(engine, max(self._settings.batch))
            found = examine(engine, prompts, found, engine.dtype)
        self._journal.add(_TIES, 0, differences=[asdict(one) for one in found])

    def _measure_ideal(self) -> None:
        """What steps cost here, and where their time goes, as far as the engines tell."""
        if (_IDEAL, 0) in self._journal:
            return
        found = measure_ideal(
            self._engines,
            self._settings.parsed_arms,
            in_turn(self._samples)[:_PROFILED],
            max_tokens=self._settings.max_tokens,
        )
        self._journal.add(_IDEAL, 0, date=provenance()["date"], **found)

    def results(self) -> Results:
        """All that was measured."""
        return Results(
            arms=self._settings.parsed_arms,
            cells={(p.temperature, p.batch, p.arm): self.cells(p) for p in self.places},
            kinds=[sample.kind for sample in self._samples],
            differences=[Difference(**d) for d in self._journal[_TIES, 0]["differences"]],
            ideal=self._journal[_IDEAL, 0],
            compared=self._settings.shape is None,
        )


def order(
    places: Sequence[Place], arms: Sequence[str], passes: int, apart: bool
) -> list[tuple[int, int]]:
    """Numbers of places and passes, in the order they are measured in.

    Who goes first rotates, so that a machine that slows down favours none. ``apart``, an engine
    does all of its cells before the next one starts.
    """
    groups = list(dict.fromkeys((place.temperature, place.batch) for place in places))
    found: list[tuple[Place, int]] = []
    for turn in range(passes):
        if apart:
            for arm in _rotated(arms, turn):
                found += [(Place(*group, arm), turn) for group in groups]
            continue
        for index, group in enumerate(groups):
            found += [(Place(*group, arm), turn) for arm in _rotated(arms, turn + index)]
    return [(places.index(place), turn) for place, turn in found]


def write_pictures(found: dict[str, Any], output: Path) -> None:
    """Write the page, and the charts where matplotlib is installed."""
    from vllm_msd.bench.report import render

    write_text(output / PAGE, render(found))
    print(f"report: {output / PAGE}", flush=True)
    if find_spec("matplotlib") is None:
        print("no charts: matplotlib is not installed (pip install matplotlib)", flush=True)
        return
    from vllm_msd.bench.charts import draw

    for path in draw(found, output):
        print(f"chart: {path}", flush=True)


def _rotated(names: Sequence[str], by: int) -> list[str]:
    first = by % len(names)
    return [*names[first:], *names[:first]]


def _about(requests: Requests) -> dict[str, Any]:
    kinds = Counter(sample.kind for sample in requests.samples)
    return {
        "source": requests.source,
        "requests": len(requests.samples),
        "left_out": len(requests.left_out),
        "kinds": dict(kinds),
    }


def _print_start(settings: BenchSettings, requests: Requests, models: Models) -> None:
    for reason in requests.left_out[:3]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(requests.left_out) > 3:
        print(f"left out: {len(requests.left_out)} records in all", file=sys.stderr)
    kinds = ", ".join(f"{n} {kind}" for kind, n in _about(requests)["kinds"].items())
    print(f"{requests.source}: {kinds}")
    if settings.shape is not None:
        print(f"{settings.shape}: {NOTE}; a tree of 60 accepts {settings.accepted - 1:g} tokens")
    for arm in settings.parsed_arms:
        print(f"  {arm.name:<14}{arm}")
    passes, dtype = settings.passes, models.dtype
    print(
        f"{dtype}, {passes} passes; starting vLLM, which takes a while for each of them", flush=True
    )

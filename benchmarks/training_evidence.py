"""Test the paper's two claims, and training over several steps, on the demo world.

    python benchmarks/training_evidence.py --output benchmarks/results/training.json \\
        --plot docs/pictures/training.png
    python benchmarks/training_evidence.py --variants msd coupled --seeds 0 --steps 100

Every variant is `vllm-msd train` with one setting changed, on the same records for the same number
of steps, once per seed:

msd              visual rows decoupled, one drafting step as published, text first and then a ramp
                 that is over after a part of the run (see --config)
coupled          visual rows through the fusion layer, as in EAGLE
dropped          visual rows not seen by the draft
published-ramp   text only for half of the run, then a ramp up to its end, as published
text-only        no multimodal record
multimodal-only  no text record
mixed            the ramp's mean share from the first step on
three-step       trained over three drafting steps, which goes beyond the paper; so are
                 three-step-coupled, three-step-dropped, and kl and lk, which have another loss

Acceptance is counted twice on held-out questions, five drafted tokens a verification: by `vllm-msd
eval`, and in vLLM by its own counters (but for `dropped`, which vLLM cannot serve). What is done
already is kept in --work, so a broken run goes on. (A third of this file is the table of variants
and the command line, which belong together.)
"""

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, Engine, restart_tuned

BASE = "msd"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"draft_steps": 1},
    "coupled": {"visual_rows": "coupled"},
    "dropped": {"visual_rows": "dropped"},
    "published-ramp": {"curriculum_share": 1.0, "visual_share": 1.0},
    "text-only": {"curriculum": "text"},
    "multimodal-only": {"curriculum": "multimodal"},
    "mixed": {"curriculum": "mixed"},
    "three-step": {"draft_steps": 3},
    "three-step-coupled": {"draft_steps": 3, "visual_rows": "coupled"},
    "three-step-dropped": {"draft_steps": 3, "visual_rows": "dropped"},
    "kl": {"draft_steps": 3, "loss": "kl"},
    "lk": {"draft_steps": 3, "loss": "lk"},
}
# The comparisons that are drawn: its title and its variants.
COMPARISONS = {
    "Visual rows": [BASE, "coupled", "dropped"],
    "Curriculum": [BASE, "published-ramp", "text-only", "multimodal-only", "mixed"],
    "Drafting steps in training": [BASE, "three-step"],
    "Visual rows, three steps": ["three-step", "three-step-coupled", "three-step-dropped"],
    "Loss, three steps": ["three-step", "kl", "lk"],
}
NUM_SPECULATIVE_TOKENS = 5
DATA_SEED, HELD_OUT_SEED = 5, 70_000  # of the world's samplers, in splits of their own


def main() -> int:
    """Run what is missing, then write figures and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--records", type=int, default=5000, help="of text, and of multimodal data")
    parser.add_argument("--num-prompts", type=int, default=105, help="held out, the kinds in turn")
    parser.add_argument("--config", type=Path, default=Path("demo_factory/draft.yaml"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"))
    parser.add_argument("--output", type=Path, help="write figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw them as a picture")
    args = parser.parse_args()
    restart_tuned()

    from vllm_msd.demo import paths
    from vllm_msd.provenance import provenance

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    facts = provenance(**{k: v for k, v in settings.items() if k not in ("output", "plot", "jobs")})
    pair = paths.demo_pair()
    try:
        paths.use_factory()
        data = make_data(args.work / "data", args.records, pair.target)
        runs = [(v, s) for s in args.seeds for v in args.variants]
        train_all(runs, args, pair.target, data)
        found = [
            {"variant": variant, "seed": seed, **measure(run_folder(args, variant, seed), args)}
            for variant, seed in tqdm(runs, desc="vllm-msd eval")
        ]
        serve_all(found, args, pair)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {**facts, "summary": summary(found), "runs": found}
    print(text_table(result["summary"]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw(result["summary"], args.plot)
    wrong = [run for run in found if run["identical"] not in (None, run["requests"])]
    return 1 if wrong else 0


def make_data(folder: Path, records: int, target: Path) -> dict[str, Path]:
    """Conversations of the demo world in which the target itself has answered."""
    from demo_factory.write_data import write_data

    done = folder / "done.json"
    about = {"records": records, "seed": DATA_SEED}
    if done.is_file() and json.loads(done.read_text()) == about:
        return {name: folder / f"{name}.json" for name in ("text", "multimodal")}
    found = write_data(folder, records, DATA_SEED, target=str(target), report=print)
    done.write_text(json.dumps(about))
    return found


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where one run lies."""
    return args.work / f"{variant}-{seed}"


def train_all(
    runs: list[tuple[str, int]], args: argparse.Namespace, target: Path, data: dict[str, Path]
) -> None:
    """Train every run that is not there yet, some at once in processes of one thread."""
    missing = []
    for variant, seed in runs:
        folder = run_folder(args, variant, seed)
        if not (folder / "last" / "config.json").is_file():
            changed = {
                "target": str(target),
                "text_data": [str(data["text"])],
                "multimodal_data": [str(data["multimodal"])],
                "output": str(folder),
                "steps": args.steps,
                "eval_records": 0,  # what counts is measured afterwards
                "save_every": args.steps,
                "seed": seed,
                **VARIANTS[BASE],
                **VARIANTS[variant],
            }
            missing.append((str(args.config), changed))
    with (
        tqdm(total=len(missing), desc="training", unit="run") as bar,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
    ):
        for done in as_completed([pool.submit(train_one, *run) for run in missing]):
            done.result()
            bar.update()


def train_one(config: str, changed: dict[str, Any]) -> None:
    """One run, in a process of its own thread."""
    import torch

    from vllm_msd.training import TrainSettings, train

    torch.set_num_threads(1)
    log = Path(changed["output"]).with_suffix(".log")
    with log.open("w") as file, redirect_stderr(file):
        train(TrainSettings.load(config, **changed))


def held_out(args: argparse.Namespace) -> Path:
    """The held-out questions as a file of conversations, for `vllm-msd eval`."""
    from demo_factory.held_out import held_out_samples
    from demo_factory.write_data import write_records

    path = args.work / "held_out" / f"held-out-{args.num_prompts}.json"
    if not path.is_file():
        write_records(path, held_out_samples(args.num_prompts, HELD_OUT_SEED))
    return path


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A run's acceptance by `vllm-msd eval`, and what its training took."""
    from vllm_msd.demo import paths
    from vllm_msd.training.evaluate import evaluate

    kept = folder / f"eval-{args.num_prompts}.json"
    if not kept.is_file():
        figures = evaluate(
            paths.demo_pair().target,
            folder / "last",
            [str(held_out(args))],
            records=args.num_prompts,
            num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
            target_dtype="float32",
            device="cpu",
            batch_size=32,
        )
        kept.write_text(json.dumps(figures))
    figures = json.loads(kept.read_text())
    about = json.loads((folder / "last" / "provenance.json").read_text())
    return {
        "steps": about["steps"],
        "minutes": about["minutes"],
        "eval": {"all": figures["all"], "kinds": figures["kinds"]},
    }


def serve_all(found: list[dict[str, Any]], args: argparse.Namespace, pair: Any) -> None:
    """Add each run's acceptance in vLLM, and whether its answers are those without a draft."""
    from demo_factory.held_out import held_out_samples
    from vllm_msd.measure.compare import acceptance

    samples = held_out_samples(args.num_prompts, HELD_OUT_SEED)
    plain: list[list[int]] = []
    engines: list[Engine] = []  # the end of one would end the process group of all
    for run in tqdm(found, desc="vLLM"):
        run |= {"requests": len(samples), "identical": None, "vllm": None}
        if VARIANTS[run["variant"]].get("visual_rows") == "dropped":
            continue
        folder = run_folder(args, run["variant"], run["seed"])
        kept = folder / f"vllm-{args.num_prompts}.json"
        if not kept.is_file():
            if not plain:
                engines.append(Engine(pair.target, kv_cache_memory_bytes=64 << 20))
                plain += [engines[0].answer(sample).token_ids for sample in samples]
            drafting = Drafting(NUM_SPECULATIVE_TOKENS)
            engine = Engine(
                pair.target,
                draft=folder / "last",
                drafting=drafting,
                kv_cache_memory_bytes=64 << 20,
            )
            engines.append(engine)
            if VARIANTS[run["variant"]].get("visual_rows") == "coupled":
                couple(engine)
            answers = [engine.answer(sample) for sample in samples]
            of_kind: dict[str, list] = defaultdict(list)
            for one, answer in zip(samples, answers, strict=True):
                of_kind[one.kind].append(answer)
            counted = {
                "identical": sum(a.token_ids == b for a, b in zip(answers, plain, strict=True)),
                "vllm": {
                    "all": acceptance(answers),
                    "kinds": {kind: acceptance(group) for kind, group in of_kind.items()},
                },
            }
            kept.write_text(json.dumps(counted))
        run |= json.loads(kept.read_text())


def couple(engine: Engine) -> None:
    """Let an engine's draft take visual rows through its fusion layer, as EAGLE does."""
    draft = engine.model_runner.drafter.model
    embed = draft.embed_input_ids

    def embed_as_text(*args: Any, **kwargs: Any) -> Any:
        out = embed(*args, **kwargs)
        draft.is_visual.zero_()
        return out

    draft.embed_input_ids = embed_as_text


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """By variant and way of counting: tokens per verification of each seed, by kind of work.

    ``multimodal`` is over all verifications of questions with an image. ``at_depth`` holds each
    seed's shares of verifications that accept that many drafted tokens or more.
    """
    table: dict[str, Any] = {}
    for run in found:
        by_way = table.setdefault(run["variant"], {})
        for way in ("eval", "vllm"):
            if not run[way]:
                continue
            kinds = dict(run[way]["kinds"])
            pictured = [f for kind, f in kinds.items() if kind != "text"]
            verifications = sum(f["verifications"] for f in pictured)
            tokens = sum(f["verifications"] * f["acceptance_length"] for f in pictured)
            lengths = {kind: f["acceptance_length"] for kind, f in kinds.items()}
            lengths |= {
                "multimodal": tokens / verifications,
                "all": run[way]["all"]["acceptance_length"],
            }
            into = by_way.setdefault(way, {"lengths": {}, "at_depth": []})
            for kind, length in lengths.items():
                into["lengths"].setdefault(kind, []).append(length)
            shares = run[way]["all"]
            into["at_depth"].append(
                shares.get("accepted_at_depth") or shares["acceptance_rate_per_position"]
            )
    return table


def lengths_of(table: dict[str, Any], variant: str) -> dict[str, list[float]]:
    """A variant's lengths as vLLM counted them; by `vllm-msd eval` where vLLM cannot serve it."""
    ways = table[variant]
    return ways.get("vllm", ways["eval"])["lengths"]


def text_table(table: dict[str, Any]) -> str:
    """Mean and range over the seeds, by variant."""
    lines = [f"{'':<18}{'with images':>22}{'text':>22}"]
    for variant in table:
        lengths = lengths_of(table, variant)
        cells = [
            f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in (lengths["multimodal"], lengths["text"])
        ]
        lines.append(f"{variant:<18}{cells[0]:>22}{cells[1]:>22}")
    return "\n".join(lines)


def draw(table: dict[str, Any], path: Path) -> None:
    """Draw the comparisons: means as bars, seeds as dots, and acceptance by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 8), layout="constrained")
    *panels, depths = figure.subplots(2, 3).flatten()
    for axes, (title, names) in zip(panels, COMPARISONS.items(), strict=True):
        names = [name for name in names if name in table]
        if not names:
            axes.axis("off")
            continue
        kinds = list(lengths_of(table, names[0]))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            lengths = lengths_of(table, name)
            at = [k + (i - (len(names) - 1) / 2) * width for k in range(len(kinds))]
            means = [statistics.mean(lengths[kind]) for kind in kinds]
            label = name if "vllm" in table[name] else f"{name} (vllm-msd eval)"
            axes.bar(at, means, width * 0.92, label=label, alpha=0.75)
            for x, kind in zip(at, kinds, strict=True):
                axes.plot([x] * len(lengths[kind]), lengths[kind], "k.", markersize=3)
        axes.set_xticks(range(len(kinds)), kinds, rotation=20)
        axes.set_ylim(1, 1 + 1.35 * (axes.get_ylim()[1] - 1))  # room for the legend
        axes.set_ylabel("tokens per verification")
        axes.set_title(title)
        axes.legend(fontsize="small", ncols=3, loc="upper left")
        axes.grid(axis="y", alpha=0.3)
    for name, ways in table.items():
        rows = ways.get("vllm", ways["eval"])["at_depth"]
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        depths.plot(range(1, len(means) + 1), means, marker="o", label=name)
    depths.set_xticks(range(1, NUM_SPECULATIVE_TOKENS + 1))
    depths.set_xlabel("drafted tokens")
    depths.set_title("Share of verifications that accept so many or more")
    depths.legend(fontsize="small")
    depths.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

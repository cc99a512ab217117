"""Test the paper's two claims, training over several steps, and losses, on the demo world.

    python benchmarks/training_evidence.py --variants msd coupled dropped published-ramp \\
        text-only multimodal-only mixed three-step --output benchmarks/results/training.json
    python benchmarks/training_evidence.py --variants msd coupled dropped three-step \\
        three-step-coupled three-step-dropped kl lk --records 1800 --walks 1200 \\
        --num-walks 45 --jobs 1 --cache-features --work build/evidence-walk \\
        --output benchmarks/results/training_walk.json
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
eval`, and in vLLM by its own counters (but for `dropped`, which vLLM cannot serve). --walks and
--num-walks add a kind whose answers read the picture on the way (`demo_factory/walks.py`), to the
data and to the questions.

What is done already is kept in --work, run by run, so a broken call goes on. With --seeds 0, then
--seeds 0 1, and so on, there are figures after each seed. `python -m benchmarks.pages` draws them.
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

from vllm_msd.errors import ConfigError, MSDError
from vllm_msd.measure.engine import Drafting, Engine, restart_tuned
from vllm_msd.storage import write_json, write_text

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
NUM_SPECULATIVE_TOKENS = 5
READING = 150  # walks that the target answers with its own picture and with another
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
    parser.add_argument("--walks", type=int, default=0, help="records of the kind walk besides")
    parser.add_argument("--num-prompts", type=int, default=105, help="held out, the kinds in turn")
    parser.add_argument("--num-walks", type=int, default=0, help="held out of the kind walk")
    parser.add_argument("--config", type=Path, default=Path("demo_factory/draft.yaml"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument(
        "--cache-features",
        action="store_true",
        help="let each record pass through the target once for all runs (takes --jobs 1)",
    )
    parser.add_argument(
        "--train-only",
        action="store_true",
        help="train what is missing and stop there: the same command without this counts later, "
        "also on another machine, which needs last/ of each run's folder",
    )
    parser.add_argument("--work", type=Path, default=Path("build/evidence"))
    parser.add_argument("--output", type=Path, help="write figures as JSON")
    args = parser.parse_args()
    if args.cache_features and args.jobs != 1:
        parser.error("--cache-features: runs at once cannot share it. Give --jobs 1 too.")
    if not args.train_only:
        restart_tuned()

    from vllm_msd.demo import paths
    from vllm_msd.provenance import provenance

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    no_matter = ("output", "jobs", "train_only")
    facts = provenance(**{k: v for k, v in settings.items() if k not in no_matter})
    pair = paths.demo_pair()
    try:
        paths.use_factory()
        check_work(args)
        data = make_data(args, pair.target)
        runs = [(v, s) for s in args.seeds for v in args.variants]
        train_all(runs, args, pair.target, data)
        if args.train_only:
            return 0
        found = [
            {"variant": variant, "seed": seed, **measure(run_folder(args, variant, seed), args)}
            for variant, seed in tqdm(runs, desc="vllm-msd eval")
        ]
        serve_all(found, args, pair)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        **facts,
        "summary": summary(found),
        "walks": reading(args, pair.target),
        "runs": found,
    }
    print(text_table(result["summary"]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(result, indent=1) + "\n")
    wrong = [run for run in found if run["identical"] not in (None, run["requests"])]
    return 1 if wrong else 0


def check_work(args: argparse.Namespace) -> None:
    """Refuse to mix runs of other settings with those in the folder."""
    note = args.work / "settings.json"
    about = {name: getattr(args, name) for name in ("steps", "records", "walks")}
    about["config"] = args.config.read_text()
    if note.is_file():
        theirs = json.loads(note.read_text())
        other = [name for name in about if about[name] != theirs.get(name)]
        if other:
            raise ConfigError(
                f"work: {args.work} holds runs with other {', '.join(other)}. Give another folder."
            )
    args.work.mkdir(parents=True, exist_ok=True)
    write_json(note, about)


def make_data(args: argparse.Namespace, target: Path) -> dict[str, list[str]]:
    """Files of conversations of the demo world in which the target itself has answered."""
    from demo_factory.walks import walks
    from demo_factory.write_data import answer_all, write_data, write_records

    folder = args.work / "data"
    files = {name: [str(folder / f"{name}.json")] for name in ("text", "multimodal")}
    if args.walks:
        files["multimodal"].append(str(folder / "walk.json"))
    done = folder / "done.json"  # settings.json says of what
    if not done.is_file():
        write_data(folder, args.records, DATA_SEED, target=str(target), report=print)
        if args.walks:
            samples = walks(args.walks, DATA_SEED)
            answer_all(samples, str(target))
            write_records(folder / "walk.json", samples)
        write_json(done, {})
    return files


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where one run lies."""
    return args.work / f"{variant}-{seed}"


def train_all(
    runs: list[tuple[str, int]], args: argparse.Namespace, target: Path, data: dict[str, list[str]]
) -> None:
    """Train every run that is not done yet, some at once in processes of one thread."""
    missing = []
    for variant, seed in runs:
        folder = run_folder(args, variant, seed)
        if not (folder / "last" / "config.json").is_file():
            changed = {
                "target": str(target),
                "text_data": data["text"],
                "multimodal_data": data["multimodal"],
                "output": str(folder),
                "steps": args.steps,
                "eval_records": 0,  # what counts is measured afterwards
                "save_every": 100,
                "seed": seed,
                "resume": (folder / "run.json").is_file(),
                "cache_features": str(args.work / "features") if args.cache_features else "",
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


def questions(args: argparse.Namespace) -> list[Any]:
    """The held-out questions."""
    from demo_factory.held_out import held_out_samples
    from demo_factory.walks import walks

    samples = held_out_samples(args.num_prompts, HELD_OUT_SEED)
    return samples + walks(args.num_walks, HELD_OUT_SEED, "test")


def asked(args: argparse.Namespace) -> str:
    """How many, as a part of a file's name."""
    return f"{args.num_prompts}-{args.num_walks}"


def held_out(args: argparse.Namespace) -> Path:
    """The held-out questions as a file of conversations, for `vllm-msd eval`."""
    from demo_factory.write_data import write_records

    path = args.work / "held_out" / f"held-out-{asked(args)}.json"
    if not path.is_file():
        write_records(path, questions(args))
    return path


def reading(args: argparse.Namespace, target: Path) -> dict[str, Any] | None:
    """Whether the target reads the picture on its walks (see `walks.reading`)."""
    from demo_factory.walks import reading as read_along

    if not args.num_walks:
        return None
    kept = args.work / "reading.json"
    if not kept.is_file():
        found = read_along(target, READING, HELD_OUT_SEED)
        write_json(kept, {"requests": READING, "sorts": found})
    return json.loads(kept.read_text())


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A run's acceptance by `vllm-msd eval`, and what its training took."""
    from vllm_msd.demo import paths
    from vllm_msd.training.evaluate import evaluate

    kept = folder / f"eval-{asked(args)}.json"
    if not kept.is_file():
        figures = evaluate(
            paths.demo_pair().target,
            folder / "last",
            [str(held_out(args))],
            records=args.num_prompts + args.num_walks,
            num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
            target_dtype="float32",
            device="cpu",
            batch_size=32,
        )
        write_json(kept, figures)
    figures = json.loads(kept.read_text())
    about = json.loads((folder / "last" / "provenance.json").read_text())
    return {
        "steps": about["steps"],
        "minutes": about["minutes"],
        "trained_on": about["machine"].get("gpu") or about["machine"]["processor"],
        "eval": {"all": figures["all"], "kinds": figures["kinds"]},
    }


def serve_all(found: list[dict[str, Any]], args: argparse.Namespace, pair: Any) -> None:
    """Add each run's acceptance in vLLM, and whether its answers are those without a draft."""
    from vllm_msd.measure.compare import acceptance

    samples = questions(args)
    plain: list[list[int]] = []
    engines: list[Engine] = []  # the end of one would end the process group of all
    for run in tqdm(found, desc="vLLM"):
        run |= {"requests": len(samples), "identical": None, "vllm": None}
        if VARIANTS[run["variant"]].get("visual_rows") == "dropped":
            continue
        folder = run_folder(args, run["variant"], run["seed"])
        kept = folder / f"vllm-{asked(args)}.json"
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
            write_json(kept, counted)
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


if __name__ == "__main__":
    sys.exit(main())

"""Copy the measured figures into README.md and docs/training.md, between their results markers.

    python benchmarks/readme.py            # rewrites the sections
    python benchmarks/readme.py --check    # exits with 1 when one is out of date

Each part of a section is made from one result file; a part without its file is left out. Nothing
in a section is written by hand.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_msd.measure.engine import SHORT

ROOT = Path(__file__).resolve().parent.parent
# Of kinds of work; the others are the kinds.
SUMS = ("multimodal", "all")
PICTURE = "../benchmarks/results/training.png"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; numbers are shown with two decimals, None as a dash."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _source(name: str, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    units = {"cores": "cores", "memory_gib": "GiB"}
    machine = ", ".join(f"{v} {units.get(k, '')}".strip() for k, v in facts["machine"].items())
    return f"`{name}`, {facts['date']}; {machine}; {versions}."


def _source_of_parts(name: str, result: dict[str, Any]) -> str:
    """Of a file whose parts were run at different times: when and where the newest was."""
    newest = max((report["provenance"] for report in result.values()), key=lambda p: p["date"])
    return f"{_source(name, newest)} This is its newest part; in the file each names its own."


def demo(name: str, result: dict[str, Any]) -> str:
    """Identity, acceptance and speed of the demo pair, small and widened."""
    small, wide, settings = result["small"], result["wide"], result["settings"]
    kinds = [(kind, found["acceptance_length"]) for kind, found in small["by_kind"].items()]
    kinds.append(("**all with images**", small["multimodal"]["acceptance_length"]))
    speeds = [("small pair, fp32", small)]
    if wide:
        dtype = SHORT[settings["wide_dtype"]]
        speeds.append((f"widened to {settings['wide']}, {dtype}", wide))
    rows = [
        (
            label,
            found["speed"]["plain_tokens_per_second"],
            found["speed"]["msd_tokens_per_second"],
            f"{found['speed']['speedup']:.2f}x",
            f"{found['identical']} of {found['requests']}",
        )
        for label, found in speeds
    ]
    return "\n\n".join(
        [
            "### The demo",
            f"Tokens per verification, the target's own token counted, with "
            f"{settings['num_speculative_tokens']} drafted (greedy, fp32):",
            table(["kind of work", "tokens per verification"], kinds),
            "Decoding at batch 1, both engines in one interleaved run. A model as small as the "
            "demo's is all overhead, so its speed says little; the widened pair computes the same "
            "functions at a larger shape. Its acceptance comes from the small pair, its cost from "
            "the large shape:",
            table(["pair", "tokens/s without", "with MSD", "speed-up", "same output"], rows),
            _source(name, result),
        ]
    )


def trees(name: str, result: dict[str, Any]) -> str:
    """Chains and trees: acceptance, speed, and what drafting costs."""
    settings = result["settings"]
    parts = ["### Trees"]
    if "acceptance" in result:
        rows = [
            (
                drafting,
                found["all"]["acceptance_length"],
                found["multimodal"]["acceptance_length"],
                f"{found['identical']} of {found['requests']}",
            )
            for drafting, found in result["acceptance"].items()
        ]
        head = ["drafted", "tokens per verification", "with images", "same output"]
        parts += ["The demo pair, greedy, fp32:", table(head, rows)]
    if "speed" in result:
        rows = [
            (
                drafting,
                found["acceptance_length"],
                found["msd_tokens_per_second"],
                f"{found['speedup']:.2f}x",
            )
            for drafting, found in result["speed"]["draftings"].items()
        ]
        parts += [
            f"Widened to {settings['size']}, {settings['dtype']}, batch 1, one interleaved run; "
            f"{result['speed']['plain_tokens_per_second']:.2f} tokens/s without speculation:",
            table(["drafted", "tokens per verification", "tokens/s", "speed-up"], rows),
        ]
    if "products" in result and "speed" in result:
        parts += _products(result)
    if "profile" in result:
        found = result["profile"]
        rows = found["milliseconds_per_step"].items()
        parts += [
            f"Mean time of a verification with a {found['drafting']}. Settling and the rest of "
            f"drafting are {found['drafting_and_settling_share']:.1%} of it:",
            table(["part", "ms"], rows),
        ]
    return "\n\n".join([*parts, _source(name, result)])


def _products(result: dict[str, Any]) -> list[str]:
    """What the matrix products alone allow each drafting."""
    by_rows = result["products"]["milliseconds_by_rows"]
    needed = result["products"]["milliseconds_per_verification"]
    draftings = result["speed"]["draftings"]
    limits = [
        (name, needed[name], 1000 * found["acceptance_length"] / needed[name])
        for name, found in draftings.items()
    ]
    counts = list(by_rows["target"])
    models = [(f"{name}, ms", *(by_rows[name][rows] for rows in counts)) for name in by_rows]
    return [
        "What more rows cost: the matrix products of a pass, by the rows in it:",
        table(["rows", *counts], models),
        "A verification's products (one pass of the target, one of the draft for each depth), and "
        "the tokens/s that its acceptance would give if nothing else took time:",
        table(["drafted", "ms", "tokens/s at most"], limits),
    ]


def visual_branch(name: str, result: dict[str, Any]) -> str:
    """What the image is worth to the draft."""
    groups = [*result["by_kind"].items(), ("**all**", result["all"])]
    images = ("own_image", "swapped_image", "noise")
    rows = [
        (kind, *(found[image]["acceptance_length"] for image in images)) for kind, found in groups
    ]
    return "\n\n".join(
        [
            "### The visual branch",
            "Tokens per verification when the draft, and the draft alone, is given another "
            "request's image of the same kind, or noise of the image embeddings' mean and spread; "
            f"{result['identical']} of {result['requests']} answers stayed as they were:",
            table(["kind of work", "own image", "another's image", "noise"], rows),
            _source(name, result),
        ]
    )


def evaluation(name: str, result: dict[str, Any]) -> str:
    """What the demo target gets right."""
    right = [
        (kind, found["right"], found["random_guess"], found["wrong_image"])
        for kind, found in result["accuracy"].items()
    ]
    return "\n\n".join(
        [
            "### The demo target",
            f"Share of right answers on {result['settings']['per_kind']} held-out prompts of each "
            "kind, beside what a random guess gets and what the target gets with another prompt's "
            "image:",
            table(["kind of work", "right", "random guess", "wrong image"], right),
            _source(name, result),
        ]
    )


def lossless(name: str, result: dict[str, Any]) -> str:
    """Greedy identity and the distribution of sampled tokens."""
    greedy, sampled = [], []
    for key in sorted(result):
        report = result[key]
        job, _, runner = key.partition("-")
        for part, label in (("mixed", "mixed batches"), ("alone", "one at a time")):
            if part in report:
                found = report[part]
                count = found.get("requests", report["requests"])
                same = f"{count - len(found['mismatches'])} of {count}"
                accepted, rejected = found["accepted"], found["rejected"]
                greedy.append((runner.upper(), label, same, accepted, rejected))
        for trial in report.get("trials", []):
            smallest = min(position["p"] for position in trial["positions"])
            rule = "MSD" if trial["wrong_rule"] == "none" else f"wrong: {trial['wrong_rule']}"
            drafts = "sampled" if job == "probabilistic" else "greedy"
            case = f"{trial['temperature']}, {trial['top_p']}, {trial['prompt']}"
            draws = trial["draws"]
            sampled.append((runner.upper(), drafts, rule, case, draws, f"{smallest:.2g}"))
    parts = ["### Losslessness"]
    if greedy:
        head = ["model runner", "requests", "same token ids", "drafts accepted", "rejected"]
        parts += ["Greedy token ids with and without MSD, fp32:", table(head, greedy)]
    if sampled:
        head = ["model runner", "drafts", "rule", "temperature, top-p, prompt", "draws"]
        parts += [
            "Chi-square tests of sampled tokens against the target's exact distribution, the "
            "smallest p-value over the positions tested; the wrong acceptance rules are there to "
            "be caught:",
            table([*head, "smallest p"], sampled),
        ]
    return "\n\n".join([*parts, _source_of_parts(name, result)])


def training(name: str, result: dict[str, Any]) -> str:
    """The paper's claims about visual rows and stages, and training over several steps."""
    settings, variants = result["settings"], result["summary"]

    def spread(values: list[float]) -> str:
        return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    kinds = [kind for kind in next(iter(variants.values()))["eval"]["lengths"] if kind not in SUMS]
    rows, depths = [], []
    for variant, ways in variants.items():
        counted = ways.get("vllm", ways["eval"])
        lengths = counted["lengths"]
        cells = [mean(lengths[kind]) for kind in kinds]
        rows.append((f"`{variant}`", spread(lengths["multimodal"]), *cells))
        depths.append((f"`{variant}`", *map(mean, zip(*counted["at_depth"], strict=True))))
    pairs = [
        (in_vllm, offline)
        for ways in variants.values()
        if "vllm" in ways
        for in_vllm, offline in zip(
            ways["vllm"]["lengths"]["all"], ways["eval"]["lengths"]["all"], strict=True
        )
    ]
    apart = max(abs(offline / in_vllm - 1) for in_vllm, offline in pairs)
    served = [run for run in result["runs"] if run["identical"] is not None]
    same = sum(run["identical"] for run in served)
    asked = sum(run["requests"] for run in served)
    return "\n\n".join(
        [
            f"Tokens per verification, five drafted, greedy, fp32, {settings['num_prompts']} "
            f"held-out questions; {len(settings['seeds'])} seeds of {settings['steps']} steps "
            "each, mean over the seeds, their range in brackets:",
            table(["draft", "with images", *kinds], rows),
            "Share of verifications that accept so many drafted tokens or more:",
            table(["draft", *(str(depth) for depth in range(1, len(depths[0])))], depths),
            f"Counted in vLLM, where {same} of {asked} answers were those without a draft; "
            "`dropped`, which vLLM cannot serve, by `vllm-msd eval`. The two ways of counting "
            f"differ by {apart:.1%} at most.",
            f"![Tokens per verification by kind of work]({PICTURE})",
            _source(name, result),
        ]
    )


def training_time(name: str, result: dict[str, Any]) -> str:
    """Where the time of a training step goes."""
    rows = []
    for case in result["cases"]:
        total = sum(case["seconds"].values())
        shares = [f"{seconds / total:.1%}" for seconds in case["seconds"].values()]
        rows.append((case["draft_steps"], *shares, case["tokens_per_second"]))
    settings = result["settings"]
    return "\n\n".join(
        [
            "### Time of a step",
            f"A target of {settings['size']}, {settings['dtype']}, {settings['batch_size']} "
            f"records a step, {settings['threads']} threads:",
            table(["drafting steps", *result["cases"][0]["seconds"], "tokens/s"], rows),
            _source(name, result),
        ]
    )


def soak(name: str, result: dict[str, Any]) -> str:
    """The long runs with draft trees: identity, distribution, soak."""
    workloads, chi_square = [], {}
    for part, report in result.items():
        runner = report["runner"].upper()
        for trial in report.get("trials", []):
            draws, smallest = chi_square.get(key := _trial_key(runner, trial), (0, 1.0))
            smallest = min([smallest, *(position["p"] for position in trial["positions"])])
            chi_square[key] = draws + trial["draws"], smallest
        if "requests" in report:
            notes = [_SOAK_KINDS[report["kind"]]]
            notes += ["async scheduling"] * (report.get("scheduler") == "AsyncScheduler")
            notes += ["all sampled with seeds"] * part.startswith("seeded")
            notes += ["16 at a time, two engines"] * (part == "soak")
            requests, wrong = report["requests"], len(report["mismatches"])
            counts = ("aborted", "preemptions", "accepted", "rejected", "other_children")
            workloads.append(
                (
                    runner,
                    ", ".join(notes),
                    f"{requests - wrong} of {requests}",
                    *(int(report[count]) for count in counts),
                )
            )
    parts = ["### Draft trees, long runs"]
    if workloads:
        head = ["model runner", "requests", "same token ids", "aborted", "preemptions"]
        head += ["nodes accepted", "rejected", "accepted off the first child"]
        parts += [
            "Random mixed workloads on constructed pairs with and without trees, fp32 (of an "
            "aborted request, what both saw is compared):",
            table(head, workloads),
        ]
    if chi_square:
        rows = [(*key, draws, f"{p:.2g}") for key, (draws, p) in chi_square.items()]
        parts += [
            "Chi-square tests of sampled tokens as above, with trees, the smallest p-value over "
            "prompts and positions:",
            table(["model runner", "rule", "setting", "draws", "smallest p"], rows),
        ]
    if long := result.get("soak"):
        curve = long["curve"]
        parts.append(
            f"Over the {long['requests']} requests of the soak the process's memory grew by "
            f"{long['memory_growth_mib']} MiB of {curve['memory_mib'][-1]:.0f} between the second "
            f"quarter and the last (medians), without speculation by "
            f"{long['plain_memory_growth_mib']}; at the end {long['used_blocks']} cache blocks "
            f"were in use. `{Path(name).with_suffix('.png').as_posix()}` draws both."
        )
    return "\n\n".join([*parts, _source_of_parts(name, result)])


_SOAK_KINDS = {"llava": "LLaVA", "qwen2_vl": "Qwen2-VL (M-RoPE)"}


def _trial_key(runner: str, trial: dict[str, Any]) -> tuple[str, str, str]:
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    cuts = [f"{k.replace('_', '-')} {trial[k]}" for k, v in neutral.items() if trial[k] != v]
    rule = "MSD" if trial["wrong_rule"] == "none" else f"wrong: {trial['wrong_rule']}"
    return runner, rule, ", ".join([f"temperature {trial['temperature']}", *cuts])


PARTS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "benchmarks/results/demo.json": demo,
    "benchmarks/results/trees.json": trees,
    "benchmarks/results/visual_branch.json": visual_branch,
    "vllm_msd/demo/pair/evaluation.json": evaluation,  # written when the pair is built
    "benchmarks/results/lossless.json": lossless,
    "benchmarks/results/soak.json": soak,
}


# By document: its parts.
DOCUMENTS = {
    "README.md": PARTS,
    "docs/training.md": {
        "benchmarks/results/training.json": training,
        "benchmarks/results/training_time.json": training_time,
    },
}


def section(root: Path = ROOT, document: str = "README.md") -> str:
    """A document's whole section with its markers, from the files below ``root``."""
    parts = [
        make(name, json.loads((root / name).read_text(encoding="utf-8")))
        for name, make in DOCUMENTS[document].items()
        if (root / name).is_file()
    ]
    return "\n\n".join([BEGIN, *parts, END])


def updated(text: str, results: str) -> str:
    """A document with its section replaced. Raises SystemExit when it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(
            f"expected the markers {BEGIN} and {END} in each of {', '.join(DOCUMENTS)}"
        )
    return before + results + after


def main() -> int:
    """Rewrite or check the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, tell by exit code")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = updated(old, section(document=name))
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Losslessness: greedy identity, the distribution of sampled tokens, long runs."""

from pathlib import Path
from typing import Any

from .tables import shown, source_of_parts, table

PAIRS = {"greedy": "the demo", "real": "the real"}


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
                pair = f"{PAIRS[job]} pair"
                greedy.append((pair, runner.upper(), label, same, accepted, rejected))
        for trial in report.get("trials", []):
            smallest = min(position["p"] for position in trial["positions"])
            rule = "MSD" if trial["wrong_rule"] == "none" else f"wrong: {trial['wrong_rule']}"
            drafts = "sampled" if job == "probabilistic" else "greedy"
            case = f"{trial['temperature']}, {trial['top_p']}, {trial['prompt']}"
            draws = trial["draws"]
            sampled.append((runner.upper(), drafts, rule, case, draws, f"{smallest:.2g}"))
    parts = ["## Losslessness"]
    if greedy:
        head = ["of", "model runner", "requests", "same token ids", "drafts accepted", "rejected"]
        parts += ["Greedy token ids with and without MSD, fp32:", table(head, greedy)]
    if sampled:
        head = ["model runner", "drafts", "rule", "temperature, top-p, prompt", "draws"]
        parts += [
            "Chi-square tests of sampled tokens against the target's exact distribution, the "
            "smallest p-value over the positions tested; the wrong acceptance rules are there to "
            "be caught:",
            table([*head, "smallest p"], sampled),
        ]
    return "\n\n".join([*parts, source_of_parts(name, result)])


def gpu_wiring(name: str, result: dict[str, Any]) -> str:
    """The long runs on the wiring of a GPU."""
    return soak(name, result, "## Draft trees on the wiring of a GPU, long runs")


def soak(name: str, result: dict[str, Any], heading: str = "## Draft trees, long runs") -> str:
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
            notes += ["CUDA graphs emulated"] * part.endswith("-graphs")
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
    parts = [heading]
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
    return "\n\n".join([*parts, source_of_parts(name, result)])


_SOAK_KINDS = {
    "llava": "LLaVA",
    "qwen2_vl": "Qwen2-VL (M-RoPE)",
    "qwen3_vl": "Qwen3-VL (M-RoPE)",
}


def _trial_key(runner: str, trial: dict[str, Any]) -> tuple[str, str, str]:
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    cuts = [f"{k.replace('_', '-')} {trial[k]}" for k, v in neutral.items() if trial[k] != v]
    rule = "MSD" if trial["wrong_rule"] == "none" else f"wrong: {trial['wrong_rule']}"
    return runner, rule, ", ".join([f"temperature {trial['temperature']}", *cuts])


def faults(name: str, result: dict[str, Any]) -> str:
    """The long forms of the tests with odd inputs: what was tried, how often, what came of it."""
    rows = []
    for part, report in result.items():
        settings = report["provenance"]["settings"]
        outcome = ", ".join(
            figure
            for what, found in report.items()
            if what not in ("provenance", "memory_at_rest")
            for figure in _figures(what.replace("_", " "), found)
        )
        tried = part.replace("-", " ")
        rows.append((tried, settings.get("examples"), settings.get("seed"), outcome))
    return "\n\n".join(
        [
            "## Odd inputs",
            "Odd settings, requests and files, drawn at random, and what came of them:",
            table(["tried", "examples", "seed", "outcome"], rows),
            source_of_parts(name, result),
        ]
    )


def _figures(what: str, found: Any) -> list[str]:
    """A figure in words; of a table its entries, of a list its length."""
    if isinstance(found, dict):
        return [
            figure for key, value in found.items() for figure in _figures(f"{what} {key}", value)
        ]
    if isinstance(found, bool):
        return [f"{what}: {'yes' if found else 'no'}"]
    return [f"{what}: {len(found) if isinstance(found, list) else shown(found)}"]

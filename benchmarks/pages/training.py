"""What training gives and costs."""

from statistics import mean
from typing import Any

from .tables import source, table

# Of kinds of work; the others are the kinds.
SUMS = ("multimodal", "all")
PICTURE = "pictures/training.png"  # as docs/training.md sees it


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
            source(name, result),
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
            source(name, result),
        ]
    )

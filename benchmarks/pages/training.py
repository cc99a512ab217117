"""What training gives and costs."""

from statistics import mean
from typing import Any

from . import training_chart
from .tables import source, table

# Of kinds of work; the others are the kinds.
SUMS = ("multimodal", "all")


def training(name: str, result: dict[str, Any]) -> str:
    """The paper's claims about visual rows and stages, and training over several steps."""
    return "\n\n".join([*_compared(result), *_shown(name, result)])


def training_walk(name: str, result: dict[str, Any]) -> str:
    """Visual rows and losses, where answers read the picture on the way."""
    walks, settings = result["walks"], result["settings"]
    rows = [
        (sort, picture, *(f"{share:.0%}" for share in shares))
        for sort, pictures in walks["sorts"].items()
        for picture, shares in pictures.items()
    ]
    places = max(len(row) for row in rows) - 2
    return "\n\n".join(
        [
            "### Reading the picture while answering",
            f"The kind `walk`: {settings['walks']} records of it among {settings['records']} of "
            f"text and {settings['records']} of the other kinds, and {settings['num_walks']} "
            "held-out questions. Shares of the target's answers whose first, second, ... colour "
            "(of objects, of signs) or value is the one in the question's picture, when shown "
            "that picture (own) and another one of the sort (other); "
            f"{walks['requests']} questions:",
            table(
                ["walk through", "picture", *(str(place + 1) for place in range(places))],
                [(*row, *["-"] * (places + 2 - len(row))) for row in rows],
            ),
            *_compared(result),
            _trained_on(result),
            *_shown(name, result),
        ]
    )


def _trained_on(result: dict[str, Any]) -> str:
    """Where the runs were trained: all were counted on the machine below."""
    places: dict[str, list[str]] = {}
    for run in result["runs"]:
        places.setdefault(run["trained_on"], []).append(f"{run['variant']} {run['seed']}")
    listed = "; ".join(f"on {name}: {', '.join(runs)}" for name, runs in places.items())
    return f"Trained, with the seed, {listed}. All were counted on the machine below."


def _shown(name: str, result: dict[str, Any]) -> list[str]:
    return [
        f"![Tokens per verification by kind of work]({training_chart.PICTURES[name]})",
        source(name, result),
    ]


def _compared(result: dict[str, Any]) -> list[str]:
    """Acceptance by variant, kind and depth."""
    settings, variants = result["settings"], result["summary"]

    def spread(values: list[float]) -> str:
        return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    kinds = [kind for kind in next(iter(variants.values()))["eval"]["lengths"] if kind not in SUMS]
    by_depth = training_chart.content(result)["by_depth"]
    rows, depths = [], []
    for variant, ways in variants.items():
        lengths = training_chart.counted(ways)["lengths"]
        cells = [mean(lengths[kind]) for kind in kinds]
        rows.append((f"`{variant}`", spread(lengths["multimodal"]), *cells))
        depths.append((f"`{variant}`", *by_depth[variant]))
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
    questions = settings["num_prompts"] + settings.get("num_walks", 0)
    return [
        f"Tokens per verification, five drafted, greedy, fp32, {questions} held-out questions; "
        f"{len(settings['seeds'])} seeds of {settings['steps']} steps each, mean over the seeds, "
        "their range in brackets:",
        table(["draft", "with images", *kinds], rows),
        "Share of verifications that accept so many drafted tokens or more:",
        table(["draft", *(str(depth) for depth in range(1, len(depths[0])))], depths),
        f"Counted in vLLM, where {same} of {asked} answers were those without a draft; drafts that "
        "see no visual rows, which vLLM cannot serve, by `vllm-msd eval`. The two ways of counting "
        f"differ by {apart:.1%} at most.",
    ]


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

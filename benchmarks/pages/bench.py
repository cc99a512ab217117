"""What `vllm-msd bench` found: which drafting works at which load, and how fast it is."""

from typing import Any

from vllm_msd.bench.figures import NOT_SLOWER, verdict
from vllm_msd.measure.report.parts import number, times

from .real import NAME
from .tables import source, table


def support(name: str, result: dict[str, Any], target: str | None = None) -> str:
    """The support matrix of one target, with speed-ups and shares of the ideal.

    Args:
        name, result: a result file.
        target: what to call it; None for what the settings say.
    """
    cells = [cell for cell in result["cells"] if cell["temperature"] == 0]
    settings = result["settings"]
    target = (
        target
        or settings["target"]
        or (f"the demo pair widened to {settings['wide']}" if settings["wide"] else "the demo pair")
    )
    rows = []
    for arm, about in result["arms"].items():
        if arm == "none":
            continue
        by_batch = result["support"][arm]
        found = [cell["arms"][arm] for cell in cells]
        texts = []
        for cell, one in zip(cells, found, strict=True):
            word = verdict(by_batch[str(cell["batch"])])
            share = one["share_of_ideal_speedup"]
            of_ideal = "" if share is None else f", {share:.2f} of the ideal"
            texts.append(f"{word}, {one['speedup']:.2f}x{of_ideal}")
        rows.append((about, *texts))
    ties = sum(one["near_ties"] for cell in cells for one in cell["arms"].values())
    return "\n\n".join(
        [
            f"**Target: {target}.** Greedy, by requests at a time; *works* means the answers of no "
            f"speculation and at least {NOT_SLOWER} times its speed. Near ties, which count as the "
            f"same answer: {ties}.",
            table(["drafting", *(str(cell["batch"]) for cell in cells)], rows),
            *_auto(cells),
            source(name, result),
        ]
    )


def support_real(name: str, result: dict[str, Any]) -> str:
    """As `support`, of the real language model."""
    return support(name, result, f"{NAME}, a real language model")


def _auto(cells: list[dict[str, Any]]) -> list[str]:
    """Sizes that follow the load against the best that is fixed, where both were measured."""
    found = [(cell["batch"], cell["auto"]) for cell in cells if "auto" in cell]
    if not found:
        return []
    names = {
        "of_none": "of no speculation",
        "of_best_fixed": "of the best fixed size",
        "share_of_ideal_speedup": "share of the ideal speed-up",
        "share_of_ideal_tokens_per_second": "share of the products' tokens/s",
    }
    rows = [(title, *(one[key] for _, one in found)) for key, title in names.items()]
    rows.insert(2, ("which was", *(one["best_fixed"] for _, one in found)))
    return [
        "Sizes that follow the load, by requests at a time:",
        table(["", *(str(batch) for batch, _ in found)], rows),
    ]


def shaped(name: str, result: dict[str, Any]) -> str:
    """Random weights of a published model's shape: what its steps cost, with acceptance from a
    table."""
    shape = result["shape"]
    arms = [arm for arm in result["arms"] if arm != "none"]
    rows = [
        (
            str(cell["batch"]),
            number(cell["arms"]["none"]["decode_tokens_per_second"]),
            *(
                f"{times(one['decode_speedup'])} ({times(one['speedup'])}), "
                f"{number(one['acceptance_length'])} tokens"
                for one in (cell["arms"][arm] for arm in arms)
            ),
        )
        for cell in result["cells"]
        if cell["temperature"] == 0
    ]
    note = shape["note"][0].upper() + shape["note"][1:]
    return "\n\n".join(
        [
            f"**{note}**: random weights in the shape of {shape['name']}, greedy. A tree of 60 "
            "nodes (6 deep, top-k 10) accepts so that it yields "
            f"{shape['tokens_of_a_tree_of_60']:g} tokens a verification, the others what the same "
            "draft would. Speed-up of steps that only decode, in brackets with the prompts, and "
            "tokens per verification. Outputs are noise and not compared.",
            table(["requests", "none, tokens/s", *(result["arms"][arm] for arm in arms)], rows),
            source(name, result),
        ]
    )

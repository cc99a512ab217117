"""What `vllm-msd bench` found: which drafting works at which load, and how fast it is."""

from typing import Any

from vllm_msd.bench.figures import NOT_SLOWER, verdict

from .tables import source, table


def support(name: str, result: dict[str, Any]) -> str:
    """The support matrix of one target, with speed-ups and shares of the ideal."""
    cells = [cell for cell in result["cells"] if cell["temperature"] == 0]
    settings = result["settings"]
    target = settings["target"] or (
        f"the demo pair widened to {settings['wide']}" if settings["wide"] else "the demo pair"
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
            f"Target: {target}. Greedy, by requests at a time; *works* means the answers of no "
            f"speculation and at least {NOT_SLOWER} times its speed. Near ties, which count as the "
            f"same answer: {ties}.",
            table(["drafting", *(str(cell["batch"]) for cell in cells)], rows),
            source(name, result),
        ]
    )

"""The real language model, measured by `vllm-msd bench`."""

from typing import Any

from vllm_msd.measure.engine import SHORT

from .tables import machine, source, table

NAME = "SmolLM2-135M"


def headline(name: str, result: dict[str, Any]) -> str:
    """The README's first figures."""
    arms = _cell(result, 0, 1)["arms"]
    found, chain, ngram = arms["auto"], arms["chain"], arms["ngram"]
    drawn = _cell(result, 1, 1)["arms"]["auto"]
    with_msd, without = found["tokens_per_second"], arms["none"]["tokens_per_second"]
    return (
        f"**A real language model**, {NAME} at its own size, on prompts by people that its draft "
        f"never saw ({machine(result)}, greedy, one request at a time): {with_msd:.1f} tokens/s "
        f"instead of {without:.1f} with sizes that follow the load, {found['speedup']:.2f}x; "
        f"{chain['speedup']:.2f}x with a chain of 5, which yields "
        f"{chain['acceptance_length']:.2f} tokens per verification (vLLM's `ngram`: "
        f"{ngram['speedup']:.2f}x). At temperature 1 this draft guesses too little: "
        f"{drawn['speedup']:.2f}x."
    )


def real(name: str, result: dict[str, Any]) -> str:
    """Speed, acceptance and identity by batch size and temperature."""
    rows, depths = [], []
    for cell in result["cells"]:
        for arm, one in cell["arms"].items():
            same = "-"
            if "identical" in one and arm != "none":
                same = f"{one['identical']} of {one['requests']}"
                if one["near_ties"]:
                    same += f", {one['near_ties']} near ties"
            rows.append(
                (
                    f"{cell['temperature']:g}",
                    cell["batch"],
                    result["arms"][arm],
                    f"{one['tokens_per_second']:.1f}",
                    f"{one['speedup']:.2f}x",
                    one["acceptance_length"],
                    same,
                )
            )
            if arm == "chain" and cell["batch"] == 1:
                shares = one["acceptance_rate_per_position"]
                depths.append((f"{cell['temperature']:g}", *(f"{share:.2f}" for share in shares)))
    settings = result["settings"]
    return "\n\n".join(
        [
            "## A real language model",
            f"{NAME}-Instruct as the language model of a LLaVA, at its own size, and the draft "
            "that comes with the package; held-out prompts by people, answers of at most "
            f"{settings['max_tokens']} tokens, {SHORT[result['dtype']]}. Speeds count the prompts:",
            table(
                [
                    *("temperature", "requests at a time", "drafting", "tokens/s", "speed-up"),
                    *("tokens per verification", "same answers"),
                ],
                rows,
            ),
            "Share of the chain's verifications that accept so many drafted tokens or more, one "
            "request at a time:",
            table(["temperature", *(str(n + 1) for n in range(len(depths[0]) - 1))], depths),
            source(name, result),
        ]
    )


def _cell(result: dict[str, Any], temperature: float, batch: int) -> dict[str, Any]:
    (found,) = (
        cell
        for cell in result["cells"]
        if cell["temperature"] == temperature and cell["batch"] == batch
    )
    return found

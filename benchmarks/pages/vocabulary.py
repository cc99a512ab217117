"""What a draft vocabulary costs and brings on a real vocabulary: a section and its chart."""

from pathlib import Path
from typing import Any

from vllm_msd.measure.engine import SHORT

from .chart import CHAIN, INK, PLAIN, description
from .tables import source, table

SOURCE = "benchmarks/results/vocabulary.json"
PICTURE = "pictures/vocabulary.svg"  # as docs/training.md sees it
OWN, WHOLE = "as it comes", "whole"  # names of `benchmarks/bench_vocabulary.py`


def vocabulary(name: str, result: dict[str, Any]) -> str:
    """Speed and accepted tokens by size."""
    drafts, settings = result["drafts"], result["settings"]
    rows = [
        (
            _size(one) + (" (as it comes)" if draft == OWN else ""),
            one["acceptance_length"],
            f"{one['accepted_of_whole']:.1%}",
            f"{one['tokens_per_second']:.1f}",
            f"{one['speedup_over_none']:.2f}x",
            f"{one['speedup_over_whole']:.2f}x",
        )
        for draft, one in drafts.items()
    ]
    own = drafts[OWN]
    return "\n\n".join(
        [
            "### A draft vocabulary on 49,152 tokens",
            f"The real language model's draft, {result['drafting']}, over vocabularies of several "
            f"sizes: {settings['num_prompts']} held-out prompts by people, one at a time, greedy, "
            f"answers of at most {settings['max_tokens']} tokens, {SHORT[result['dtype']]}, all "
            f"engines in turn, {settings['rounds']} rounds:",
            table(
                [
                    *("tokens it can propose", "tokens per verification", "accepted, of all"),
                    *("tokens/s", "over no speculation", "over all tokens"),
                ],
                rows,
            ),
            f"As it comes, with {_size(own)} tokens, it keeps {own['accepted_of_whole']:.1%} of "
            f"the accepted tokens and decodes {own['speedup_over_whole']:.2f} times as fast. It "
            "was trained with these tokens, so what it guesses beyond them is less practised: a "
            "draft trained with all tokens may lose more by a smaller vocabulary.",
            f"![Accepted tokens and decoding speed by draft vocabulary]({PICTURE})",
            source(name, result),
        ]
    )


def _size(one: dict[str, Any]) -> str:
    return f"{one['draft_vocab_size']:,}" if one["draft_vocab_size"] else "all"


def content(result: dict[str, Any]) -> dict[str, Any]:
    """What the chart shows: shares of the whole vocabulary's figures, by size."""
    drafts = result["drafts"]
    return {
        "sizes": [_size(one) for one in drafts.values()],
        "accepted": [round(one["accepted_of_whole"], 3) for one in drafts.values()],
        "speed": [round(one["speedup_over_whole"], 3) for one in drafts.values()],
    }


def draw(wanted: dict[str, Any], path: Path) -> None:
    """Draw the chart."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "vllm-msd", "text.color": INK, "font.size": 10.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        places = range(len(wanted["sizes"]))
        axes.plot(places, wanted["speed"], "o-", color=CHAIN, label="decoding speed")
        axes.plot(places, wanted["accepted"], "o-", color=PLAIN, label="accepted tokens")
        axes.axhline(1, color=INK, linewidth=0.6)
        axes.set_xticks(places, wanted["sizes"])
        axes.set_xlabel("tokens that the draft can propose", color=INK)
        axes.set_title("Of the same draft with all tokens", fontsize=11.5, color=INK, loc="left")
        axes.set_ylim(0, 1.15 * max(1, *wanted["speed"], *wanted["accepted"]))
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(framealpha=0, labelcolor=INK, loc="lower right")
        about = {"Date": None, "Creator": None, "Description": description(wanted)}
        figure.savefig(path, transparent=True, metadata=about)

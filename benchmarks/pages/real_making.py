"""How the real pair was made, and what came of it: its target's eyes and English, its drafts."""

from pathlib import Path
from typing import Any

from .chart import CHAIN, INK, description
from .tables import source, table

TARGET = "benchmarks/results/real_target.json"
DRAFTS = "benchmarks/results/real_draft.json"
PICTURE = "pictures/real_draft.svg"  # as docs/training.md sees it


def target(name: str, result: dict[str, Any]) -> str:
    """What the target gets right, and what seeing cost its English."""
    right = [
        (kind, found["right"], found["random_guess"], found["wrong_image"])
        for kind, found in result["accuracy"].items()
    ]
    slots, spoken = result["slots"], result["perplexity"]
    own, other = (
        ", ".join(
            f"{sort} {share[seen][-1]:.2f}" for sort, share in result["walks"]["sorts"].items()
        )
        for seen in ("own", "other")
    )
    return "\n\n".join(
        [
            "### What the real target sees",
            f"Share of right answers on {result['settings']['per_kind']} held-out prompts of each "
            f"kind ({result['accuracy']['easy-vqa']['questions']} of `easy-vqa`'s own test split, "
            "equally many for each answer), beside a random guess and the target's answers to "
            "another prompt's image:",
            table(["kind of work", "right", "random guess", "wrong image"], right),
            f"The tower alone reads {slots['vision']['all']:.1%} of held-out slots, "
            f"{slots['answers']['all']:.1%} after the tuning. In answers that walk through a "
            f"picture the last thing read is right this often: {own}; with another picture: "
            f"{other}. Its English: the perplexity of its own earlier replies to "
            f"{spoken['replies']} held-out prompts was {spoken['before']:.3f} before the tuning "
            f"and is {spoken['after']:.3f} ({spoken['change']:+.1%}).",
            source(name, result),
        ]
    )


def drafts(name: str, result: dict[str, Any]) -> str:
    """Acceptance against data; with the own picture, another one and a grey one in the draft."""
    found = result["variants"]
    rows = [
        (
            variant,
            f"{one['learning'][-1]['records']:,}",
            f"{one['minutes']:.0f}",
            *(one["text"]["kinds"][kind]["acceptance_length"] for kind in ("chat", "question")),
            one["text"]["all"]["acceptance_length"],
        )
        for variant, one in found.items()
    ]
    parts = [
        "### The real pair's drafts",
        "Tokens per verification of greedy chains of five on "
        f"{result['settings']['prompts']} held-out prompts of each kind, by `vllm-msd eval`. "
        "`text` is the first stage, `final` the second, which goes on from it with pictures mixed "
        "in; all on the target that sees:",
        table(["draft", "records", "minutes", "chat", "questions", "all"], rows),
        "On the way through its one pass over the talks, counted on held-out ones with replies of "
        "all temperatures, the first stage was at:",
        f"![Tokens per verification by records seen]({PICTURE})",
    ]
    seeing = {variant: one for variant, one in found.items() if "own" in one}
    for variant, one in seeing.items():
        kinds = [
            (kind, *(one[seen][kind]["acceptance_length"] for seen in ("own", "other", "grey")))
            for kind in one["own"]
        ]
        parts += [
            f"`{variant}` on {result['settings']['per_kind']} held-out questions of each kind "
            "about pictures, by what the draft (not the target) is shown:",
            table(["kind of work", "own picture", "another one's", "a grey one"], kinds),
        ]
    return "\n\n".join([*parts, source(name, result)])


def content(result: dict[str, Any]) -> dict[str, Any]:
    """What the chart shows: the first stage, by records."""
    learning = result["variants"]["text"]["learning"]
    return {
        "records": [one["records"] for one in learning],
        "lengths": [round(one["acceptance_length"], 3) for one in learning],
    }


def draw(wanted: dict[str, Any], path: Path) -> None:
    """Draw the chart."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "vllm-msd", "text.color": INK, "font.size": 10.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(wanted["records"], wanted["lengths"], "o-", color=CHAIN)
        for place in zip(wanted["records"], wanted["lengths"], strict=True):
            axes.annotate(f"{place[1]:.2f}", place, (0, 7), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(wanted["records"], [f"{n:,}" for n in wanted["records"]])
        axes.minorticks_off()
        axes.set_xlabel("talks seen once", color=INK)
        axes.set_title("Tokens per verification", fontsize=11.5, color=INK, loc="left")
        axes.set_ylim(1, 1.15 * max(wanted["lengths"]))
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        about = {"Date": None, "Creator": None, "Description": description(wanted)}
        figure.savefig(path, transparent=True, metadata=about)

"""Acceptance and speed: the demo pair, trees, the visual branch."""

from typing import Any

from vllm_msd.measure.engine import SHORT

from .tables import machine, source, table


def headline(name: str, result: dict[str, Any]) -> str:
    """The README's line of figures: one chain, its acceptance and speed, and the machine."""
    settings, drafting = result["settings"], "chain of 5"
    accepted, speed = result["acceptance"][drafting], result["speed"]
    found = speed["draftings"][drafting]
    return (
        f"On a CPU ({machine(result)}) a {drafting} yields "
        f"{accepted['multimodal']['acceptance_length']:.2f} tokens per verification on the demo "
        f"pair's questions about images, and {accepted['identical']} of {accepted['requests']} "
        f"answers are those without a draft. The pair widened to {settings['size']} decodes "
        f"{found['msd_tokens_per_second']:.1f} tokens/s instead of "
        f"{speed['plain_tokens_per_second']:.1f} (greedy, batch 1, "
        f"{SHORT[settings['dtype']]})."
    )


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
            "## The demo",
            f"Tokens per verification, the target's own token counted, with "
            f"{settings['num_speculative_tokens']} drafted (greedy, fp32):",
            table(["kind of work", "tokens per verification"], kinds),
            "Decoding at batch 1, both engines in one interleaved run. A model as small as the "
            "demo's is all overhead, so its speed says little; the widened pair computes the same "
            "functions at a larger shape. Its acceptance comes from the small pair, its cost from "
            "the large shape:",
            table(["pair", "tokens/s without", "with MSD", "speed-up", "same output"], rows),
            source(name, result),
        ]
    )


def trees(name: str, result: dict[str, Any]) -> str:
    """Chains and trees: acceptance, speed, and what drafting costs."""
    settings = result["settings"]
    parts = ["## Trees"]
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
    return "\n\n".join([*parts, source(name, result)])


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


def auto(name: str, result: dict[str, Any]) -> str:
    """Sizes that follow the load, beside fixed ones, by requests at once."""
    settings, batches = result["settings"], result["batches"]
    arms = list(next(iter(batches.values()))["arms"])
    rows, same, asked = [], 0, 0
    for batch, found in batches.items():
        speedups = []
        for arm in arms:
            one = found["arms"][arm]
            low, high = min(one["per_round"]), max(one["per_round"])
            speedups.append(f"{one['speedup']:.2f}x ({low:.1f}-{high:.1f})")
            if arm != arms[0]:  # no speculation itself
                same, asked = same + one["identical"], asked + one["requests"]
        rows.append((batch, *speedups, found["auto_of_best_fixed"]))
    return "\n\n".join(
        [
            "## Sizes that follow the load",
            f"Widened to {settings['size']}, {settings['dtype']}, greedy, one interleaved run: "
            "whole answers, prefill included, against no speculation (tokens/s, the slowest and "
            f"the fastest pass). {same} of {asked} answers are those of no speculation (near ties "
            "may come out either way in bf16). The wrong draft has shuffled weights, and its "
            "sizes follow the load as well.",
            table(["requests", *arms, "auto of the best fixed"], rows),
            source(name, result),
        ]
    )


def visual_branch(name: str, result: dict[str, Any]) -> str:
    """What the image is worth to the draft."""
    groups = [*result["by_kind"].items(), ("**all**", result["all"])]
    images = ("own_image", "swapped_image", "noise")
    rows = [
        (kind, *(found[image]["acceptance_length"] for image in images)) for kind, found in groups
    ]
    return "\n\n".join(
        [
            "## The visual branch",
            "Tokens per verification when the draft, and the draft alone, is given another "
            "request's image of the same kind, or noise of the image embeddings' mean and spread; "
            f"{result['identical']} of {result['requests']} answers stayed as they were:",
            table(["kind of work", "own image", "another's image", "noise"], rows),
            source(name, result),
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
            "## The demo target",
            f"Share of right answers on {result['settings']['per_kind']} held-out prompts of each "
            "kind, beside what a random guess gets and what the target gets with another prompt's "
            "image:",
            table(["kind of work", "right", "random guess", "wrong image"], right),
            source(name, result),
        ]
    )

"""The section about the real language model."""

from html import escape
from typing import Any

from vllm_msd.demo.report.answers import card
from vllm_msd.demo.samples import KIND_NAMES
from vllm_msd.measure.engine import SHORT
from vllm_msd.measure.report.bars import bars
from vllm_msd.measure.report.parts import number, panel, tile, times

SHOWN = 2  # answers to prompts, and to questions about pictures


def real_section(real: Any) -> str:
    """Markup of a `vllm_msd.demo.real.run.RealFigures`, of a text that says why there is none, or
    of None, when it was not asked for."""
    if real is None:
        return ""
    head = "<h2>A real language model</h2>"
    if isinstance(real, str):
        return head + f'<p class="soft">Left out of this run: {escape(real)}</p>'
    exact, speed = real.exact, real.timed["speed"]
    same = f"{exact['identical']} of {exact['requests']}"
    factor = speed["speedup"]
    tiles = [
        tile(
            same,
            "answers identical with and without MSD (fp32, greedy)",
            "good" if exact["identical"] == exact["requests"] else "bad",
        ),
        tile(
            number(exact["all"]["acceptance_length"]),
            f"tokens per verification, the target's own included, with a {real.drafting}",
        ),
        tile(
            times(factor),
            f"the decoding speed without MSD, in {SHORT[real.dtype]}",
            "good" if factor and factor > 1 else "bad",
        ),
    ]
    kinds = exact["by_kind"]
    accepted = [
        (KIND_NAMES[kind], one["acceptance_length"], number(one["acceptance_length"]), "msd")
        for kind, one in kinds.items()
    ]
    rates = [
        ("without MSD", speed["plain_tokens_per_second"], "plain"),
        (f"with a {real.drafting}", speed["msd_tokens_per_second"], "msd"),
    ]
    fastest = max(rate or 0 for _, rate, _ in rates)
    panels = panel(
        "Tokens per verification",
        "fp32. 1 means nothing accepted.",
        bars(accepted, real.drafting.deepest + 1),
    ) + panel(
        "Decoding speed, tokens per second",
        f"Batch 1, greedy, {SHORT[real.dtype]}; the engines took turns on the same cores.",
        bars([(label, rate, number(rate, 1), colour) for label, rate, colour in rates], fastest),
    )
    pictured = [one for one in real.answers if one.sample.images]
    spoken = [one for one in real.answers if not one.sample.images]
    shown = [*spoken[:SHOWN], *pictured[:SHOWN]]
    return (
        f"{head}<p>SmolLM2-135M-Instruct, 135 million parameters, as the language model of a LLaVA "
        "at its own size: nothing is widened here. It was taught to see, and its draft was trained "
        "on replies of its own. It answers prompts by people that training never saw, and "
        "questions about drawn pictures.</p>"
        f'<div class="tiles">{"".join(tiles)}</div><div class="panels">{panels}</div>'
        "<h3>Some of its answers</h3>" + "".join(card(one) for one in shown)
    )

"""What a server gains by the CPU's environment."""

from typing import Any

from .tables import source, table


def environment(name: str, result: dict[str, Any]) -> str:
    """Throughput with and without it, and with and without MSD."""
    servers = result["servers"]
    rows = []
    for server in servers:
        plain = next(
            one for one in servers if one["environment"] == server["environment"] and not one["msd"]
        )
        texts = []
        for load, other in zip(server["loads"], plain["loads"], strict=True):
            rate = load["output_throughput"]
            ratio = f" ({rate / other['output_throughput']:.2f}x)" if server["msd"] else ""
            texts.append(f"{rate:.0f}{ratio}")
        drafts = "MSD, what pays" if server["msd"] else "no speculation"
        rows.append((server["environment"], server["dtype"], drafts, *texts))
    settings = result["settings"]
    return "\n\n".join(
        [
            "## The environment of a CPU",
            "The demo pair behind `vllm serve`, eager, as a new user starts it and after "
            '`eval "$(vllm-msd env)"`, in float32 where the processor emulates the checkpoint\'s '
            "dtype. Output tokens per second by requests at a time, prompts included, in brackets "
            f"over no speculation; {settings['num_prompts']} requests of at most "
            f"{settings['max_tokens']} tokens, one pass:",
            table(
                [
                    *("environment", "dtype", "drafting"),
                    *(load["load"] for load in servers[0]["loads"]),
                ],
                rows,
            ),
            source(name, result),
        ]
    )

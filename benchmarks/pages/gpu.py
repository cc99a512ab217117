"""What was measured on a GPU: engines, and the kernels by themselves."""

from statistics import median
from typing import Any

from .tables import source, table


def smoke(name: str, result: dict[str, Any]) -> str:
    """Identity and acceptance by how an engine runs."""
    rows = []
    for stage, arms in result["stages"].items():
        for arm, row in arms.items():
            if "identical" in row:
                same = f"{row['identical']} of {row['requests']}"
                rows.append((stage, arm, same, row["accepted"], row["drafted"] - row["accepted"],
                             row["acceptance_length"]))  # fmt: skip
    head = ["engine", "drafting", "same token ids", "drafts accepted", "rejected"]
    parts = [
        "### On a GPU: the same answers",
        "The demo pair, greedy, fp32, one request at a time, Model Runner V2, against no "
        "speculation on the same GPU:",
        table([*head, "tokens per verification"], rows),
        source(name, result),
    ]
    return "\n\n".join(parts)


def speed(name: str, result: dict[str, Any]) -> str:
    """Steps and speed-ups by batch, and where a step's time goes."""
    traces = {(row["batch"], row["drafted"]): row for row in result.get("profile", ())}
    rows = []
    for row in result["speed"]:
        rounds = row["rounds"]
        trace = traces.get((row["batch"], row["drafted"]), {})
        rows.append(
            (
                row["batch"],
                row["drafted"],
                _middle(rounds, "tokens_per_second"),
                f"{row['speedup']:.2f}x",
                _middle(rounds, "tokens_per_verification"),
                _middle(rounds, "median_step_ms"),
                trace.get("gpu_ms"),
                f"{row['identical']} of {row['requests']}",
            )
        )
    head = ["requests", "drafting", "tokens/s", "speed-up", "tokens per verification", "step, ms"]
    size = result["settings"]["size"]
    parts = [
        f"### On a GPU: speed at {size}",
        f"The demo pair widened to {size} (its acceptance, the cost of a model of that size), "
        f"bf16, greedy, CUDA graphs without torch.compile, all arms in turn in one run, prompts "
        "counted. *GPU* is the time in which kernels ran, of a step of a separate, traced run. In "
        "bf16 near ties may come out either way.",
        table([*head, "GPU, ms", "same answers"], rows),
        source(name, result),
    ]
    return "\n\n".join(parts)


def kernels(name: str, result: dict[str, Any]) -> str:
    """The criteria of the attention benchmark and its figures at the largest trees."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = [(c["what"], c["value"], c["limit"], words[c["passed"]]) for c in result["criteria"]]
    parts = [
        "### Tree attention, measured",
        f"On {result['device']}, whose copies reach {result['copy_bytes_per_second'] / 1e12:.2f} "
        "TB/s (bytes read and written), one layer, medians of replayed CUDA graphs with a cold L2:",
        table(["what", "measured", "limit", ""], rows),
        _attention_table(result),
        f"`{name}`, {result['date']}; " + _versions(result),
    ]
    return "\n\n".join(parts)


def growth(name: str, result: dict[str, Any]) -> str:
    """Kernels of the growth beside PyTorch's operations, both in CUDA graphs."""
    rows = [
        (row["model"], row["tree"], row["batch"], row["name"], row.get("microseconds"),
         row.get("pytorch_microseconds"), row.get("bound_microseconds"), row.get("reason"))
        for row in result["rows"]
    ]  # fmt: skip
    head = ["model", "tree", "requests", "what", "microseconds", "PyTorch", "bound", ""]
    parts = [
        "### Growing trees, measured",
        f"On {result['device']}, both sides replayed from CUDA graphs; *bound* is the logits' "
        "bytes over the copy bandwidth:",
        table(head, rows),
        f"`{name}`, {result['date']}; " + _versions(result),
    ]
    return "\n\n".join(parts)


def _middle(rounds: list[dict[str, Any]], key: str) -> float | None:
    found = [one[key] for one in rounds if one[key] is not None]
    return median(found) if found else None


def _attention_table(result: dict[str, Any]) -> str:
    cases: dict[tuple, dict[str, Any]] = {}
    for row in result["attention"]:
        case = (row["model"], row["batch"], row["context"], row["nodes"])
        cases.setdefault(case, {})[row["name"]] = row
    names = [n for n in ("ours", "ours, causal") if any(n in found for found in cases.values())]
    rows = [
        (*case, *(found.get(n, {}).get("microseconds") for n in names),
         found.get("ours", {}).get("share_of_copy"))
        for case, found in sorted(cases.items())
    ]  # fmt: skip
    head = ["model", "requests", "context", "nodes", *(f"{n}, microseconds" for n in names)]
    return table([*head, "share of copy bandwidth"], rows)


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in result["versions"].items()) + "."

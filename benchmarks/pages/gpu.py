"""What was measured on a GPU: engines, and the kernels by themselves."""

from statistics import median
from typing import Any

from .tables import source, table

GROWN = {"growth": "whole growth", "top-k": "top-k of one level"}


def smoke(name: str, result: dict[str, Any]) -> str:
    """Identity and acceptance by how an engine runs."""
    rows = []
    for stage, arms in result["stages"].items():
        for arm, row in arms.items():
            if "identical" in row:
                same = f"{row['identical']} of {row['requests']}"
                rejected = row["drafted"] - row["accepted"]
                rows.append((stage, arm, same, row["accepted"], rejected, row["acceptance_length"]))
    head = ["engine", "drafting", "same token ids", "drafts accepted", "rejected"]
    parts = [
        "## On a GPU: the same answers",
        "The demo pair, greedy, fp32, one request at a time, Model Runner V2 under vLLM 0.33, "
        "against no speculation in the same process:",
        table([*head, "tokens per verification"], rows),
        source(name, result),
    ]
    return "\n\n".join(parts)


def speed(name: str, result: dict[str, Any]) -> str:
    """Steps by batch, from traces, and what they make of the acceptance; whole answers beside."""
    traces = {(row["batch"], row["drafted"]): row for row in result["profile"]}
    rows = []
    for row in result["speed"]:
        if row["drafted"].startswith("auto"):
            continue
        trace, plain = traces[row["batch"], row["drafted"]], traces[row["batch"], "none"]
        tokens = _middle(row["rounds"], "tokens_per_verification")
        gain = (tokens or 1) * plain["gpu_ms"] / trace["gpu_ms"]
        rows.append(
            (row["batch"], row["drafted"], trace["gpu_ms"], tokens, f"{gain:.2f}x",
             f"{row['speedup']:.2f}x", f"{row['identical']} of {row['requests']}")
        )  # fmt: skip
    size = result["settings"]["size"]
    head = ["requests", "drafting", "a step's kernels, ms", "tokens per verification", "decoding"]
    parts = [
        f"## On a GPU: speed at {size}",
        f"The demo pair widened to {size} (its acceptance, the cost of a model of that size), "
        "bf16, greedy, CUDA graphs without torch.compile, Triton attention for all. *Decoding* is "
        "the speed-up that the time of a step's kernels and the tokens per verification give; the "
        "GPU waits for the host about 1 ms a step. *Whole answers* are short here, and the one "
        "process of this run prepared their images between its steps, so they say more of that "
        "than of drafting. In bf16 near ties may come out either way.",
        table([*head, "whole answers", "same answers"], rows),
        _medians(result),
        source(name, result),
    ]
    return "\n\n".join(parts)


def headline(name: str, result: dict[str, Any]) -> str:
    """One request at a time, by the median step."""
    steps = {
        row["drafted"]: (
            _middle(row["rounds"], "median_step_ms"),
            _middle(row["rounds"], "tokens_per_verification") or 1,
        )
        for row in result["speed"]
        if row["batch"] == 1
    }
    (plain, _), (chain, of_chain), (tree, of_tree) = (
        steps[arm] for arm in ("none", "chain 5", "tree 24")
    )
    gains = of_chain * plain / chain, of_tree * plain / tree
    return (
        f"**On a GPU** ({result['machine']['gpu']}, vLLM {result['versions']['vllm']}, the demo "
        f"pair widened to {result['settings']['size']}, bf16, greedy, one request at a time): a "
        f"step of no speculation takes {plain:.2f} ms, one that verifies a tree of 24 nodes "
        f"{tree:.2f} ms and yields {of_tree:.2f} tokens, so decoding is {gains[1]:.1f}x as fast; "
        f"a chain of 5: {gains[0]:.1f}x. Answers in fp32 are the same token by token. A first run, "
        "of minutes: [what it says and what not](docs/results.md#on-a-gpu-speed-at-7b)."
    )


def kernels(name: str, result: dict[str, Any]) -> str:
    """The attention kernel at trees of 60 nodes, and settling."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in result["attention"]:
        if row["nodes"] == 60 and "microseconds" in row:
            case = (row["model"], row["batch"], row["context"])
            found.setdefault(case, {})[row["name"]] = row
    rows = [
        (*case, row["ours"]["microseconds"],
         row["ours"]["bytes"] / row["ours"]["microseconds"] / 1e6,
         *(row.get(rival, {}).get("microseconds") for rival in ("ours, causal", "sdpa, dense")))
        for case, row in sorted(found.items())
    ]  # fmt: skip
    head = ["model", "requests", "context", "tree attention, microseconds", "TB/s"]
    summary, settles = result["summary"], {}
    for row in result["settle"]:
        settles.setdefault(row["model"], []).append(f"{row['microseconds']:.0f} at {row['batch']}")
    parts = [
        "### Tree attention, measured",
        f"One layer on an {result['device']}, bf16, trees of 60 nodes, medians of replayed CUDA "
        "graphs with a cold L2; TB/s are keys, values, queries and results once, over the time:",
        table([*head, "the same, causal mask", "PyTorch's SDPA, dense mask"], rows),
        f"Ours was the fastest in {summary['fastest_in']} of {summary['cases_with_alternatives']} "
        f"cases. What tree masks cost against a causal mask: {summary['masks_cost_median']:.1%} in "
        f"the median, {summary['masks_cost_worst']:.1%} at worst. The copy that this run compared "
        f"with reached {result['copy_bytes_per_second'] / 1e12:.2f} TB/s, less than the kernel: "
        "inside a graph it is no kernel. The benchmark has taken the quicker of two ways since.",
        "Settling all layers, five rows a request, microseconds by requests: "
        + "; ".join(f"{model} {', '.join(times)}" for model, times in settles.items())
        + ".",
        _origin(name, result),
    ]
    return "\n\n".join(parts)


def growth(name: str, result: dict[str, Any]) -> str:
    """Kernels of the growth beside PyTorch's operations, both in CUDA graphs."""
    rows = [
        (row["model"], row["tree"], row["batch"], GROWN[row["name"]], row.get("microseconds"),
         row.get("pytorch_microseconds"))
        for row in result["rows"]
        if row["name"] in GROWN
    ]  # fmt: skip
    head = ["model", "tree", "requests", "what", "microseconds", "in PyTorch's operations"]
    parts = [
        "### Growing trees, measured",
        f"On an {result['device']}, without the draft's layer, both sides replayed from CUDA "
        "graphs and compared before they are timed:",
        table(head, rows),
        _origin(name, result),
    ]
    return "\n\n".join(parts)


def _medians(result: dict[str, Any]) -> str:
    found = [
        f"{row['drafted']} {_middle(row['rounds'], 'median_step_ms'):.2f} ms"
        for row in result["speed"]
        if row["batch"] == 1 and not row["drafted"].startswith("auto")
    ]
    return (
        f"The median step at one request, by the host's clock: {', '.join(found)}. The file also "
        "holds an arm with sizes that follow the load; it says nothing of them, since the run "
        "captured graphs for whole trees only."
    )


def _middle(rounds: list[dict[str, Any]], key: str) -> float | None:
    found = [one[key] for one in rounds if one[key] is not None]
    return median(found) if found else None


def _origin(name: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return f"`{name}`, {result['date']}; {result['device']}; {versions}."

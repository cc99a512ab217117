"""What was measured on a GPU: engines, and the kernels by themselves."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from .tables import source, table

TARGET = Path(__file__).parents[2] / "vllm_msd" / "demo" / "pair" / "target" / "config.json"
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
        f"The demo pair, greedy, fp32, one request at a time, Model Runner V2 under vLLM "
        f"{result['versions']['vllm']}, against no speculation in the same process. Engines had a "
        "given size of KV cache, which skips the profile of graph memory, and no server was run:",
        table([*head, "tokens per verification"], rows),
        source(name, result) + " Put together from the two runs' files.",
    ]
    return "\n\n".join(parts)


def speed(name: str, result: dict[str, Any]) -> str:
    """What was measured by batch, and what a step's kernels and the acceptance would allow."""
    traces = {(row["batch"], row["drafted"]): row["gpu_ms"] for row in result.get("profile", ())}
    rows = []
    for row in _arms(result):
        tokens = _middle(row["rounds"], "tokens_per_verification")
        kernels = traces.get((row["batch"], row["drafted"]))
        plain = traces.get((row["batch"], "none"))
        gain = f"{(tokens or 1) * plain / kernels:.2f}x" if kernels and plain else None
        rows.append(
            (row["batch"], row["drafted"], _middle(row["rounds"], "tokens_per_second"),
             f"{row['speedup']:.2f}x", tokens, _middle(row["rounds"], "median_step_ms"), kernels,
             gain, f"{row['identical']} of {row['requests']}")
        )  # fmt: skip
    size, small = result["settings"]["size"], json.loads(TARGET.read_text())
    head = ["requests", "drafting", "tokens/s", "speed-up", "tokens per verification"]
    head += ["median step, ms", "a step's kernels, ms", "kernels would allow", "same answers"]
    parts = [
        f"## On a GPU: speed at {size}",
        f"The demo pair widened to {size}: layers of that size, the small pair's acceptance. Its "
        f"vocabulary of {small['text_config']['vocab_size']:,} words and its images of "
        f"{small['image_seq_length']} tokens stay, so drafting and prompts cost less than a "
        "published model's. bf16, greedy, short answers, CUDA graphs without torch.compile, Triton "
        "attention for all arms (vLLM's own choice on such a GPU, FLASH_ATTN, was not run).",
        "Tokens/s and speed-up are measured over whole answers. At one request they hold. With "
        "more, the one process of this run prepared images between its steps, which held up all "
        "arms, as the median steps show: there they do not compare the arms. *Kernels would allow* "
        "is computed: from the time in which kernels ran, of a few traced steps, and the tokens "
        "per verification. Why some answers of trees differ in bf16 was not examined; in fp32, on "
        "the small pair, all are the same.",
        table(head, rows),
        "The file also holds an arm with sizes that follow the load. It says nothing of them, "
        "since the run captured graphs for whole trees only. The benchmark has been changed since: "
        "images are prepared before the clock starts.",
        source(name, result),
    ]
    return "\n\n".join(parts)


def headline(name: str, result: dict[str, Any]) -> str:
    """One request at a time: whole answers as measured, and what the steps come to."""
    found = {row["drafted"]: row for row in _arms(result) if row["batch"] == 1}
    plain = _middle(found["none"]["rounds"], "median_step_ms")
    whole, steps = [], []
    for arm in ("chain 5", "tree 24"):
        rounds = found[arm]["rounds"]
        tokens = _middle(rounds, "tokens_per_verification")
        whole.append(f"{found[arm]['speedup']:.1f}x")
        steps.append(f"{tokens * plain / _middle(rounds, 'median_step_ms'):.1f}x")
    size = result["settings"]["size"]
    return (
        f"**On a GPU**, first runs ({result['machine']['gpu']}, vLLM {result['versions']['vllm']}, "
        f"the demo pair widened to {size}, bf16, greedy, one request at a time, CUDA graphs, no "
        f"torch.compile, Triton attention for all): short whole answers come {whole[0]} as fast "
        f"with a chain of 5 and {whole[1]} with a tree of 24 nodes; by the median step and the "
        f"acceptance, decoding alone {steps[0]} and {steps[1]} (computed). The small pair in fp32 "
        f"answers the same token by token. No real model and no server was run there: "
        f"[what was and what was not](docs/results.md#on-a-gpu-speed-at-{size.lower()})."
    )


def kernels(name: str, result: dict[str, Any]) -> str:
    """The attention kernel by case beside what else was timed, and settling."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in result["attention"]:
        if "microseconds" in row:
            case = (row["model"], row["batch"], row["context"], row["nodes"])
            found.setdefault(case, {})[row["name"]] = row
    rivals = ("ours, causal", "sdpa, dense", "vllm unified, causal")
    rows = [
        (*case, row["ours"]["microseconds"],
         row["ours"]["bytes"] / row["ours"]["microseconds"] / 1e6,
         *(row.get(rival, {}).get("microseconds") for rival in rivals))
        for case, row in sorted(found.items())
    ]  # fmt: skip
    against = [
        f"{name} in {sum(_ours(row) < row[name]['microseconds'] for row in those)} of {len(those)}"
        for name in rivals[1:]
        if (those := [row for row in found.values() if name in row])
    ]
    head = ["model", "requests", "context", "nodes", "ours, microseconds", "TB/s", *rivals]
    summary, settles = result["summary"], {}
    for row in result["settle"]:
        settles.setdefault(row["model"], []).append(f"{row['microseconds']:.0f} at {row['batch']}")
    parts = [
        "### Tree attention, measured",
        f"One layer on an {result['device']}, bf16, medians of replayed CUDA graphs, L2 cold; "
        "TB/s are keys, values, queries and results once, over the time:",
        table(head, rows),
        f"Ours was faster than {', than '.join(against)} of the cases in which that was timed; no "
        "other rival ran. What tree masks cost against a causal mask: "
        f"{summary['masks_cost_at_target']:.1%} at 8 x 4096 with 60 nodes, "
        f"{summary['masks_cost_median']:.1%} in the median, {summary['masks_cost_worst']:.1%} at "
        "worst. The copy that this run compared with reached "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s, less than the kernel, since in a "
        "graph it is no kernel: shares of it say nothing. The benchmark now takes the quicker of "
        "two ways.",
        "Settling all layers, five rows a request, microseconds by requests: "
        + "; ".join(f"{model} {', '.join(times)}" for model, times in settles.items())
        + ".",
        _origin(name, result),
    ]
    return "\n\n".join(parts)


def _ours(row: dict[str, Any]) -> float:
    return row["ours"]["microseconds"]


def _arms(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["speed"] if not row["drafted"].startswith("auto")]


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


def _middle(rounds: list[dict[str, Any]], key: str) -> float | None:
    found = [one[key] for one in rounds if one[key] is not None]
    return median(found) if found else None


def _origin(name: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return f"`{name}`, {result['date']}; {result['device']}; {versions}."

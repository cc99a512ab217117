"""Drive a running server with image requests and print latency, throughput and acceptance.

    examples/serve.sh                                             (in another terminal)
    python examples/benchmark_serving.py
    python examples/benchmark_serving.py --request-rate 4 --max-concurrency 8 --num-prompts 100
    python examples/benchmark_serving.py --kinds chart,caption --output result.json

Requests are the demo's held-out samples, images with questions and text-only instructions; there
are 105, so more prompts repeat some. The load generator is vLLM's own, `vllm bench serve`; its
printout has more than the summary here.
TTFT is the time to the first token, TPOT the time per further token, both in milliseconds.
Acceptance comes from the server's /metrics; without speculative decoding there is none.
"""

import argparse
import base64
import io
import itertools
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        help="requests a second, at random times; inf sends as fast as --max-concurrency lets it",
    )
    parser.add_argument("--max-concurrency", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--kinds", help="of the demo's samples, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=20_000, help="of the arrival times")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def write_requests(path: Path, kinds: list[str], count: int) -> None:
    """Write held-out requests in the form of `vllm bench serve`'s custom_image data set.

    It sends one user message; for a conversation that is its last question.
    """
    from vllm_msd.demo.samples import held_out_samples

    samples = [one for one in held_out_samples() if one.kind in kinds]
    with path.open("w", encoding="utf-8") as file:
        for one in itertools.islice(itertools.cycle(samples), count):
            content = []
            for image in one.images:
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
                content.append({"type": "image_url", "image_url": {"url": url}})
            last = one.prompt[-1]["content"]
            content += [part for part in last if part["type"] == "text"]
            file.write(json.dumps({"content": content}) + "\n")


def served_model(base_url: str) -> tuple[str, str]:
    """Name of the model behind the server, and what it was loaded from."""
    try:
        with urllib.request.urlopen(f"{base_url}/v1/models", timeout=10) as reply:
            model = json.load(reply)["data"][0]
    except (urllib.error.URLError, OSError) as error:
        sys.exit(f"no server at {base_url} ({error}); start one with examples/serve.sh")
    return model["id"], model.get("root") or model["id"]


def summary(result: dict) -> dict:
    """The figures that matter, by the names they are printed with."""
    figures = {
        "completed requests": result["completed"],
        "failed requests": result["failed"],
        "TTFT median ms": result["median_ttft_ms"],
        "TTFT p99 ms": result["p99_ttft_ms"],
        "TPOT median ms": result["median_tpot_ms"],
        "TPOT p99 ms": result["p99_tpot_ms"],
        "requests/s": result["request_throughput"],
        "output tokens/s": result["output_throughput"],
    }
    if "spec_decode_acceptance_length" in result:
        figures["tokens per verification"] = result["spec_decode_acceptance_length"]
        figures["acceptance rate %"] = result["spec_decode_acceptance_rate"]
    return figures


def main() -> int:
    """Run the example."""
    args = parse_args()
    from vllm_msd.demo.samples import KIND_NAMES

    kinds = args.kinds.split(",") if args.kinds else list(KIND_NAMES)
    if unknown := set(kinds) - set(KIND_NAMES):
        known = ", ".join(KIND_NAMES)
        sys.exit(f"--kinds: got {', '.join(sorted(unknown))}; expected some of {known}")
    model, root = served_model(args.base_url)
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        write_requests(requests, kinds, args.num_prompts)
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", args.base_url, "--model", root, "--served-model-name", model),
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--dataset-name", "custom_image", "--dataset-path", str(requests)),
            *("--num-prompts", str(args.num_prompts), "--request-rate", str(args.request_rate)),
            *("--max-concurrency", str(args.max_concurrency), "--temperature", "0"),
            *("--custom-output-len", str(args.max_tokens), "--seed", str(args.seed)),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        result = json.loads((Path(folder) / "result.json").read_text())
    figures = summary(result)
    print(f"\n{model}: {args.num_prompts} requests, concurrency {args.max_concurrency}")
    for name, value in figures.items():
        print(
            f"  {name:<26}{value:>10.2f}"
            if isinstance(value, float)
            else f"  {name:<26}{value:>10}"
        )
    if "tokens per verification" not in figures:
        print("  no speculative decoding on this server")
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Drive one or two servers with image requests, by load: latency, throughput and acceptance.

    examples/serve.sh                                             (in another terminal)
    python examples/benchmark_serving.py
    python examples/benchmark_serving.py --concurrency 1 2 4 8 16 --chart sweep.png
    python examples/benchmark_serving.py --request-rate 1 2 4 --kinds chart,caption
    python examples/benchmark_serving.py --start --concurrency 1 4 16 --output result.json
    python examples/benchmark_serving.py --base-url http://a:8000 http://b:8000 --data q.json

Two addresses are compared, the first with the second; --start starts the two servers itself, one
after the other: examples/serve.sh with MSD, and the same without. Each concurrency is measured
with requests as fast as it lets them, each rate with the largest concurrency. Each load sends the
same requests, so a server must keep nothing of them: --start turns vLLM's caches of prefixes and
pictures off, and a server of your own needs --no-enable-prefix-caching --mm-processor-cache-gb 0.
Each server gets a small load first that does not count.

Requests are the demo's held-out samples, images with questions and text-only instructions, or those
of --data (see `vllm-msd bench --help`); where there are too few, some come again. The load
generator is vLLM's own, `vllm bench serve`, whose printout is shown only where it fails.
TTFT is the time to the first token, TPOT the time per further token, both in milliseconds.
Acceptance comes from the server's /metrics; without speculative decoding there is none.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVE = Path(__file__).with_name("serve.sh")
STARTS = {"with MSD": {}, "without": {"MSD": "0"}}
# A load is not to find in a cache what the one before has sent.
UNCACHED = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
PATIENCE = 60  # seconds that a server has to end in
COLUMNS = {
    "load": "load",
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "median_ttft_ms": "TTFT ms",
    "p90_ttft_ms": "p90",
    "median_tpot_ms": "TPOT ms",
    "p90_tpot_ms": "p90",
    "spec_decode_acceptance_length": "accepted",
    "failed": "failed",
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", nargs="+", default=["http://127.0.0.1:8000"], metavar="URL")
    parser.add_argument(
        "--start",
        action="store_true",
        help="start the servers here, on --port, one after the other",
    )
    parser.add_argument("--port", type=int, default=8000, help="for --start")
    parser.add_argument("--num-prompts", type=int, default=50, help="of each load")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[4], metavar="N")
    parser.add_argument(
        "--request-rate", nargs="+", type=float, default=[], metavar="R",
        help="requests a second, at random times",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--data", help="instead of the demo's samples; see `vllm-msd bench`")
    parser.add_argument("--kinds", help="of work, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=20_000, help="of the arrival times")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--chart", type=Path, help="draw throughput against latency, a PNG")
    args = parser.parse_args()
    if len(args.base_url) > 2:
        parser.error(f"--base-url: got {len(args.base_url)} addresses, expected one or two")
    if min([args.port, args.num_prompts, *args.concurrency, *args.request_rate]) <= 0:
        parser.error("got a number that is not above 0")
    return args


def write_requests(path: Path, data: str | None, kinds: list[str] | None, count: int) -> None:
    """Write ``count`` requests in the form of `vllm bench serve`'s custom_image data set."""
    from vllm_msd.bench.data import load_requests
    from vllm_msd.bench.serving_file import write_requests as write
    from vllm_msd.errors import MSDError

    try:
        samples = load_requests(data, (), count, kinds).samples
    except MSDError as error:
        sys.exit(str(error))
    write(path, itertools.islice(itertools.cycle(samples), count))


def served_model(base_url: str) -> tuple[str, str]:
    """Name of the model behind the server, and what it was loaded from."""
    try:
        with urllib.request.urlopen(f"{base_url}/v1/models", timeout=10) as reply:
            model = json.load(reply)["data"][0]
    except (urllib.error.URLError, OSError) as error:
        sys.exit(f"no server at {base_url} ({error}); start one with examples/serve.sh")
    return model["id"], model.get("root") or model["id"]


@contextmanager
def started(
    environment: dict[str, str], port: int, log: Path, command: Sequence[str] = ("bash", str(SERVE))
) -> Iterator[str]:
    """A server of examples/serve.sh, or of another command, while the block runs; its address."""
    url = f"http://127.0.0.1:{port}"
    if is_up(url):
        sys.exit(f"--port: another server answers at {url}; give another port")
    # Commands of this Python's environment, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *UNCACHED],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **environment},
            start_new_session=True,
        )
    try:
        while not is_up(url):
            if process.poll() is not None:
                sys.exit("the server did not start:\n" + log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        if process.poll() is None:
            stop(process)


def stop(process: subprocess.Popen, patience: float = PATIENCE) -> None:
    """End a server and what it has started; by force where it does not end in so many seconds."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        print(f"the server did not end in {patience:g} seconds: killed", file=sys.stderr)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def loads(args: argparse.Namespace) -> list[tuple[int, float]]:
    """Concurrency and rate of each measurement."""
    largest = max(args.concurrency)
    return [
        *((concurrency, math.inf) for concurrency in args.concurrency),
        *((largest, rate) for rate in args.request_rate),
    ]


def measure(
    base_url: str, requests: Path, load: tuple[int, float], count: int, args: argparse.Namespace
) -> dict[str, object]:
    """The figures of one load of so many requests, as vLLM's client saves them."""
    model, root = served_model(base_url)
    concurrency, rate = load
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", base_url, "--model", root, "--served-model-name", model),
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--dataset-name", "custom_image", "--dataset-path", str(requests)),
            *("--num-prompts", str(count), "--request-rate", str(rate)),
            *("--max-concurrency", str(concurrency), "--temperature", "0"),
            *("--custom-output-len", str(args.max_tokens), "--seed", str(args.seed)),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = Path(folder) / "result.json"
        if done.returncode or not result.is_file():
            sys.exit(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = json.loads(result.read_text())
    text = f"{concurrency} at a time" if math.isinf(rate) else f"{rate:g} a second"
    return {"load": text, **{name: found.get(name) for name in [*COLUMNS, "completed"][1:]}}


def row(figures: dict[str, object]) -> str:
    """A line of the table."""
    cells = []
    for name in COLUMNS:
        value = figures[name]
        text = f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)
        if name == "spec_decode_acceptance_length" and isinstance(value, float):
            text = f"{value:.2f}"
        cells.append(f"{text:<14}" if name == "load" else f"{text:>11}")
    return "  " + "".join(cells)


def sweep(name: str, url: str, requests: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """All loads of one server, printed as they come."""
    titles = [f"{t:<14}" if n == "load" else f"{t:>11}" for n, t in COLUMNS.items()]
    print(f"\n{name}: {served_model(url)[0]}, {args.num_prompts} requests a load", flush=True)
    print("  " + "".join(titles), flush=True)
    found = []
    largest = max(args.concurrency)
    measure(url, requests, (largest, math.inf), min(largest, args.num_prompts), args)  # to warm up
    for load in loads(args):
        found.append(measure(url, requests, load, args.num_prompts, args))
        print(row(found[-1]), flush=True)
    return found


def ratio(one: dict[str, object], other: dict[str, object]) -> str:
    """How many times as fast; "-" where one of them answered nothing."""
    fast, slow = (load["output_throughput"] for load in (one, other))
    return f"{fast / slow:.2f}x" if fast and slow else "-"


def draw(found: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Throughput against the median time per token, a curve for each server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        rates = [point["output_throughput"] for point in points]
        delays = [point["median_tpot_ms"] for point in points]
        axes.plot(delays, rates, marker="o", label=name)
        for point, delay, rate in zip(points, delays, rates, strict=True):
            axes.annotate(str(point["load"]), (delay, rate), fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("median time per token after the first, ms")
    axes.set_ylabel("output tokens per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the example."""
    args = parse_args()
    found: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        write_requests(requests, args.data, args.kinds and args.kinds.split(","), args.num_prompts)
        if args.start:
            for name, environment in STARTS.items():
                with started(environment, args.port, Path(folder) / "server.log") as url:
                    found[name] = sweep(name, url, requests, args)
        else:
            for number, url in enumerate(args.base_url, 1):
                found[f"{number}: {url}"] = sweep(url, url, requests, args)
    if len(found) == 2:
        first, second = found.values()
        print("\nthe first server's tokens/s over the second's")
        for one, other in zip(first, second, strict=True):
            print(f"  {one['load']:<14}{ratio(one, other)}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.chart:
        draw(found, args.chart)
    return 1 if any(point["failed"] for points in found.values() for point in points) else 0


if __name__ == "__main__":
    sys.exit(main())

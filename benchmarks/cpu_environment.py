"""What the CPU's environment is worth to a server: the demo pair, served with it and without.

    python benchmarks/cpu_environment.py --output benchmarks/results/cpu_environment.json

Four times `vllm serve`, one after the other: as a new user starts it (nothing preloaded, the dtype
of the checkpoint), and after `eval "$(vllm-msd env)"`, in float32 where this processor emulates the
checkpoint's dtype, as the plugin advises; each without speculation and with MSD. vLLM's own load
generator sends the same requests, one at a time and eight. About five minutes. Every server times
what drafting costs anew.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_msd.cpu_environment import RESERVED, emulates, tuned
from vllm_msd.demo.paths import demo_pair

EXAMPLE = Path(__file__).parents[1] / "examples" / "benchmark_serving.py"
# What the environment of this process may hold already; no server inherits it.
VARIABLES = ("LD_PRELOAD", "KMP_BLOCKTIME", "KMP_TPAUSE", "OMP_WAIT_POLICY", RESERVED)
OPTIONS = (
    *("--served-model-name", "msd-demo", "--enforce-eager", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
)
PLAIN, TUNED = "as it comes", "with `vllm-msd env`"


def load_example() -> ModuleType:
    """The example that drives servers, as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_serving", EXAMPLE)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{EXAMPLE} is not there: this needs a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(msd: bool, dtype: str) -> list[str]:
    """What starts a server."""
    pair = demo_pair()
    found = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(pair.target)]
    if dtype != "auto":
        found += ["--dtype", dtype]
    if msd:
        config = {"method": "msd", "model": str(pair.draft)}
        found += ["--speculative-config", json.dumps(config)]
    return [*found, *OPTIONS]


def measure(example: ModuleType, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The four servers in turn, each with all loads."""
    stored = json.loads((demo_pair().target / "config.json").read_text())["dtype"]
    dtypes = {PLAIN: "auto", TUNED: "float32" if emulates(stored) else "auto"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        example.write_requests(requests, None, None, args.num_prompts)
        for name, dtype in dtypes.items():
            for msd in (False, True):
                environment = tuned(os.environ) if name == TUNED else {}
                cache = Path(folder) / f"cache-{len(found)}"
                environment = {**environment, "VLLM_CACHE_ROOT": str(cache)}
                log = Path(folder) / "server.log"
                start = example.started(environment, args.port, log, command(msd, dtype))
                with start as url:
                    title = f"{name}, {'MSD' if msd else 'no speculation'}"
                    loads = example.sweep(title, url, requests, args)
                found.append(
                    {
                        "environment": name,
                        "msd": msd,
                        "dtype": stored if dtype == "auto" else dtype,
                        "loads": loads,
                    }
                )
    return found


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--num-prompts", type=int, default=21, help="the seven kinds in turn")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    for name in VARIABLES:
        os.environ.pop(name, None)
    args.request_rate, args.seed = [], 20_000  # of the example: no rates, no arrival times
    from vllm_msd.provenance import provenance

    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = {**provenance(**settings), "servers": measure(load_example(), args)}
    print()
    for server in result["servers"]:
        rates = ", ".join(f"{x['load']}: {x['output_throughput']:.0f}" for x in server["loads"])
        drafts = "MSD" if server["msd"] else "no speculation"
        print(f"{server['environment']}, {server['dtype']}, {drafts}: {rates} tokens/s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(load["failed"] for one in result["servers"] for load in one["loads"]) else 0


if __name__ == "__main__":
    sys.exit(main())

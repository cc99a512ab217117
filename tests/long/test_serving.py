"""Serving's long forms: odd configs, odd requests, and 1,000 mixed ones before and after a restart.

    MSD_LONG=1 python -m pytest tests/long/test_serving.py

Results go to ``benchmarks/results/faults.json``. The servers serve the demo pair in fp32, under
MSD with trees, on the CPU.
"""

import os
from collections import Counter

import psutil

from tests.common import server_fuzz, server_soak, worker_memory
from tests.common.adapters import write_adapter
from tests.common.server import Server, start_server
from tests.common.worker import HANGS
from tests.long.record import FAULTS, long_form, write_part
from tests.vllm.test_config_fuzz import engine, try_configs  # noqa: F401 (a fixture)
from tests.vllm.test_server_fuzz import Judge, start_without_msd
from vllm_msd.demo.paths import demo_pair

pytestmark = long_form
EXAMPLES = 2000
NUMBER = 20  # of the drawn configs and requests
TREES = {"TOKENS": "16", "DEPTH": "5", "TOP_K": "4"}
# A worker that other work keeps from running for minutes is no fault: vLLM's own limit is 5.
LIMIT = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(HANGS)}
ENVIRONMENT = {**os.environ, **TREES, **LIMIT, **server_soak.FLAT_MEMORY}


def test_configs(engine, monkeypatch):  # noqa: F811
    outcomes = try_configs(engine, monkeypatch, EXAMPLES, NUMBER)
    assert outcomes["served"] > 50 and outcomes["refused"] > 500
    write_part(FAULTS, "config-fuzz", dict(outcomes), seed=NUMBER, examples=EXAMPLES)


def test_requests(tmp_path):
    cores = os.sched_getaffinity(0)
    server = start_server(tmp_path, ENVIRONMENT, cores)
    beside = tmp_path / "without"
    beside.mkdir()
    judge = Judge(server, lambda: start_without_msd(beside, ENVIRONMENT, cores))
    try:
        statuses = server_fuzz.fuzz(server, EXAMPLES, NUMBER, judge)
        judge.server_is_well()
    finally:
        judge.close()
        server.stop()
    figures = {"statuses": statuses, "errors_of_vllm": judge.of_vllm, "server_ended": False}
    write_part(FAULTS, "request-fuzz", figures, seed=NUMBER, examples=EXAMPLES, **TREES)


def test_soak(tmp_path):
    adapters = [
        f"{name}={write_adapter(tmp_path / name, str(demo_pair().target), number)}"
        for number, name in enumerate(server_soak.ADAPTERS, 1)
    ]
    options = ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--enable-lora"]
    # A place more than adapters: on a CPU vLLM gives rows without an adapter the last place's.
    options += ["--max-loras", "3", "--max-lora-rank", "8", "--lora-modules", *adapters]
    # Requests that bring the same new picture at once can overtake each other on their way through
    # vLLM's cache of processed pictures; it then asks the client to try again, with status 500.
    options += ["--mm-processor-cache-gb", "0", *worker_memory.OPTIONS]
    asked = server_soak.orders(server_soak.REQUESTS, NUMBER)

    def started(name: str, *more: str) -> Server:
        folder = tmp_path / f"server-{name}"
        folder.mkdir()
        cores = os.sched_getaffinity(0)
        environment = ENVIRONMENT | worker_memory.ENVIRONMENT
        return start_server(folder, environment, cores, [*options, *more])

    plain = started("plain", "--speculative-config", "None")
    try:
        without = server_soak.send_all(plain, asked)
    finally:
        plain.stop()
    expected = {
        server_soak.key(body): outcome
        for (case, body), outcome in zip(asked, without, strict=True)
        if case != "aborted"
    }
    texts = {outcome.text for outcome in expected.values() if outcome.status == 200}
    assert len(texts) > len(expected) // 3

    for run in ("first", "second"):
        server = started(run)
        everything = server_soak.processes(server)
        try:
            found, figures = server_soak.soak(server, asked)
            everything = server_soak.processes(server)
            assert server.is_up()
        finally:
            server.stop()
        _, alive = psutil.wait_procs(everything, timeout=10)
        pairs = list(zip(asked * server_soak.TIMES, found, strict=True))
        different = [
            (body, outcome.status, outcome.text)
            for (case, body), outcome in pairs
            if case in server_soak.ANSWERED and outcome.text != expected[server_soak.key(body)].text
        ]
        statuses = Counter(f"{outcome.case} {outcome.status}" for outcome in found)
        figures |= {
            "requests": len(pairs),
            "statuses": dict(sorted(statuses.items())),
            "different": len(different),
            "left_running": len(alive),
            "distinct_answers": len(texts),
        }
        settings = {"seed": NUMBER, "concurrency": server_soak.CONCURRENCY, **TREES}
        write_part(FAULTS, f"server-soak-{run}", figures, **settings)
        assert different == []
        assert alive == [] and figures["held"] == {}
        assert 0 < figures["accepted"] < figures["verified"]
        assert figures["leaks"] == [], figures["memory_growth"]
        for (case, body), outcome in pairs:
            refused = case in server_soak.REFUSED
            status = expected[server_soak.key(body)].status if refused else 200
            assert outcome.status == status, outcome
            # A picture of 400 million pixels ends in an error 500 of vLLM's own.
            assert not refused or 400 <= status < 500 or case == "huge_image", outcome

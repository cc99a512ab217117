"""`vllm-msd bench` on the demo pair, small: killed on its way, gone on with, and what it found."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.common.worker import HANGS, REPOSITORY, run_worker
from vllm_msd.bench.drive import Cell, run_cell
from vllm_msd.bench.ties import GAPS
from vllm_msd.errors import ConfigError

ARMS = ["none", "ngram", "chain", "tree:8x4x2", "auto"]
CELLS = 2 * len(ARMS)


@pytest.fixture(scope="module")
def bench(fresh_process, tmp_path_factory):
    """Starts the command; its output folder."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    command = [
        *(sys.executable, "-m", "vllm_msd.cli.main", "bench", "--quick", "--arms", *ARMS),
        *("--batch", "2", "--num-prompts", "4", "--max-tokens", "24", "--output", str(folder)),
    ]

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=REPOSITORY, **fresh_process,
        )  # fmt: skip

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def runs(bench):
    """Cells that a kill left, and what the same command printed then."""
    journal = bench.folder / "bench.json.journal"
    first = bench()
    until = time.monotonic() + HANGS
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert first.poll() is None and time.monotonic() < until, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    left = journal.read_bytes()
    second = bench()
    said, _ = second.communicate(timeout=HANGS)
    assert second.returncode == 0, said[-4000:]
    return left, journal.read_bytes(), said


@pytest.mark.long
def test_a_killed_run_goes_on(runs):
    left, whole, said = runs
    kept = left[: left.rindex(b"\n") + 1]
    assert whole.startswith(kept), "what was measured is not measured again"
    cells = kept.count(b"\n") - 1
    assert f"going on: {CELLS - cells} of {CELLS} cells are left" in said
    rows = [json.loads(line) for line in whole.splitlines()[1:]]
    places = [(row["record"], row["sample"]) for row in rows]
    assert len({*places}) == len(places) == CELLS + 2


@pytest.mark.long
def test_answers_are_those_of_no_speculation(bench, runs):
    found = json.loads((bench.folder / "bench.json").read_text())
    assert found["dtype"] == "float32"
    (cell,) = found["cells"]
    for name, one in cell["arms"].items():
        assert one["identical"] == one["requests"] == 8, name
        assert len(one["speedup_per_pass"]) == 2 and one["tokens"] > 50
    for name in ("chain", "tree:8x4x2"):
        one = cell["arms"][name]
        assert 0 < one["accepted"] < one["drafted"], "drafts were accepted and rejected"
        assert one["share_of_ideal_tokens_per_second"] > 0
    assert cell["arms"]["chain"]["share_of_ideal_speedup"] > 0
    assert cell["arms"]["tree:8x4x2"]["ideal_speedup"] is None, "of another width than the measured"
    assert set(found["support"]) == {*ARMS} - {"none"}
    parts = found["profile"]["milliseconds_per_step"]
    assert parts["target's matrix products"] > 0 and parts["rest of the target"] > 0
    page = (bench.folder / "report.html").read_text()
    assert "Where the time of a step goes" in page
    assert (bench.folder / "kinds.png").stat().st_size > 5000


@pytest.mark.long
def test_another_command_in_the_same_folder_is_refused(bench, runs):
    other = bench("--seed", "5")
    said, _ = other.communicate(timeout=HANGS)
    assert other.returncode == 2 and "seed: 0, now 5" in said and "--force" in said


@pytest.mark.long
def test_gaps_of_answers_that_differ_are_those_of_decoding():
    report = run_worker("near_ties", "v1")
    assert len(report["gaps"]) > 30 and report["dtype"] == "float32"
    near = 0
    for gap, (asked, is_near) in zip(report["gaps"], report["asked"], strict=True):
        assert asked == pytest.approx(gap, abs=1e-3)
        assert is_near == (asked <= GAPS["bfloat16"])
        near += is_near
    assert 0 < near < len(report["gaps"])


class MadeUpEngine:
    """Answers each request with 1 token and then 2 a step, one of them drafted; ends after 5."""

    def __init__(self) -> None:
        self.llm, self.running, self.most = self, {}, 0

    def add_request(self, request: str, prompt: dict, params: object) -> None:
        if len(prompt["prompt_token_ids"]) > 3:
            raise ValueError("The prompt is too long.")
        self.running[request] = 0

    def step(self) -> tuple[list, SimpleNamespace | None]:
        outputs, drafts = [], 0
        self.most = max(self.most, len(self.running))
        for request, said in list(self.running.items()):
            new = 2 if said else 1
            drafts += new == 2
            self.running[request] = said + new
            ends = said + new == 5
            delta = SimpleNamespace(token_ids=[7] * new, finish_reason="stop" if ends else None)
            outputs.append(SimpleNamespace(request_id=request, outputs=[delta], finished=ends))
            if ends:
                del self.running[request]
        if not drafts:
            return outputs, None
        return outputs, SimpleNamespace(
            num_drafts=drafts, num_draft_tokens=3 * drafts, num_accepted_tokens=drafts,
            num_accepted_tokens_per_pos=[drafts, 0, 0],
        )  # fmt: skip


def test_a_cell_keeps_its_batch_full_and_counts_steps_that_only_decode():
    engine, done = MadeUpEngine(), []
    prompts = [{"prompt_token_ids": [1]} for _ in range(5)]
    settings = {"temperature": 0.0, "max_tokens": 9, "seed": 0}
    cell = run_cell(engine, prompts, 2, 3, **settings, on_reply=lambda: done.append(1))
    assert engine.most == 2 and len(done) == 5
    assert all(r.token_ids == [7] * 5 and r.finish == "stop" and r.steps == 3 for r in cell.replies)
    assert (cell.verifications, cell.drafted, cell.accepted) == (10, 30, 10)
    assert cell.accepted_by_depth == [10, 0, 0]
    # Two pairs of requests decode together for two steps each; the fifth is alone.
    ((drafted, depth, steps, seconds, tokens),) = cell.full_steps
    assert (drafted, depth, steps, tokens) == (6, 3, 4, 16) and seconds > 0
    assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell


def test_a_cell_without_a_token_is_no_measurement():
    engine = MadeUpEngine()
    ended = SimpleNamespace(token_ids=[], finish_reason="stop")
    output = SimpleNamespace(request_id="0", outputs=[ended], finished=True)
    engine.step = lambda: ([output], None)
    with pytest.raises(ConfigError, match="batch 1: got 1 answers without a token"):
        run_cell(engine, [{"prompt_token_ids": [1]}], 1, 0, temperature=0.0, max_tokens=9, seed=0)


def test_a_prompt_that_does_not_fit_is_named():
    prompts = [{"prompt_token_ids": [1]}, {"prompt_token_ids": [1] * 9}]
    with pytest.raises(ConfigError, match="request 2 of the data: The prompt is too long"):
        run_cell(MadeUpEngine(), prompts, 2, 0, temperature=0.0, max_tokens=9, seed=0)

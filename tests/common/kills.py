"""`train`, `convert`, `trim` and `regenerate` killed at random moments and started again.

Every run is a process of its own, forked from one that has imported everything, so that a kill
meets the work and not the start. A run is killed once, then started again as a user would, and its
result compared, to the last bit, with that of a run that nobody killed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from vllm_msd.storage import PARTIAL

REPOSITORY = Path(__file__).resolve().parents[2]
_HAS_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # asks only; waitpid reads the exit code
_MET = ("not at all", "before a step", "between steps", "after the last step")


def killed(what: str, kills: int, seed: int, timeout: float = 7200) -> dict[str, Any]:
    """Kill ``train``, ``convert``, ``trim`` or ``regenerate`` so often, in a fresh process.

    Returns `_train`'s table.

    Raises:
        RuntimeError: a result is another one, or was half-written and taken for whole.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.common.kills", what, str(kills), str(seed)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _Ended(NamedTuple):
    """A run's exit code, None if a kill came first; what it said; how long it took."""

    code: int | None
    said: str
    seconds: float

    def length(self, known: float) -> float:
        """Of a whole run, so that no kill waits for longer than one takes."""
        return known if self.code is None else min(known, self.seconds)


def _run(
    arguments: list[str],
    moment: float | None = None,
    is_due: Callable[[], bool] = lambda: True,
) -> _Ended:
    """Run a command in a fork, killed ``moment`` seconds after ``is_due`` has become true."""
    started, due = time.monotonic(), None
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    child = os.fork()
    if child == 0:
        code = 99
        try:
            from vllm_msd.cli.main import main

            os.dup2(said.fileno(), 2)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = main(arguments)
                said.flush()
        finally:
            os._exit(code)
    while moment is not None and not os.waitid(os.P_PID, child, _HAS_ENDED):
        if due is None and is_due():
            due = time.monotonic() + moment
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    _, status = os.waitpid(child, 0)
    said.seek(0)
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return _Ended(code, said.read(), time.monotonic() - started)


def _train(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a training so often; how many kills met it before, in and after its steps."""
    from tests.common import tiny
    from tests.common.conversations import write_conversations

    if not _run_alone(lambda: tiny.build_pair(folder / "pair", "llava")):
        raise RuntimeError("the target cannot be built")
    text, multimodal = write_conversations(folder / "data")
    settings = {
        "target": str(folder / "pair" / "target"), "text_data": [str(text)],
        "multimodal_data": [str(multimodal)], "steps": 12, "batch_size": 2, "precision": "no",
        "device": "cpu", "eval_records": 1, "eval_every": 4, "eval_max_tokens": 4, "save_every": 2,
        "log_every": 1, "learning_rate": 1e-3, "warmup_steps": 2,
    }  # fmt: skip

    def command(name: str) -> list[str]:
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(settings | {"output": str(folder / name)}))
        return ["train", "--config", str(path)]

    started = time.monotonic()
    _expect(_run(command("whole")), "the unbroken run")
    seconds = time.monotonic() - started
    names = ("last/model.safetensors", "best/model.safetensors", "last/config.json")
    expected = {name: (folder / "whole" / name).read_bytes() for name in names}
    losses = _losses(folder / "whole")
    met = dict.fromkeys(_MET, 0)
    for number in count():
        if sum(met.values()) - met["not at all"] == kills:
            break
        name = f"run-{number}"
        moment = rng.uniform(0.0, seconds)
        ended = _run(command(name), moment)
        code, seconds = ended.code, ended.length(seconds)
        done = len(_losses(folder / name))
        kinds = (code is not None, not done, done < 12, True)
        met[next(k for k, fits in zip(_MET, kinds, strict=True) if fits)] += 1
        if code is None:
            has_run = (folder / name / "run.json").is_file()
            _check_drafts(folder / name)
            _expect(_run([*command(name), *(["--resume"] if has_run else [])]), f"{name}, {moment}")
        got = {n: (folder / name / n).read_bytes() for n in names}
        # A draft's config names its target, whose folder is the same; so all of it is.
        wrong = [n for n in names if got[n] != expected[n]]
        if wrong or _losses(folder / name) != losses:
            raise RuntimeError(f"{name}, killed after {moment:.3f} s: {wrong}, {met}")
        left = [str(p) for p in (folder / name).rglob("*.partial")]
        if left:
            raise RuntimeError(f"{name}: left behind: {left}")
        shutil.rmtree(folder / name)
    return {"kills": kills, "seconds_of_a_run": round(seconds, 1), "met": met, "different": 0}


def _convert(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a conversion so often; how many drafts were there after the kill, whole or not.

    A kill in three waits for a file to be begun, so that it meets the writing.
    """
    source, whole = folder / "source", folder / "whole"
    if not _run_alone(lambda: _write_large_draft(source)):
        raise RuntimeError("the draft cannot be written")
    started = time.monotonic()
    _expect(_run(["convert", str(source), str(whole)]), "the unbroken conversion")
    seconds = time.monotonic() - started
    expected = {p.name: p.read_bytes() for p in whole.iterdir()}
    met = {"nothing written": 0, "half written": 0, "whole": 0, "not at all": 0}
    for number in count():
        if sum(met.values()) - met["not at all"] == kills:
            break
        target = folder / f"draft-{number}"
        if number % 3 == 1:
            target.mkdir()
        elif number % 3 == 2:  # over another draft
            _expect(_run(["convert", str(source), str(target)]), "a first draft")
            config = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
        force = ["--force"] if number % 3 == 2 else []
        writes, moment = partial(_has, target, "*" + PARTIAL), rng.uniform(0, 0.1)
        when = (moment, writes) if rng.random() < 1 / 3 else (rng.uniform(0, seconds),)
        ended = _run(["convert", str(source), str(target), *force], *when)
        code, seconds = ended.code, ended.length(seconds)
        if code is not None:
            met["not at all"] += 1
        elif _check_draft(target, source):
            met["whole"] += 1
        else:
            there = target.is_dir() and any(target.iterdir())
            met["half written" if there else "nothing written"] += 1
        is_done = code is None and not force and (target / "config.json").exists()
        if code is None and not is_done:
            _expect(_run(["convert", str(source), str(target), *force]), f"convert {number}")
        got = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
        if got != expected:
            raise RuntimeError(f"convert {number}: {got.keys()}, expected {expected.keys()}")
        shutil.rmtree(target)
    return {"kills": kills, "seconds_of_a_run": round(seconds, 1), "met": met, "different": 0}


def _regenerate(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill regenerations so often, most of them several times; what the kills found in journals.

    A kill in three waits for the last reply, so that it meets the writing of the output.
    """
    from tests.common.conversations import write_conversations

    _, data = write_conversations(folder / "data", 60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    said = [sys.executable, "-m", "tests.common.chat_server", port, "--delay", "0.01"]
    server = subprocess.Popen(said, cwd=REPOSITORY)

    def command(output: Path) -> list[str]:
        return ["regenerate", "--data", str(data), "--output", str(output), "--concurrency", "4",
                "--server", f"http://127.0.0.1:{port}"]  # fmt: skip

    try:
        _expect(_run(command(folder / "first.json")), "the first run")  # waits for the server
        started = time.monotonic()
        _expect(_run(command(folder / "whole.json")), "the unbroken run")
        seconds = time.monotonic() - started
        expected = (folder / "whole.json").read_bytes()
        met = {"nothing done": 0, "some done": 0, "all done": 0, "not at all": 0}
        for number in count():
            if sum(met.values()) - met["not at all"] >= kills:
                break
            output = folder / f"run-{number}.json"
            while True:
                if rng.random() < 1 / 3:
                    writes = partial(_is_writing, output, 60)
                    ended = _run(command(output), rng.uniform(0.0, 0.02), writes)
                else:
                    ended = _run(command(output), rng.uniform(0.3, 1.0) * seconds)
                if ended.code is not None:
                    _expect(ended, f"run {number}")
                    met["not at all"] += 1
                    break
                if output.exists() and output.read_bytes() != expected:
                    raise RuntimeError(f"run {number}: a half-written output")
                some = "some done" if _replies(output) > 0 else "nothing done"
                met["all done" if _is_writing(output, 60) else some] += 1
                if output.exists() and not _journal(output).exists():
                    break
            if output.read_bytes() != expected:
                raise RuntimeError(f"run {number}: another output, {met}")
            left = {p.name for p in folder.glob(output.name + "*")} - {output.name}
            if left:
                raise RuntimeError(f"run {number}: left behind: {left}")
            output.unlink()
    finally:
        server.kill()
        server.wait()
    kills = sum(met.values()) - met["not at all"]  # the last run's were not broken off
    return {"kills": kills, "seconds_of_a_run": round(seconds, 1), "met": met, "different": 0}


def _has(folder: Path, pattern: str) -> bool:
    """Whether a folder is there with a file of such a name."""
    return any(folder.glob(pattern))


def _journal(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def _replies(output: Path) -> int:
    """Conversations in the journal, of which the first line is the head."""
    try:
        return _journal(output).read_text().count("\n") - 1
    except FileNotFoundError:
        return 0


def _is_writing(output: Path, conversations: int) -> bool:
    """Whether all replies are there; from then on the output is written."""
    return output.exists() or _replies(output) == conversations


def _trim(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill the counting so often; where the kills met it.

    A kill in three waits for the first place that is kept.
    """
    from tests.common import tiny
    from tests.common.conversations import write_conversations
    from vllm_msd.training import vocabulary

    if not _run_alone(lambda: tiny.build_pair(folder / "pair", "llava")):
        raise RuntimeError("the target cannot be built")
    text, _ = write_conversations(folder / "data", characters="".join(map(chr, range(33, 99))))
    text.write_text("\n".join([text.read_text()] * 50))
    vocabulary.SAVE_SECONDS = 0.05  # ten seconds otherwise

    def command(name: str) -> list[str]:
        draft, output = folder / "pair" / "draft", folder / name
        return ["trim", str(draft), "--data", str(text), "--size", "90", "--output", str(output)]

    started = time.monotonic()
    _expect(_run(command("whole")), "the unbroken run")
    seconds = time.monotonic() - started
    names = ("model.safetensors", "config.json", vocabulary.COUNTS)
    expected = [(folder / "whole" / name).read_bytes() for name in names]
    met = {"not at all": 0, "before a place was kept": 0, "between records": 0, "after them": 0}
    for number in count():
        if sum(met.values()) - met["not at all"] == kills:
            break
        output = folder / f"run-{number}"
        moment, keeps = rng.uniform(0.0, seconds), partial(_has, output, vocabulary.COUNTS)
        when = (moment / 4, keeps) if rng.random() < 1 / 3 else (moment,)
        ended = _run(command(output.name), *when)
        code, seconds = ended.code, ended.length(seconds)
        place = output / vocabulary.COUNTS
        done = json.loads(place.read_text())["done"] if place.is_file() else 0
        kinds = (code is not None, not done, done < 600, True)
        met[next(k for k, fits in zip(met, kinds, strict=True) if fits)] += 1
        if code is None and not (output / "config.json").exists():
            _expect(_run(command(output.name)), output.name)
        if [(output / name).read_bytes() for name in names] != expected:
            raise RuntimeError(f"{output.name}: other files than those of the unbroken run, {met}")
        left = [str(p) for p in output.rglob("*.partial")]
        if left:
            raise RuntimeError(f"{output.name}: left behind: {left}")
        shutil.rmtree(output)
    return {"kills": kills, "seconds_of_a_run": round(seconds, 1), "met": met, "different": 0}


def _write_large_draft(folder: Path) -> None:
    """A draft of 120 MB, so that kills meet its writing."""
    import torch

    from tests.common.drafts import PUBLISHED
    from vllm_msd.draft import MSDDraftConfig

    sizes = {"hidden_size": 1024, "intermediate_size": 6000, "vocab_size": 4000}
    raw = PUBLISHED["llava"] | sizes
    config = MSDDraftConfig.from_dict(raw)
    shapes = {**config.weight_shapes(), "embed_tokens.weight": config.embedding_shape()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    torch.save({n: torch.randn(s) for n, s in shapes.items()}, folder / "pytorch_model.bin")


def _check_drafts(folder: Path) -> None:
    """What a killed run calls a draft is one, and what it calls a checkpoint is complete."""
    from safetensors import safe_open

    for path in folder.rglob("*.safetensors"):
        if ".partial" not in str(path):
            with safe_open(path, "pt") as file:
                file.keys()
    for path in (folder / "checkpoints").glob("step-*[0-9]"):
        if not (path / "trainer.pt").is_file():
            raise RuntimeError(f"{path} is half-written")


def _check_draft(folder: Path, source: Path) -> bool:
    """Whether a draft is there that reads as whole; then it must be one of the two whole ones."""
    from vllm_msd.checkpoint import load_draft_config
    from vllm_msd.errors import CheckpointError

    try:
        config = load_draft_config(folder)
    except CheckpointError:
        return False
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        file.keys()
    if config.rope_theta not in (1.0, load_draft_config(source).rope_theta):
        raise RuntimeError("neither the old draft's config nor the new one's")
    return True


def _losses(run: Path) -> list[float]:
    log = run / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def _expect(ended: _Ended, what: str) -> None:
    if ended.code != 0:
        raise RuntimeError(f"{what}: exit code {ended.code}\n{ended.said[-3000:]}")


def _run_alone(work: Any) -> bool:
    """Do something in a fork: threads of PyTorch must not start in the process that forks."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    """Print one table; exits with a traceback when a result differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "convert", "trim", "regenerate"))
    parser.add_argument("kills", type=int)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    # Imported here once, for every fork.
    import vllm_msd.checkpoint
    import vllm_msd.regenerate
    import vllm_msd.training.engine
    import vllm_msd.training.trim  # noqa: F401

    work = {"train": _train, "convert": _convert, "trim": _trim, "regenerate": _regenerate}[
        args.what
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = work(Path(folder), args.kills, random.Random(args.seed))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

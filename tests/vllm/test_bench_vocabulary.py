"""The benchmark of draft vocabularies runs, on a tiny pair."""

import json
import subprocess
import sys

import pytest

from demo_factory.write_data import write_data
from tests.common.vocabularies import trimmed
from tests.common.worker import HANGS, REPOSITORY
from vllm_msd.demo.paths import demo_pair


@pytest.mark.long
def test_drafts_are_compared(tmp_path, fresh_process):
    pair = demo_pair()
    data = write_data(tmp_path / "world", 4, split="test")["multimodal"]
    half = trimmed(pair.draft, tmp_path / "half", list(range(0, 2048, 2)))
    output = tmp_path / "vocabulary.json"
    command = [sys.executable, "-m", "benchmarks.bench_vocabulary", "--target", str(pair.target)]
    command += ["--draft", str(pair.draft), "--trimmed", half, "--data", str(data)]
    command += ["--num-prompts", "2", "--rounds", "2", "--max-tokens", "24", "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=REPOSITORY, timeout=HANGS, check=False,
        capture_output=True, text=True, **fresh_process,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(output.read_text())["drafts"]
    assert found["whole"]["draft_vocab_size"] is None and found["half"]["draft_vocab_size"] == 1024
    assert all(one["identical"] == one["requests"] == 2 for one in found.values())
    assert found["whole"]["accepted_of_whole"] == found["whole"]["speedup_over_whole"] == 1
    assert found["half"]["accepted_of_whole"] < 1
    assert "half" in done.stdout

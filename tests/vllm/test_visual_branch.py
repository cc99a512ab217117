"""What the image is worth to the demo draft, and that a wrong one there changes no answer.

The demo pair's draft loses to noise in the image's place and next to nothing to another picture:
its target goes by the picture only loosely. So noise is what must cost here.
In a process of its own, like the benchmark whose figures the README gives; here few requests.
"""

import json
import subprocess
import sys

import pytest

from tests.common.worker import HANGS, REPOSITORY

pytestmark = pytest.mark.long


def test_a_wrong_image_in_the_draft_costs_acceptance_and_changes_no_answer(tmp_path, fresh_process):
    output = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/visual_branch.py", "--num-prompts", "12"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
        **fresh_process,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    figures = json.loads(output.read_text())
    assert figures["identical"] == figures["requests"] == 12
    own, swapped, noise = (figures["all"][n] for n in ("own_image", "swapped_image", "noise"))
    assert 0 < own["accepted"] < own["drafted"]
    assert swapped["acceptance_length"] <= 1.05 * own["acceptance_length"]
    assert noise["acceptance_length"] < own["acceptance_length"]
